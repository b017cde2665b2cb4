"""OUTPUT_DIR/data: the COCO files and the settings of a `--data` training, unchanged until another training begins.

A new run may still be refused after its files are written, for example because its weights do not fit. Until it begins,
its settings therefore lie next to the folder, in data.new.DIGEST. Its sets are written into the folder right away, but
under new names, so that their paths do not change later. All processes of a run write the same files, atomically.
"""

import filecmp
import hashlib
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..atomic import replacing, write_text
from ..errors import UserError, describe_os_error

logger = logging.getLogger(__name__)

FOLDER, CONFIG, FLAGS = "data", "config.yaml", "flags.json"  # the folder within OUTPUT_DIR, and its files
_NEW = f"{FOLDER}.new."  # prefix of the folders of trainings that have not begun
_SET = re.compile(r"(train|val|test)(-[0-9a-f]{8})?\.json")


def write_sets(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Copy COCO files into OUTPUT_DIR/data without changing any file of a training that has begun.

    A set is named after its split. If a training that has begun has a different file of this name, a digest of the
    contents is appended to the name.

    Args:
        files: the COCO files by split.

    Returns:
        The path of each copy, by split.

    Raises:
        UserError: the folder cannot be created or written.
    """
    _make(folder)
    begun, places = (folder / CONFIG).is_file(), {}
    for split, file in files.items():
        place = folder / f"{split}.json"
        if begun and place.is_file() and not filecmp.cmp(file, place, shallow=False):
            place = folder / f"{split}-{_digest(file)}.json"
        if not (place.is_file() and filecmp.cmp(file, place, shallow=False)):
            with file.open("rb") as source, replacing(place) as target:
                shutil.copyfileobj(source, target)
        places[split] = place
    return places


def write_settings(config: str, flags: str, folder: Path, *, at_once: bool) -> Path:
    """Write the settings of a run, and return its config file.

    Args:
        folder: OUTPUT_DIR/data.
        at_once: write them into the folder itself instead of leaving that to `put_in_place`.

    Raises:
        UserError: they cannot be written.
    """
    if not at_once:
        digest = hashlib.sha256(f"{config}\0{flags}".encode(errors="backslashreplace")).hexdigest()[:8]
        folder = folder.with_name(f"{_NEW}{digest}")
    _make(folder)
    write_text(flags, folder / FLAGS)
    write_text(config, folder / CONFIG)
    return folder / CONFIG


def put_in_place(config_file: Path, sets: Iterable[str]) -> None:
    """Move a run's settings into OUTPUT_DIR/data, and delete the files there that no training uses any more.

    These are the sets of the previous training, and the settings of runs that never began. If the config file is
    already in OUTPUT_DIR/data, as that of a resumed training is, nothing is done.

    Args:
        config_file: as returned by `write_settings`.
        sets: the COCO files of the run.

    Raises:
        UserError: a file cannot be written or deleted.
    """
    staged, folder, used = config_file.parent, config_file.parent.with_name(FOLDER), {Path(name) for name in sets}
    if staged.name == FOLDER:
        return
    try:
        texts = {name: (staged / name).read_text() for name in (FLAGS, CONFIG)}
    except FileNotFoundError:  # another machine, which shares the disk, has done it
        return
    try:
        (folder / FLAGS).unlink(missing_ok=True)  # first, so that they are never next to the config of another run
        write_text(texts[CONFIG], folder / CONFIG)
        write_text(texts[FLAGS], folder / FLAGS)
        for path in folder.iterdir():
            if _SET.fullmatch(path.name) and path.absolute() not in used:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be replaced ({describe_os_error(error)})") from error
    for path in folder.parent.glob(f"{_NEW}*"):
        shutil.rmtree(path, ignore_errors=True)


def follow_moved_sets(cfg: CfgNode, config_file: Path) -> None:
    """Point the config of a `--data` run to the COCO files of this run, even if its OUTPUT_DIR has been moved.

    The config contains absolute paths. After OUTPUT_DIR has been moved or renamed, nothing lies there any more, or the
    files of another run that has taken the old name.

    Args:
        cfg: changed in place.
        config_file: the file that `cfg` was read from. Only config.yaml in OUTPUT_DIR or OUTPUT_DIR/data has an effect.
    """
    parent = config_file.absolute().parent
    folder = parent if parent.name == FOLDER else parent / FOLDER
    if not (folder / FLAGS).is_file():
        return
    for entry in cfg.DATASETS.REGISTER:
        known = Path(entry[1])
        own = folder / known.name
        if known.parent.name == FOLDER and _SET.fullmatch(known.name) and known != own and own.is_file():
            logger.info("%s: %s is used in place of %s, since the folder has been moved", config_file, own, known)
            entry[1] = str(own)


class DataInPlace(HookBase):
    """Calls `put_in_place` when the training of a `--data` run begins, on each machine of the run."""

    def __init__(self, config_file: str):
        self._config_file = Path(config_file)

    def before_train(self) -> None:
        comm.synchronize()  # by then, rank 0 has deleted the training that --overwrite replaces
        if comm.get_local_rank() == 0:
            put_in_place(self._config_file, [entry[1] for entry in self.trainer.cfg.DATASETS.REGISTER])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder.parent} cannot be created ({describe_os_error(error)})") from error


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]
