"""Deletes what an earlier run has left in the output folder, and nothing that may be somebody else's."""

import re
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError, describe_os_error

_LABELS = re.compile(rb"(\d+( -?\d+\.\d{6}){5}\n)*")  # what write_yolo writes, and hardly anybody else
_IMAGES = b'{"info": {}, "images": ['  # how write_coco's images.json begins


def delete_labels(folder: Path, kept: Collection[Path]) -> None:
    """Delete the labels of an earlier run, except the files `kept`, which this run writes anew.

    A file is deleted only if it is a *.txt file directly in the folder, no link, and each of its lines has the form of
    write_yolo: a class and five numbers with six decimals. Labels for training, which have no score, and lists of
    classes stay. An empty file, which an image without detections has, tells nothing about its origin: it is deleted
    only if all other text files of the folder have that form, and at least one of them is not empty.

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


def delete_images_file(path: Path, images_from: Path) -> None:
    """Delete the images.json of an earlier run, whose ids are not those of this run's predictions.

    A file that begins otherwise than write_coco's stays, and so does the file that this run has its ids from.

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
