"""Finds the configs of the paper's detectors by name, and loads config files.

    cfg = deqdet.model_zoo.get_config("deqdet_r50_300q_2x_p64", ["MODEL.DEQDET.NUM_CLASSES", "3"])

The files are those in the repository's configs/; an installed package contains a copy.
"""

import difflib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import yaml

from detectron2.config import CfgNode, get_cfg

from .config import OPEN_SECTIONS, add_deqdet_config, merge_file, merge_overrides
from .config_file import is_remote, read_config_file
from .config_keys import flatten
from .config_types import describe_mismatch
from .errors import UserError, one_line

logger = logging.getLogger(__name__)

_PACKAGED = Path(__file__).with_name("configs")  # where setup.py puts them in a wheel
_IN_REPOSITORY = Path(__file__).parents[3] / "configs"


def list_configs() -> list[str]:
    """List the names that `get_config` accepts, such as "deqdet_r50_100q_1x" and "quick/deqdet_shapes"."""
    folder = config_folder()
    files = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return [path.as_posix() for path in files if not path.name.startswith("Base-")]


def get_config(name: str | os.PathLike, overrides: Sequence[str] = (), *, allow_remote: bool = False) -> CfgNode:
    """Return detectron2's config with DEQDet's keys, a config file's values, and overrides.

    MODEL.TRUST_PICKLE takes effect only as an override. Otherwise, a file could permit itself weights that run code.

    Args:
        name: a name in `list_configs`, its last part if that is unambiguous ("deqdet_shapes"), or a YAML file.
        overrides: alternating keys and values, as on the tools' command lines.
        allow_remote: whether the file and its bases may come from the network.

    Raises:
        UserError: there is no such config, a file is not YAML, holds Python objects, inherits from itself or comes from
            the network, or a key or value is wrong.
    """
    cfg = get_cfg()
    add_deqdet_config(cfg)
    file = find_config(name)
    files, merged = read_config_file(file, allow_remote=allow_remote, find_named=_find_named), {}
    with explained(cfg, str(name)):
        for values in files:
            merge_file(values, merged)
        if merged.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise ValueError(f"VERSION is {merged['VERSION']}: it must be {cfg.VERSION}, detectron2's current version")
        cfg.merge_from_other_cfg(CfgNode(merged))
    if cfg.MODEL.TRUST_PICKLE:
        logger.warning("%s: MODEL.TRUST_PICKLE is ignored in a file: it counts on the command line only", name)
        cfg.MODEL.TRUST_PICKLE = False
    put_overrides(cfg, [str(word) for word in overrides])
    return cfg


def put_overrides(cfg: CfgNode, pairs: Sequence[str]) -> None:
    """Put the KEY VALUE pairs of a command line into a config, in place.

    Raises:
        UserError: the words do not form pairs, or a key or value is wrong.
    """
    for option in pairs:
        if option.startswith("--"):
            raise UserError(f"{option} must come before the KEY VALUE pairs")
    if len(pairs) % 2:
        alone = next((key for key in pairs[::2] if not re.fullmatch(r"[A-Z][A-Z0-9_.]*", key)), None)
        fault = f"{pairs[-1]} has no value" if alone is None else f"{alone} stands in the place of a key"
        raise UserError(f"overrides must be KEY VALUE pairs separated by spaces, but {fault}")
    with explained(cfg, "the command line"):
        merge_overrides(cfg, pairs)
    if isinstance(cfg.OUTPUT_DIR, str):  # otherwise the check of all values names it
        cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)  # a shell does not expand ~ in quotes or in a config file


def find_config(name: str | os.PathLike) -> str:
    """Return the path of the config file for a name that `get_config` accepts; a URL is returned unchanged.

    Raises:
        UserError: there is no such config, or the last part of a name is ambiguous.
    """
    text = os.fspath(name)
    if is_remote(text) or os.path.isfile(text):
        return text
    return _find_named(text, f"config file {text} does not exist")


def _find_named(text: str, missing: str) -> str:
    """Return the file in the model zoo with a name, which may end in .yaml.

    Args:
        missing: the beginning of the error message, which says that there is no such file elsewhere.

    Raises:
        UserError: no config has this name, or the last part of a name is ambiguous; suggests similar names.
    """
    stem, known = text.removeprefix("configs/").removesuffix(".yaml"), list_configs()
    found = [config for config in known if config == stem] or [x for x in known if x.rpartition("/")[2] == stem]
    if len(found) > 1:
        raise UserError(f"{missing}, and several configs have this name: give {' or '.join(found)}")
    if found:
        return str(config_folder() / f"{found[0]}.yaml")
    last_parts = {config.rpartition("/")[2]: config for config in known}
    close = _close(stem, known) or [last_parts[part] for part in _close(stem.rpartition("/")[2], list(last_parts))]
    hint = f"did you mean {' or '.join(close[:3])}?" if close else "deqdet.model_zoo.list_configs() lists them"
    raise UserError(f"{missing}, and no config of the model zoo has this name; {hint}")


def config_folder() -> Path:
    """Return the folder of the configs, in the installed package or in the repository that this file belongs to."""
    return _PACKAGED if _PACKAGED.is_dir() else _IN_REPOSITORY


@contextmanager
def explained(cfg: CfgNode, where: str) -> Iterator[None]:
    """Turn exceptions of yacs and YAML in the block into a UserError.

    The message names the key, and similar known keys or the type that its value must have.

    Args:
        where: the file, or "the command line".
    """
    known = dict(flatten(cfg))
    try:
        yield
    except (
        AssertionError, AttributeError, KeyError, TypeError, ValueError, OSError, RecursionError, yaml.YAMLError
    ) as error:  # fmt: skip
        # The text of a KeyError is the repr of its message.
        message = one_line(error.args[0] if isinstance(error, KeyError) else error)
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", message)
        if unknown is None:
            raise UserError(f"{where}: {describe_mismatch(message, known) or message}") from error
        raise UserError(f"{where}: unknown config key {unknown[1]}; {_suggest(unknown[1], list(known))}") from error


def is_key(word: str) -> bool:
    """Return whether a word on a command line is a config key such as MODEL.WEIGHTS or SEED, which begins the pairs.

    A mistyped key counts too if its section resembles a known one, so that it is reported as an unknown key.
    """
    sections = _top_level_keys()
    section, dot, rest = word.partition(".")
    if not dot:
        return word in sections
    if not (re.fullmatch(r"[A-Z0-9_.]+", rest) or word.rpartition(".")[0] in OPEN_SECTIONS) or os.path.exists(word):
        return False
    return section in sections or (section.isupper() and bool(_close(section, list(sections))))


@cache
def _top_level_keys() -> tuple[str, ...]:
    """Return the top-level sections and keys of a config; cached, since every word of a command line needs them."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    return tuple(cfg)


def _suggest(key: str, known: list[str]) -> str:
    """Suggest known keys for an unknown one: similar names in its section, the same name elsewhere, or similar keys."""
    by_upper = {name.upper(): name for name in known}
    section, _, last = key.upper().rpartition(".")
    beside = [f"{section}.{name}" for name in _close(last, [n.rpartition(".")[2] for n in by_upper])]
    elsewhere = [name for name in by_upper if name.rpartition(".")[2] == last]
    found = [name for name in dict.fromkeys(beside + elsewhere) if name in by_upper]
    found = found or _close(key.upper(), list(by_upper))
    if not found:
        return "the known ones are in deqdet/config.py and detectron2/config/defaults.py"
    return "did you mean " + " or ".join(by_upper[name] for name in found[:4]) + "?"


def _close(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, dict.fromkeys(names), n=3, cutoff=0.75)
