"""Guards OUTPUT_DIR: only one training at a time uses it, and none mixes its files with another's."""

import argparse
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from detectron2.config import CfgNode

from ..atomic import UNFINISHED, write_text
from ..checkpoints.latest import list_files
from ..checkpoints.publish import AVERAGE
from ..errors import UserError, describe_os_error, list_first

logger = logging.getLogger(__name__)

LOCK, CONFIG = ".lock", "config.yaml"
# The files of a training that a later one would use or mix with its own. Not among them are logs and config.yaml,
# which a failed start leaves too, and the folder inference/, which an evaluation fills.
_RESULTS = re.compile(
    r"model_(\d{7,}|final|best)\.(pth|json|safetensors)|last_checkpoint|metrics\.json|runs\.json|events\.out\.tfevents\..*"
    r"|nonfinite_\d+(_rank\d+)?\.pth"
)
_FOREIGN = re.compile(r".*\.(pth|pt|pkl|safetensors)")  # weights under other names
# The files that evaluations write into inference/ and ema/inference/, or into a subfolder for each data set.
_DETECTIONS = re.compile(r"coco_instances_results\.json|instances_predictions\.pth")

_locks: dict[str, int] = {}  # folder: file descriptor; the lock ends with the process, however that ends
_overwritten: set[str] = set()  # folders whose old training is deleted when this process's training begins
_configs: dict[str, str] = {}  # folder: the text of config.yaml to write when the training begins


def check_folder(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check that a training may write into OUTPUT_DIR.

    Raises:
        UserError: the folder holds another training's results, or weights, and neither --resume nor --overwrite is
            given; names some of the files. Or both flags are given, or --overwrite would delete MODEL.WEIGHTS or the
            file of --init.
    """
    if args.eval_only:
        return
    if args.resume and args.overwrite:
        raise UserError("--resume continues a training, --overwrite deletes it: give only one of them")
    folder = Path(cfg.OUTPUT_DIR)
    results = find_results(folder)
    if args.overwrite:
        for what, name in (("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS), ("--init", getattr(args, "init", None))):
            weights = Path((name or "").split("?")[0])  # detectron2's ?matching_heuristics=True
            if name and any(weights.resolve() == path.resolve() for path in results):
                raise UserError(f"--overwrite would delete {what} {weights}: choose another OUTPUT_DIR")
        return
    if args.resume:
        return
    if found := _name_files([*results, *_find_foreign(folder)]):
        raise UserError(
            f"OUTPUT_DIR {folder} already contains a training ({list_first(found)}): --resume continues it, "
            "--overwrite deletes it, or choose another folder"
        )


def refuse_folder_in_use(folder: Path) -> None:
    """Check that no training in another process has locked the folder, without locking it.

    Raises:
        UserError: it is locked.
    """
    path = folder / LOCK
    if not path.is_file() or str(folder.resolve()) in _locks:
        return
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: all processes of a run may check at once
    except BlockingIOError as error:
        raise _in_use(folder, path.read_text(errors="replace")) from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): make sure that no other training uses it", folder, error.strerror)


def claim_folder(folder: Path, *, overwrite: bool) -> None:
    """Lock the folder for this process, and delete incomplete files of a killed training.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        folder: OUTPUT_DIR.
        overwrite: let `begin_training` delete the training in the folder.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    key = str(folder.resolve())
    if key not in _locks:
        _locks[key] = _lock(folder)
    try:
        for path in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise _cannot_delete(error) from error
    _configs.pop(key, None)
    if overwrite:
        _overwritten.add(key)
    else:
        _overwritten.discard(key)


def hold_config(folder: Path, text: str) -> None:
    """Keep the text of config.yaml until `begin_training`, since the folder still has that of another training."""
    _configs[str(folder.resolve())] = text


def begin_training(folder: Path, *, resumed: bool) -> None:
    """Carry out the changes to OUTPUT_DIR that were deferred while the new training could still be refused.

    If the folder was claimed with `overwrite`, the old training and its detections are deleted; then the config.yaml of
    `hold_config` is written. If a config, a data set or weights turn out to be wrong before that, the folder is
    unchanged.

    A folder that was not claimed, as in a script that calls Trainer itself, may hold a training only if it is resumed.

    Raises:
        UserError: a file cannot be deleted or written; or the folder was not claimed, and it is in use by another
            process or holds a training that is not resumed.
    """
    key = str(folder.resolve())
    if key not in _locks:
        refuse_folder_in_use(folder)
        if not resumed and (found := _name_files(find_results(folder))):
            raise UserError(
                f"OUTPUT_DIR {folder} already contains a training ({list_first(found)}): resume_or_load(resume=True) "
                "continues it; else delete these files, or choose another folder"
            )
    if key in _overwritten:
        _delete_training(folder)
        _overwritten.remove(key)
    if key in _configs:
        write_text(_configs.pop(key), folder / CONFIG)


def _delete_training(folder: Path) -> None:
    results, detections = find_results(folder), _find_detections(folder)
    try:
        for path in (*results, *detections):
            path.unlink()
    except OSError as error:
        raise _cannot_delete(error) from error
    if results or detections:
        names = ", ".join(str(path.relative_to(folder)) for path in (*results, *detections))
        logger.warning("--overwrite: deleted %s in %s", names, folder)


def find_results(folder: Path) -> list[Path]:
    """Return the files of a training in a folder, sorted by name: checkpoints, models, metrics."""
    return sorted(path for path in list_files(folder) if _RESULTS.fullmatch(path.name))


def _name_files(paths: Sequence[Path]) -> list[str]:
    """Return the names of files, each once, without those that a failed start leaves: empty ones, and events."""
    names = dict.fromkeys(path.name for path in paths if path.stat().st_size > 0)
    return [name for name in names if not name.startswith("events.")]


def has_other_test_sets(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder holds a training whose config.yaml names other test sets than these.

    Its metrics.json and the detections directly in inference/ then belong to those other sets.
    """
    try:
        known = yaml.safe_load((folder / CONFIG).read_text())["DATASETS"]["TEST"]
        return bool(find_results(folder)) and list(known) != list(names)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False


def _find_foreign(folder: Path) -> list[Path]:
    return [
        path for path in list_files(folder) if _FOREIGN.fullmatch(path.name) and not path.name.startswith(UNFINISHED)
    ]


def _find_detections(folder: Path) -> list[Path]:
    """Return the detection files that the evaluations of a training wrote, also those of averaged weights."""
    places = [folder / "inference", folder / AVERAGE / "inference"]
    return [path for place in places for path in sorted(place.rglob("*")) if _DETECTIONS.fullmatch(path.name)]


def _cannot_delete(error: OSError) -> UserError:
    return UserError(f"{error.filename} cannot be deleted ({describe_os_error(error)})")


def _lock(folder: Path) -> int:
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({describe_os_error(error)}): choose another OUTPUT_DIR") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 64).decode(errors="replace")
        os.close(descriptor)
        raise _in_use(folder, holder) from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): make sure that no other training uses it", folder, error.strerror)
        return descriptor
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{path} cannot be written ({describe_os_error(error)}): choose another OUTPUT_DIR") from error
    return descriptor


def _in_use(folder: Path, holder: str) -> UserError:
    return UserError(
        f"OUTPUT_DIR {folder} is in use by another training (process {holder.strip() or 'unknown'}): wait until it "
        "ends, or choose another folder"
    )


def _close_in_child() -> None:
    # Dataloader workers are forked; with a copy of the descriptor, they would keep the lock alive.
    for descriptor in _locks.values():
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_in_child)
