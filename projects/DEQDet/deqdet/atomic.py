"""Writes files atomically: after an error or a kill at any moment, a file is either complete or as it was before."""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError, describe_os_error, one_line

UNFINISHED = ".unfinished."  # prefix of the names of incomplete files


def prepare_output(path: Path) -> None:
    """Create the folder of an output file.

    A command calls this before its work, so that the work is not lost because the file cannot be written.

    Raises:
        UserError: the folder cannot be created, or `path` is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = describe_os_error(error)
        raise UserError(f"{path} cannot be written: its folder cannot be created ({reason})") from error
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder, give the name of a file")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of `path`, and rename it to `path` once it is complete and on the disk.

    Several processes, even on several machines, can write the same path at the same time; the last one wins.

    Raises:
        UserError: the file cannot be written.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}.{secrets.token_hex(8)}")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot sync a folder; the file itself is complete anyway
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # puts the new name on the disk
        finally:
            os.close(folder)


@contextmanager
def replacing_once_checked(path: Path) -> Iterator[tuple[Path, Callable[[object], str]]]:
    """Write one or several files into a temporary folder, and move them beside `path` if the block raises no error.

    After an error in the block the new files are deleted, and older ones are unchanged.

    Yields:
        The path to write: it has the same name, but lies in the temporary folder. And a function for messages, which
        replaces the temporary folder in a text by the folder of `path`. A UserError of the block passes through it.

    Raises:
        UserError: a file cannot be written or moved.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    with temporary as folder:

        def describe(message: object) -> str:
            return str(message).replace(f"{Path(folder)}{os.sep}", str(path).removesuffix(path.name))

        try:
            yield Path(folder, path.name), describe
        except UserError as error:
            raise UserError(describe(error)) from error
        try:
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, path.with_name(file.name))
        except OSError as error:
            raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError | RuntimeError) -> UserError:
    reason = describe_os_error(error) if isinstance(error, OSError) else one_line(error)
    return UserError(f"{path} cannot be written ({reason})")


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically, in UTF-8; file names in the text that are not UTF-8 get escapes.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))
