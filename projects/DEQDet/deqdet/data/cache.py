"""The folder that caches the results of data set checks.

It is the first of these that is writable: $DETECTRON2_DATASETS/.cache/deqdet if that variable names a folder;
$FVCORE_CACHE/deqdet, by default ~/.torch/fvcore_cache/deqdet; a folder for temporary files. It is safe to delete.
"""

import getpass
import json
import os
import tempfile
from pathlib import Path

from fvcore.common.file_io import get_cache_dir

from ..atomic import replacing
from ..errors import UserError, describe_os_error


def find_cache() -> Path:
    """Return the cache folder, and create it if necessary.

    Raises:
        UserError: none of the candidates is writable.
    """
    datasets = os.getenv("DETECTRON2_DATASETS")
    places = [Path(datasets, ".cache", "deqdet")] if datasets and os.path.isdir(datasets) else []
    places += [Path(get_cache_dir(), "deqdet"), Path(tempfile.gettempdir(), f"deqdet-{_user()}")]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as error:
            reason = describe_os_error(error)
    raise UserError(f"cannot write to {places[-1]} ({reason}): set FVCORE_CACHE to a folder that can be written to")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file to the cache, atomically, so that other processes never read an incomplete one.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replacing(path) as file:
            os.fchmod(file.fileno(), 0o644)  # other users may share the folder
            file.write(json.dumps(content).encode())
    except UserError as error:
        raise UserError(f"{error}: make room, or set FVCORE_CACHE to another folder") from error


def read_json(path: Path) -> dict | None:
    """Read a JSON file in the cache; None if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return str(os.getuid())
