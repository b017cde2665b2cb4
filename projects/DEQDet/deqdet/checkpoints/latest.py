"""Which checkpoint of a training's folder to go on from: the last one, or the newest that is whole."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import describe_os_error
from .files import CheckpointError, read_torch, refuse_pickle

TAG = "last_checkpoint"  # the file that names the last one
# The names under which detectron2's PeriodicCheckpointer saves. The number is that of the iteration, from 0.
_NAME = re.compile(r"model_(\d{7,}|final)\.pth")


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    path: Path
    content: dict
    warnings: tuple[str, ...]  # why it is not simply the one that last_checkpoint names


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a training can go on from, by their names: model_final.pth, then from the newest on."""
    names = [(match[1], path) for path in _files(folder) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(names, key=lambda x: (x[0] == "final", x[0].zfill(20)), reverse=True)]


def has_checkpoint(folder: Path) -> bool:
    """Whether there is anything to resume from; `find_checkpoint` says whether it is whole."""
    return (folder / TAG).is_file() or bool(list_checkpoints(folder))


def find_checkpoint(folder: Path) -> Found | None:
    """Read the checkpoint that last_checkpoint names, or else the newest whole one.

    Returns:
        None if the folder has no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
    """
    warnings = []
    tagged = _read_tag(folder, warnings)
    candidates = list(dict.fromkeys([*([tagged] if tagged else []), *_newest_first(folder)]))
    for path in candidates:
        try:
            content = _read_whole(path)
        except CheckpointError as error:
            warnings.append(str(error))
            continue
        if path != tagged:
            warnings.append(f"continuing from {path}, the newest complete checkpoint")
        return Found(path, content, tuple(warnings))
    if not candidates:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} can be read ({'; '.join(warnings)}): start again with --overwrite "
        "or in another folder"
    )


def delete_older(folder: Path, count: int, iteration: int) -> None:
    """Delete checkpoints of a training, except the newest ones.

    Those stay that the file last_checkpoint names, that have no number (model_final.pth, model_best.pth), or that
    another training wrote beyond this iteration.

    Args:
        count: of the numbered checkpoints that stay, at least 1.
        iteration: where the training is.

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
    """The file that last_checkpoint names; what is wrong with it is added to `warnings`."""
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
    """As `list_checkpoints`, lazily; a model_final.pth of a shorter, earlier training comes at its place."""
    paths = list_checkpoints(folder)
    final = [path for path in paths if path.name == "model_final.pth"]
    numbered = [path for path in paths if path not in final]
    if final and numbered:
        newest = int(_NAME.fullmatch(numbered[0].name)[1])
        try:
            if read_torch(final[0]).get("iteration", newest) < newest:
                final, numbered = [], [*numbered, *final]
        except (CheckpointError, AttributeError):
            pass  # `find_checkpoint` says what is wrong with it
    yield from [*final, *numbered]


def _read_whole(path: Path) -> dict:
    refuse_pickle(str(path))
    content = read_torch(path)
    if not isinstance(content, dict) or not {"model", "trainer", "iteration"} <= content.keys():
        raise CheckpointError(f"{path} contains no training state")
    return content


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
