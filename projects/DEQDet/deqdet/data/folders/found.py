"""What every reader of a folder returns, and how names of files and folders say which split they are."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, describe_os_error

TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {TRAIN: ("train", "training"), VAL: ("valid", "val", "validation"), TEST: ("test", "testing")}
IMAGE_FOLDERS = ("images", "JPEGImages", "Images", "imgs", "img")
# What Pillow reads and people label; other files in a folder of images are not looked at.
_SUFFIXES = frozenset((".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True)
class FoundSet:
    """One split of a folder."""

    split: str  # "train", "val" or "test"; "" where nothing says which
    source: Path  # the file or folder of the labels, for messages
    image_root: Path
    content: dict  # as a COCO file has it; what is wrong with it is left to the check, see `checking`


@dataclass(frozen=True)
class FolderData:
    """What a folder holds."""

    format: str  # "coco", "yolo" or "voc"
    sets: tuple[FoundSet, ...]  # of different splits
    remarks: tuple[str, ...] = ()  # what the user should know of how the folder was read, a line each

    def find(self, split: str) -> FoundSet | None:
        """The set of a split, None if there is none."""
        return next((found for found in self.sets if found.split == split), None)


def split_of(name: str) -> str:
    """The split that a name speaks of: "instances_val2017" of "val", "valid" too; "" for none."""
    for token in re.findall("[a-z]+", name.lower()):
        if token.startswith("train"):
            return TRAIN
        if token in ("val", "valid", "validation", "dev"):
            return VAL
        if token in ("test", "testing"):
            return TEST
    return ""


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders within one that have the name of a split.

    Raises:
        UserError: two of them stand for the same split.
    """
    found: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        there = [path for path in list_folder(folder) if path.is_dir() and path.name.lower() in names]
        if len(there) > 1:
            raise UserError(f"{folder} has both {' and '.join(path.name for path in there)}: leave one of them")
        if there:
            found[split] = there[0]
    return found


def refuse_same_split(folder: Path, found: Sequence[FoundSet]) -> None:
    """See that no two sets are of the same split.

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
    """The entries of a folder, sorted by name, without hidden ones; none if it is no folder.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({describe_os_error(error)})") from error


def list_images(folder: Path) -> list[Path]:
    """The files below a folder, at any depth, that are named as images; sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file is named as an image."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith(".")


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it cannot be read, or is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({describe_os_error(error)})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as such") from error


def make_content(
    source: Path, classes: Sequence[str], images: Iterable[dict], annotations: Iterable[dict], first_class: int = 1
) -> dict:
    """A COCO file's content, with images and annotations numbered from 1 in the order given.

    Args:
        images: records without an id.
        annotations: records without an id, whose image_id is the position of the image in `images`, from 1.
        first_class: the id of the first class; the others' follow.
    """
    return {
        "info": {"description": f"made of {source}"},
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, first_class)],
        "images": [{"id": i, **image} for i, image in enumerate(images, 1)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
    }
