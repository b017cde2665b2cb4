"""Writes folders in COCO and YOLO format, from the result of `read_folder`."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from ...errors import UserError, describe_os_error
from ..coco_file import SOURCE, lies_below
from .found import FolderData, FoundSet
from .yolo import label_path


def write_coco_folder(data: FolderData, folder: Path) -> None:
    """Write annotations/instances_SPLIT.json, and copy the images to images/SPLIT.

    Args:
        folder: the folder to create; it must not exist.

    Raises:
        UserError: the folder exists, an image is missing or its name leads out of the images' folder, or a file cannot
            be written.
    """
    _make(folder)
    for found in data.sets:
        split = found.split or "all"
        _copy_images(found, folder / "images" / split)
        content = found.content if data.format == "coco" else _without_sources(found.content)
        _write(folder / "annotations" / f"instances_{split}.json", json.dumps(content))


def write_yolo_folder(data: FolderData, folder: Path) -> None:
    """Write data.yaml, and for each image a copy in images/SPLIT and a label file, possibly empty, in labels/SPLIT.

    Crowds are left out, since YOLO has none. A set of unknown split becomes the train set.

    Args:
        folder: the folder to create; it must not exist.

    Raises:
        UserError: the folder exists, an image or its size is missing or its name leads out of the images' folder, or a
            file cannot be written.
    """
    _make(folder)
    categories = sorted(data.sets[0].content["categories"], key=lambda record: record["id"])
    setup = {"path": ".", "names": {i: record["name"] for i, record in enumerate(categories)}}
    for found in data.sets:
        split = found.split or "train"
        setup[split] = f"images/{split}"
        _copy_images(found, folder / "images" / split)
        for name, lines in _label_lines(found, {record["id"]: i for i, record in enumerate(categories)}):
            _write(label_path(folder / "images" / split / name), "".join(lines))
    _write(folder / "data.yaml", yaml.safe_dump(setup, sort_keys=False))


def _without_sources(content: dict) -> dict:
    """Return a COCO file's content without references to the label files from which it was made."""
    plain = dict(content)
    for key in content.keys() & {"images", "annotations"}:
        plain[key] = [{name: value for name, value in x.items() if name != SOURCE} for x in content[key]]
    return plain


def _label_lines(found: FoundSet, numbers: dict[int, int]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each image and its label lines; 12 digits keep a box accurate to 1e-8 pixels."""
    by_image: dict[int, list[dict]] = {}
    for annotation in found.content.get("annotations", ()):
        if not annotation.get("iscrowd"):
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    for image in found.content["images"]:
        width, height = image.get("width"), image.get("height")
        if not width or not height:
            raise UserError(f"{found.source}: image {image['file_name']} has no width and height")
        lines = []
        for annotation in by_image.get(image["id"], ()):
            x, y, w, h = annotation["bbox"]
            values = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            label = numbers[annotation["category_id"]]
            lines.append(f"{label} {' '.join(f'{value:.12g}' for value in values)}\n")
        yield image["file_name"], lines


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({describe_os_error(error)}): give a new folder") from error


def _copy_images(found: FoundSet, folder: Path) -> None:
    for image in found.content["images"]:
        name = image["file_name"]
        # The name is from an annotation file of unknown origin: "../../setup.py" must not be written.
        for root in (found.image_root, folder):
            if not lies_below(root / name, root):
                raise UserError(f"{found.source}: an image has file_name {name!r}, which leaves {root}: correct it")
    for image in found.content["images"]:
        target = folder / image["file_name"]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.image_root / image["file_name"], target)
        except OSError as error:
            raise UserError(f"{error.filename or target} cannot be copied ({describe_os_error(error)})") from error


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({describe_os_error(error)})") from error
