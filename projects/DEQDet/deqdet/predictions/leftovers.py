"""Delete the output files of an earlier run, but no file that may have another origin."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import UserError, describe_os_error

_LABELS = re.compile(rb"(\d+( -?\d+\.\d{6}){5}\n)*")  # the format of write_yolo, which is unlikely elsewhere
_IMAGES = b'{"info": {}, "images": ['  # how write_coco's images.json begins


def delete_labels(folder: Path, kept: Collection[Path]) -> None:
    """Delete the labels of an earlier run, except the files `kept`, which this run overwrites.

    A file is deleted only if it is a *.txt file directly in the folder, is not a link, and has only lines in the format
    of write_yolo: a class and five numbers with six decimals. Training labels, which have no score, and lists of
    classes are kept. An empty file, as written for an image without detections, does not show its origin: it is deleted
    only if all other text files in the folder have that format and at least one of them is not empty.

    Raises:
        UserError: a file cannot be read or deleted.
    """
    try:
        files = [path for path in folder.glob("*.txt") if path.is_file() and not path.is_symlink()]
        texts = {path: path.read_bytes() for path in files}
        ours = {path for path, text in texts.items() if _LABELS.fullmatch(text)}
        spare_empty = len(ours) < len(texts) or not any(texts.values())
        for path in ours.difference(kept):
            if texts[path] or not spare_empty:
                path.unlink()
    except OSError as error:
        raise _undeletable(folder, error) from error


def refuse_foreign_labels(paths: Iterable[Path]) -> None:
    """Check that every label file which is about to be overwritten was written by write_yolo.

    Training labels are recognised because they have no scores.

    Raises:
        UserError: a file has another format, or cannot be read.
    """
    for path in paths:
        try:
            foreign = path.is_file() and not _LABELS.fullmatch(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({describe_os_error(error)})") from error
        if foreign:
            raise UserError(
                f"{path} was not written by this command, and may be a training label: move the folder {path.parent} "
                "and run the same command again, or choose another --output"
            )


def delete_images_file(path: Path, images_from: Path) -> None:
    """Delete the images.json of an earlier run, whose ids are not those of this run's predictions.

    A file that does not begin like that of write_coco is kept, and so is the file that this run takes its ids from.

    Raises:
        UserError: the file cannot be read or deleted.
    """
    try:
        if path.is_file() and not path.samefile(images_from) and path.read_bytes().startswith(_IMAGES):
            path.unlink()
    except OSError as error:
        raise _undeletable(path, error) from error


def _undeletable(path: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or path}, of an earlier run, cannot be deleted ({describe_os_error(error)})")
