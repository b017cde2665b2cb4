"""Reads config files and their bases as plain values, so that no config runs code."""

import os
import re
from collections.abc import Callable, Iterator

import yaml

from detectron2.utils.file_io import PathManager

from .config import BASE
from .errors import UserError, describe_os_error, one_line

MOST_FILES = 100  # of one config; otherwise, a malicious server could name new bases forever
MODEL_ZOO = "detectron2://"  # detectron2's own server


def read_config_file(path: str, *, allow_remote: bool, find_named: Callable[[str, str], str]) -> list[dict]:
    """Read a config file and every file that it inherits from; each must hold plain values only.

    YAML tags can name Python objects to build, which can run code. yaml.safe_load refuses all such tags.

    Args:
        path: a file, or a URL.
        allow_remote: whether the config and its bases may come from the network.
        find_named: resolves a name in a _BASE_ if there is no such file next to the config. Its second argument begins
            the message of the UserError that it raises for an unknown name.

    Returns:
        The values of each file without _BASE_. A file comes after its bases, so later values take precedence.

    Raises:
        UserError: a file is missing, from the network, not a YAML mapping or holds Python objects, or a file inherits
            from itself. Names the file and, for YAML errors, the line.
    """
    found: list[dict] = []
    count = 0

    def read(chain: tuple[str, ...]) -> None:
        nonlocal count
        file = chain[-1]
        if _identity(file) in map(_identity, chain[:-1]):
            raise UserError(f"{path}: its {BASE} loops, {' -> '.join(chain)}: remove one of these {BASE} keys")
        count += 1
        if count > MOST_FILES:
            raise UserError(f"{path} inherits from more than {MOST_FILES} files by {BASE}: a config must be simpler")
        inherited = f"{chain[-2]}: its {BASE} {file}" if len(chain) > 1 else f"config file {file}"
        _check_place(file, inherited, allow_remote=allow_remote)
        values = _load_plain(file)
        for base in _find_bases(file, values.pop(BASE, []), find_named):
            read((*chain, base))
        found.append(values)

    read((path,))
    return found


def is_remote(path: str) -> bool:
    """Return whether a path is a URL rather than a local file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def _identity(path: str) -> str:
    """Return the real path of a local file, which is the same for all of its names, or a URL unchanged."""
    return path if is_remote(path) else os.path.realpath(path)


def _check_place(file: str, named: str, *, allow_remote: bool) -> None:
    if not is_remote(file):
        if not os.path.isfile(file):
            raise UserError(f"{named} does not exist, or is not a regular file")
    elif not (allow_remote or file.startswith(MODEL_ZOO)):
        raise UserError(
            f"{named} comes from the network: download it and look at it first, or allow it with --allow-remote-config "
            "(in Python, allow_remote=True)"
        )


def _load_plain(file: str) -> dict:
    try:
        with PathManager.open(file, "r") as stream:
            loaded = yaml.safe_load(stream)
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{file}, line {error.problem_mark.line + 1}: {one_line(error.problem)}: a config holds plain values only, "
            "no Python objects"
        ) from error
    except OSError as error:
        raise UserError(f"config file {file} cannot be read ({describe_os_error(error)})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{file} is not a config: it must be a YAML mapping of keys to values")
    return loaded


def _find_bases(file: str, bases: object, find_named: Callable[[str, str], str]) -> Iterator[str]:
    """Yield the files that a config file names as its bases, relative to its own folder or found by `find_named`."""
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise UserError(f"{file}: {BASE} must be the name of a file, or a list of names, got {one_line(base)}")
        place = os.path.expanduser(base)
        if not place.startswith(("/", "https://", "http://")):
            place = os.path.join(os.path.dirname(file), place)
        if is_remote(place) or os.path.isfile(place):
            yield place
        else:
            yield find_named(base, f"{file}: its {BASE} {place} does not exist, or is not a regular file")
