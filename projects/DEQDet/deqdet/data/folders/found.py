"""The result type of all folder readers, and the split that a file or folder name indicates."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, describe_os_error
from ..images import is_image

TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {TRAIN: ("train", "training"), VAL: ("valid", "val", "validation"), TEST: ("test", "testing")}
IMAGE_FOLDERS = ("images", "JPEGImages", "Images", "imgs", "img")


@dataclass(frozen=True)
class FoundSet:
    """One split of a folder."""

    split: str  # "train", "val" or "test"; "" if unknown
    source: Path  # the file or folder of the labels, for messages
    image_root: Path
    content: dict  # as in a COCO file, possibly with faults, which the check handles (see `checking`)


@dataclass(frozen=True)
class FolderData:
    """The contents of a folder."""

    format: str  # "coco", "yolo" or "voc"
    sets: tuple[FoundSet, ...]  # of different splits
    remarks: tuple[str, ...] = ()  # for the user, about how the folder was read; one line each

    def find(self, split: str) -> FoundSet | None:
        """Return the set of a split, or None."""
        return next((found for found in self.sets if found.split == split), None)


def split_of(name: str) -> str:
    """Return the split that a name contains: "val" for "instances_val2017" or "valid"; "" if there is none."""
    for token in re.findall("[a-z]+", name.lower()):
        if token.startswith("train"):
            return TRAIN
        if token in ("val", "valid", "validation", "dev"):
            return VAL
        if token in ("test", "testing"):
            return TEST
    return ""


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the subfolders that have the name of a split, by split.

    Raises:
        UserError: two of them are of the same split.
    """
    found: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        there = [path for path in list_folder(folder) if path.is_dir() and path.name.lower() in names]
        if len(there) > 1:
            raise UserError(f"{folder} has both {' and '.join(path.name for path in there)}: keep only one of them")
        if there:
            found[split] = there[0]
    return found


def refuse_same_split(folder: Path, found: Sequence[FoundSet]) -> None:
    """Check that no two sets are of the same split.

    Raises:
        UserError: two are; names them.
    """
    by_split: dict[str, FoundSet] = {}
    for each in found:
        if other := by_split.get(each.split):
            what = f"are both {each.split} sets" if each.split else "do not say by their names which is the train set"
            raise UserError(
                f"{folder} is ambiguous: {other.source} and {each.source} {what}: move one of them away, or rename "
                "them by their splits (train, val, test)"
            )
        by_split[each.split] = each


def list_folder(folder: Path) -> list[Path]:
    """List the entries of a folder, sorted by name, without hidden ones; none if it is not a folder.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({describe_os_error(error)})") from error


def list_images(folder: Path) -> list[Path]:
    """List the files with image suffixes at any depth below a folder, sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if is_image(name)]
    return sorted(found)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({describe_os_error(error)})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it in UTF-8") from error


def make_content(
    source: Path, classes: Sequence[str], images: Iterable[dict], annotations: Iterable[dict], first_class: int = 1
) -> dict:
    """Build the content of a COCO file, with images and annotations numbered from 1 in the given order.

    Args:
        source: the file or folder of the labels, for the description.
        classes: the class names.
        images: records without an id.
        annotations: records without an id, whose image_id is the position of the image in `images`, from 1.
        first_class: the id of the first class; the others' ids follow.
    """
    return {
        "info": {"description": f"made of {source}"},
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, first_class)],
        "images": [{"id": i, **image} for i, image in enumerate(images, 1)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
    }
