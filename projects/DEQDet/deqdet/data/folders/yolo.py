"""Reads folders in YOLO format, as Ultralytics and Roboflow write it: a text file for each image, and data.yaml.

A line such as "2 0.5 0.5 0.1 0.2" has a class number, and the box's centre, width and height relative to those of the
image. data.yaml lists the classes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ...errors import UserError, one_line
from ..coco_file import ANY_SUFFIX, SOURCE
from ..image_headers import read_headers, read_stamps
from ..images import is_image
from .found import (
    SPLIT_FOLDERS,
    SPLITS,
    TEST,
    VAL,
    FolderData,
    FoundSet,
    list_folder,
    list_images,
    make_content,
    read_text,
)

LOOKED_FOR = "YOLO's (data.yaml, or images/ and labels/ with classes.txt)"
_LISTS_OF_CLASSES = ("classes.txt", "obj.names", "labels.txt")


def find_yolo_files(folder: Path) -> list[Path]:
    """Find the YAML files with class names in a folder, or else a list of classes next to or in a folder "labels"."""
    found = [path for path in list_folder(folder) if _is_setup(path)]
    if not found and (folder / "labels").is_dir() and (folder / "images").is_dir():
        places = [base / name for base in (folder, folder / "labels") for name in _LISTS_OF_CLASSES]
        if any(path.suffix == ".txt" for path in _walk_files(folder / "labels")):
            found = [path for path in places if path.is_file()][:1]
    return found


def read_yolo_folder(folder: Path) -> FolderData:
    """Read the label files of all splits; an image without one has no boxes, as in YOLO's own training.

    Invalid numbers, and classes that data.yaml lacks, are passed on to the check, which reports them.

    Raises:
        UserError: data.yaml is invalid or there are several, a folder that it names is missing, or no image has labels.
    """
    files = find_yolo_files(folder)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder} is ambiguous: {names} all have class names: keep only one of them")
    setup = _read_setup(files[0])
    images: dict[str, list[Path]] = {}
    for split in SPLITS:
        images[split] = _find_images(folder, setup, split)
    if not images["train"]:
        whole = list_images(folder / "images")
        images["train"] = whole if not images[VAL] else []
    if not images["train"]:
        raise UserError(
            f"{files[0]}: there is no image to train on: looked for {setup.entries.get('train') or 'train'} beside "
            "it, images/train and train/images"
        )
    remarks = []
    if images[VAL] == images["train"]:
        images[VAL] = []
        remarks.append(f"val is the same folder as train in {files[0]}, so it is not used")
    found = []
    for split in SPLITS:
        if images[split]:
            found.append(_read_set(files[0], split, images[split], setup.classes, remarks))
    return FolderData("yolo", tuple(found), tuple(remarks))


@dataclass(frozen=True)
class _Setup:
    """The contents of data.yaml."""

    file: Path
    classes: list[str]
    entries: dict[str, list[str]]  # the folders or lists of images of each split
    base: str  # its "path"


def _is_setup(path: Path) -> bool:
    """Return whether a file is named data.yaml, or is another YAML file with class names."""
    if path.suffix not in (".yaml", ".yml"):
        return False
    try:
        return path.stem == "data" or "names" in _load(path)
    except UserError:
        return False


def _load(path: Path) -> Mapping:
    try:
        loaded = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML with plain values ({one_line(error)})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a YAML mapping, as YOLO's data.yaml is")
    return loaded


def _read_setup(path: Path) -> _Setup:
    if path.suffix not in (".yaml", ".yml"):
        return _Setup(path, [line.strip() for line in read_text(path).splitlines() if line.strip()], {}, "")
    loaded = _load(path)
    classes = _read_names(path, loaded.get("names"))
    count = loaded.get("nc", len(classes))
    if count != len(classes):
        raise UserError(f"{path}: nc is {count!r}, but names has {len(classes)} classes: correct one of them")
    entries = {}
    for split in SPLITS:
        given = next((loaded[name] for name in SPLIT_FOLDERS[split] if loaded.get(name)), [])
        given = given if isinstance(given, list) else [given]
        if not all(isinstance(entry, str) for entry in given):
            raise UserError(f"{path}: {split} is {one_line(given)}: it must name a folder, or a list of them")
        entries[split] = given
    return _Setup(path, classes, entries, str(loaded.get("path") or ""))


def _read_names(path: Path, names: object) -> list[str]:
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{path}: the keys of names must be 0, 1, ..., {len(names) - 1}")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: names must list the classes, as [cat, dog] or {{0: cat, 1: dog}}")
    names = [str(name).strip() for name in names]
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"{path}: the classes in names must have different names that are not empty")
    return names


def _find_images(folder: Path, setup: _Setup, split: str) -> list[Path]:
    entries = setup.entries.get(split, [])
    if not entries:
        names = SPLIT_FOLDERS[split]
        usual = [folder / "images" / name for name in names] + [folder / name / "images" for name in names]
        return next((list_images(place) for place in usual if place.is_dir()), [])
    found = []
    for entry in entries:
        places = list(dict.fromkeys(_possible_places(setup, entry)))
        place = next((place for place in places if place.exists()), None)
        if place is None and split == TEST:  # Roboflow always names a test set, even if there is none
            continue
        if place is None:
            looked = ", ".join(map(str, places))
            raise UserError(f"{setup.file}: {split} names {entry}, which is not there (looked for {looked})")
        found += list_images(place) if place.is_dir() else _read_list(setup, place)
    return sorted(dict.fromkeys(found))


def _possible_places(setup: _Setup, entry: str) -> Iterator[Path]:
    """Yield the paths that an entry in data.yaml may mean.

    They are relative to the "path" in the file or to its folder, with and without the "../" that Roboflow writes.
    """
    here = setup.file.parent
    inside = entry
    while inside.startswith(("../", "./")):
        inside = inside.partition("/")[2]
    for name in (entry, inside):
        yield from (Path(os.path.normpath(here / base / name)) for base in (setup.base, "") if base or name)
    # "path" may be relative to Ultralytics' own data set folder instead of this one.
    yield Path(os.path.normpath(here / Path(entry).name))


def _read_list(setup: _Setup, path: Path) -> list[Path]:
    """Read the images that a text file lists, relative to the file or to data.yaml."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    found = []
    for line in lines:
        places = [Path(os.path.normpath(base / line)) for base in (path.parent, setup.file.parent / setup.base)]
        found.append(next((place for place in places if place.is_file()), places[0]))
    return found


def label_path(image: Path) -> Path:
    """Return YOLO's label path for an image: the last folder "images" in the path becomes "labels"."""
    parts = list(image.parent.parts)
    for i in reversed(range(len(parts))):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts, f"{image.stem}.txt")


def _label_file(image: Path) -> Path:
    """Return YOLO's label path, or if its folder does not exist, a path next to the image."""
    usual = label_path(image)
    return usual if usual.parent.is_dir() else image.with_suffix(".txt")


def _read_set(file: Path, split: str, images: Sequence[Path], classes: list[str], remarks: list[str]) -> FoundSet:
    labels = [_label_file(path) for path in images]
    there = [path.is_file() for path in labels]
    if split != TEST and not any(there):
        raise UserError(f"{file}: no image of {split} has a label file: the first one would be {labels[0]}")
    if not all(there):
        count = there.count(False)
        remarks.append(f"{split}: {count} of {len(images)} images have no label file, and therefore no boxes")
    images = [*images, *_find_lost_images(labels)]
    labels = [_label_file(path) for path in images]
    root = Path(os.path.commonpath([path.parent for path in images]))
    paths = [str(path) for path in images]
    headers = read_headers(paths, f"Reading the sizes of {split}'s images", {}, read_stamps(paths))
    records, annotations, polygons = [], [], 0
    for number, (path, label, header) in enumerate(zip(images, labels, headers, strict=True), 1):
        known = header.width > 0  # else the check reports the fault of the file
        records.append(
            {"file_name": path.relative_to(root).as_posix()}
            | ({"width": header.width, "height": header.height} if known else {})
            | ({SOURCE: str(label)} if label.is_file() else {})
        )
        scale = (header.width, header.height) if known else (1, 1)
        lines = read_text(label).splitlines() if label.is_file() else ()
        for line_number, line in enumerate(lines, 1):
            if words := line.split():
                annotation, polygon = _read_line(words, scale)
                annotations.append({"image_id": number, **annotation, SOURCE: f"line {line_number}"})
                polygons += polygon
    if polygons:
        remarks.append(f"{split}: {polygons} lines are outlines; the boxes around them are used")
    if split == TEST and not any(there):
        content = make_content(file, classes, records, [], first_class=0)
        del content["annotations"]
        return FoundSet(split, file, root, content)
    return FoundSet(split, file, root, make_content(file, classes, records, annotations, first_class=0))


def _find_lost_images(labels: Sequence[Path]) -> list[Path]:
    """Return a path that ends in ANY_SUFFIX for each label file without an image, so that the check reports it."""
    folders = {path.parent for path in labels}
    known = {*labels, *(folder / name for folder in folders for name in _LISTS_OF_CLASSES)}
    lost = []
    for place in sorted(folders):
        image_folder = _images_of(place)
        if image_folder == place:  # any text file may lie there
            continue
        stems = {path.stem for path in list_folder(image_folder) if is_image(path.name)}
        for path in list_folder(place):
            if path.suffix == ".txt" and path not in known:
                lost += [image_folder / f"{path.stem}{ANY_SUFFIX}"] * (path.stem not in stems)
    return lost


def _images_of(label_folder: Path) -> Path:
    parts = list(label_folder.parts)
    for i in reversed(range(len(parts))):
        if parts[i] == "labels":
            return Path(*parts[:i], "images", *parts[i + 1 :])
    return label_folder


def _read_line(words: Sequence[str], scale: tuple[int, int]) -> tuple[dict, bool]:
    """Parse a line into an annotation, which keeps words that are not numbers, and whether it is an outline."""
    try:
        label, *numbers = (float(word) for word in words)
    except ValueError:
        return {"category_id": _class_id(words[0]), "bbox": list(words[1:]), "iscrowd": 0}, False
    outline = len(numbers) >= 6 and len(numbers) % 2 == 0
    if outline:
        xs, ys = numbers[0::2], numbers[1::2]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
        box = [left, top, right - left, bottom - top]
    elif len(numbers) == 4:
        x, y, width, height = numbers
        box = [x - width / 2, y - height / 2, width, height]
    else:
        return {"category_id": _class_id(words[0]), "bbox": numbers, "iscrowd": 0}, False
    pixels = [box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]]
    return {"category_id": _class_id(label), "bbox": pixels, "area": pixels[2] * pixels[3], "iscrowd": 0}, outline


def _class_id(given: float | str) -> int | str:
    """Return a class number, which is also the class's id; any other value is passed on as a string, for the check."""
    try:
        value = float(given)
    except ValueError:
        return str(given)
    return int(value) if value.is_integer() else str(given)


def _walk_files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)
