"""Finds the checkpoint from which a training is resumed: the last one, or else the newest that is intact."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..errors import describe_os_error
from .files import CheckpointError, read_torch, refuse_pickle

TAG = "last_checkpoint"  # the file with the name of the last checkpoint
# The file names of detectron2's PeriodicCheckpointer. The number is that of the iteration, from 0.
_NAME = re.compile(r"model_(\d{7,}|final)\.pth")


@dataclass(frozen=True)
class Found:
    """An intact checkpoint."""

    path: Path
    content: dict
    warnings: tuple[str, ...]  # the reasons if it is not the one that last_checkpoint names


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that a training can resume from: model_final.pth, then the numbered ones, newest first."""
    names = [(match[1], path) for path in list_files(folder) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(names, key=lambda x: (x[0] == "final", x[0].zfill(20)), reverse=True)]


def has_checkpoint(folder: Path) -> bool:
    """Return whether there is any checkpoint to resume from, intact or not (see `find_checkpoint`)."""
    return (folder / TAG).is_file() or bool(list_checkpoints(folder))


def find_checkpoint(folder: Path) -> Found | None:
    """Read the checkpoint that last_checkpoint names, or else the newest intact one.

    Returns:
        The checkpoint; None if the folder has none at all.

    Raises:
        CheckpointError: there are checkpoints, but none of them is intact.
    """
    warnings = []
    tagged = _read_tag(folder, warnings)
    if tagged is None and not list_checkpoints(folder):
        return None
    for path in chain([tagged] if tagged else [], (path for path in _newest_first(folder) if path != tagged)):
        try:
            content = _read_whole(path)
        except CheckpointError as error:
            warnings.append(str(error))
            continue
        if path != tagged:
            warnings.append(f"continuing from {path}, the newest complete checkpoint")
        return Found(path, content, tuple(warnings))
    raise CheckpointError(
        f"no checkpoint in {folder} can be read ({'; '.join(warnings)}): start again with --overwrite "
        "or in another folder"
    )


def delete_older(folder: Path, count: int, iteration: int) -> None:
    """Delete all but the newest numbered checkpoints of a training.

    Three kinds of checkpoints are never deleted: the one that last_checkpoint names, those without a number
    (model_final.pth, model_best.pth), and those that another training wrote after a later iteration than this one.

    Args:
        folder: OUTPUT_DIR.
        count: number of numbered checkpoints to keep, at least 1.
        iteration: the current iteration.

    Raises:
        OSError: a file cannot be deleted.
    """
    tagged = _read_tag(folder, [])
    numbered = [path for path in list_checkpoints(folder) if path.name != "model_final.pth"]
    reached = [path for path in numbered if int(_NAME.fullmatch(path.name)[1]) <= iteration]
    for path in reached[count:]:
        if path != tagged:
            path.unlink()


def _read_tag(folder: Path, warnings: list[str]) -> Path | None:
    """Return the file that last_checkpoint names, or None; problems with it are added to `warnings`."""
    tag = folder / TAG
    try:
        name = tag.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        if list_checkpoints(folder):
            warnings.append(f"{tag} is missing")
        return None
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        reason = describe_os_error(error) if isinstance(error, OSError) else "it is not text"
        warnings.append(f"{tag} cannot be read ({reason})")
        return None
    if not name or "/" in name or "\0" in name:
        warnings.append(f"{tag} names no checkpoint" if name else f"{tag} is empty")
        return None
    if not (folder / name).is_file():
        warnings.append(f"{tag} names {name}, which is missing")
        return None
    return folder / name


def _newest_first(folder: Path) -> Iterator[Path]:
    """Yield the files of `list_checkpoints`, but with a model_final.pth of an earlier, shorter training last."""
    paths = list_checkpoints(folder)
    final = [path for path in paths if path.name == "model_final.pth"]
    numbered = [path for path in paths if path not in final]
    if final and numbered:
        newest = int(_NAME.fullmatch(numbered[0].name)[1])
        try:
            if read_torch(final[0]).get("iteration", newest) < newest:
                final, numbered = [], [*numbered, *final]
        except (CheckpointError, AttributeError):
            pass  # `find_checkpoint` reports the problem
    yield from [*final, *numbered]


def _read_whole(path: Path) -> dict:
    refuse_pickle(str(path))
    content = read_torch(path)
    if not isinstance(content, dict) or not {"model", "trainer", "iteration"} <= content.keys():
        raise CheckpointError(f"{path} contains no training state")
    return content


def list_files(folder: Path) -> list[Path]:
    """List the files directly in a folder; none if it does not exist."""
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
