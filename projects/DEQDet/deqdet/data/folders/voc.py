"""Reads folders in Pascal VOC format: an XML file for each image.

VOC counts pixels from 1, and the corners of a box are its first and last pixels. In coordinates that start at the
image's border, as COCO's do, the box (xmin, ymin, xmax, ymax) therefore extends from (xmin - 1, ymin - 1) to
(xmax, ymax). Some programs write such border coordinates themselves. If any box in a folder has a coordinate below 1,
the corners are taken to be border coordinates.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from ...errors import UserError, describe_os_error, one_line
from ..coco_file import SOURCE
from ..images import is_image
from .found import (
    IMAGE_FOLDERS,
    FolderData,
    FoundSet,
    list_folder,
    make_content,
    read_text,
    refuse_same_split,
    split_folders,
    split_of,
)
from .spelling import find_misspelt

LOOKED_FOR = "Pascal VOC's (*.xml in annotations/, Annotations/, train/, or beside the images)"
_XML_FOLDERS = ("Annotations", "annotations", "xmls", "xml", "labels")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find_voc_places(folder: Path) -> list[Path]:
    """Find the folders with XML files, for the whole folder, each split, or each year of a VOCdevkit."""
    bases = [folder, *split_folders(folder).values(), *_find_years(folder)]
    return [place for base in bases if (place := _find_xml_folder(base)) is not None]


def read_voc_folder(folder: Path) -> FolderData:
    """Read every XML file. The classes are the names that occur, in alphabetical order.

    Raises:
        UserError: a file is not XML in VOC format, or the folder has several years of VOC.
    """
    years = _find_years(folder)
    if len(years) > 1:
        names = " and ".join(year.name for year in years)
        raise UserError(f"{folder} is ambiguous: it holds {names}: give one of them, as in --data {years[0]}")
    base = years[0] if years else folder
    remarks: list[str] = []
    if _find_xml_folder(base) is not None:
        groups = {"": _read_place(base)}
        remarks += _note_unlabelled(base, groups[""], "")
        listed = _read_image_sets(base)
        if listed:
            groups = {split: _select(base, groups[""], stems) for split, stems in listed.items()}
    else:
        places = {split: place for split, place in split_folders(folder).items() if _find_xml_folder(place)}
        groups = {split: _read_place(place) for split, place in places.items()}
        for split, files in groups.items():
            remarks += _note_unlabelled(places[split], files, f"{split}: ")
    return _convert(folder, {split: files for split, files in groups.items() if files}, remarks)


@dataclass(frozen=True)
class _Labels:
    """The contents of an XML file."""

    path: Path
    image: Path  # may be missing
    size: tuple[int, int] | None
    objects: list[tuple[str, list[float] | list[str]]]  # class and corners; strings if these are not numbers
    difficult: int  # number of objects marked as difficult


def _convert(folder: Path, groups: dict[str, list[_Labels]], remarks: list[str]) -> FolderData:
    every = [labels for files in groups.values() for labels in files]
    classes = sorted({name for labels in every for name, _ in labels.objects})
    if not classes:
        raise UserError(f"{folder}: its {len(every)} XML files hold no object: there is nothing to train on")
    corners = [box for labels in every for _, box in labels.objects if all(isinstance(x, float) for x in box)]
    from_border = any(min(box) < 1 for box in corners if len(box) == 4)
    if from_border:
        remarks.append("a box has a coordinate below 1, so corners are read as borders counted from 0")
    difficult = sum(labels.difficult for labels in every)
    if difficult:
        remarks.append(f"{difficult} objects are marked as difficult, and are used like any other")
    remarks += _note_misspelt(every)
    found = []
    for split, files in groups.items():
        root = Path(os.path.commonpath([labels.image.parent for labels in files]))
        records, annotations = [], []
        for number, labels in enumerate(files, 1):
            size = dict(zip(("width", "height"), labels.size, strict=True)) if labels.size else {}
            records.append({"file_name": labels.image.relative_to(root).as_posix(), **size, SOURCE: str(labels.path)})
            for place, (name, box) in enumerate(labels.objects, 1):
                fields = _to_coco(box, 0 if from_border else 1) | {SOURCE: f"object {place}"}
                annotations.append({"image_id": number, "category_id": classes.index(name) + 1, **fields})
        source = files[0].path.parent
        found.append(FoundSet(split, source, root, make_content(source, classes, records, annotations)))
    refuse_same_split(folder, found)
    return FolderData("voc", tuple(found), tuple(remarks))


def _note_unlabelled(base: Path, files: Sequence[_Labels], prefix: str) -> Iterator[str]:
    """Remark on images without an XML file in the folders of images with one; `prefix` names the split."""
    used, stems = {labels.image for labels in files}, {labels.path.stem for labels in files}
    folders = {image.parent for image in used}
    images = [path for paths in _find_images(base).values() for path in paths if path.parent in folders]
    lost = sorted(path for path in images if path not in used and path.stem not in stems)
    if lost:
        which = f"{len(lost)} of {len(images)} images have no XML file (the first one is {lost[0]})"
        yield f"{prefix}{which}: they are not used"


def _note_misspelt(files: Sequence[_Labels]) -> Iterator[str]:
    """Remark on each class that is probably a misspelling of another one."""
    places: dict[str, list[Path]] = {}  # the files in which each class occurs
    for labels in files:
        for name in dict.fromkeys(name for name, _ in labels.objects):
            places.setdefault(name, []).append(labels.path)
    for name, right in find_misspelt({name: len(paths) for name, paths in places.items()}).items():
        where = " and ".join(map(str, places[name]))
        yield f"class {name!r} occurs only in {where}; is it {right!r}?"


def _to_coco(box: Sequence[float | str], first: int) -> dict:
    """Convert two corners into the fields of a COCO annotation; `first` is the number of an image's first pixel."""
    if len(box) != 4 or not all(isinstance(x, float) for x in box):
        return {"bbox": list(box), "iscrowd": 0}
    left, top, right, bottom = box[0] - first, box[1] - first, box[2], box[3]
    width, height = right - left, bottom - top
    return {"bbox": [left, top, width, height], "area": max(width, 0.0) * max(height, 0.0), "iscrowd": 0}


def _find_years(folder: Path) -> list[Path]:
    """Find the folders VOC2007, VOC2012, ... in a folder or its VOCdevkit."""
    places = [path for base in (folder, folder / "VOCdevkit") for path in list_folder(base)]
    return [path for path in places if path.name.startswith("VOC") and (path / "Annotations").is_dir()]


def _find_xml_folder(base: Path) -> Path | None:
    for place in (*(base / name for name in _XML_FOLDERS), base):
        if any(path.suffix.lower() == ".xml" for path in list_folder(place)):
            return place
    return None


def _read_place(base: Path) -> list[_Labels]:
    """Read all XML files that belong to a folder, sorted by image name."""
    xml_folder = _find_xml_folder(base)
    by_stem, usual = _find_images(base), _find_image_folders(base)[0]
    files = [path for path in list_folder(xml_folder) if path.suffix.lower() == ".xml"]
    found = [_read_file(path, by_stem, usual) for path in files]
    return sorted(found, key=lambda labels: labels.image)


def _find_image_folders(base: Path) -> list[Path]:
    """List the folders that may hold the images of the XML files in or below `base`, the likeliest first."""
    places = (*(base / name for name in IMAGE_FOLDERS), _find_xml_folder(base), base)
    return list(dict.fromkeys(place for place in places if place.is_dir()))


def _find_images(base: Path) -> dict[str, list[Path]]:
    """Return the images in the folders of `_find_image_folders`, by stem."""
    by_stem: dict[str, list[Path]] = {}
    for place in _find_image_folders(base):
        for path in list_folder(place):
            if is_image(path.name):
                by_stem.setdefault(path.stem, []).append(path)
    return by_stem


def _read_file(path: Path, by_stem: dict[str, list[Path]], image_folder: Path) -> _Labels:
    root = _parse(path)
    file_name = (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    # The XML file's own name comes first: "filename" is often outdated after a renaming.
    same = by_stem.get(path.stem) or by_stem.get(file_name.rpartition(".")[0]) or []
    image = next((x for x in same if x.name == file_name), same[0] if same else None)
    objects, difficult = [], 0
    for number, item in enumerate(root.iter("object"), 1):
        name, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        if not name or box is None:
            missing = "bndbox" if name else "name"
            raise UserError(f"{path}: object {number} has no {missing}: add it, or delete the object")
        objects.append((name, _read_corners([(box.findtext(key) or "").strip() for key in _CORNERS])))
        difficult += (item.findtext("difficult") or "").strip() == "1"
    image = image or image_folder / (file_name or f"{path.stem}.jpg")
    return _Labels(path, image, _read_size(root), objects, difficult)


class _PlainTree(ElementTree.TreeBuilder):
    """Builds the element tree of a file, but refuses a document type, whose entities could expand endlessly.

    Unlike a search in the bytes of the file, this works in any encoding.
    """

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def doctype(self, *declaration: str | None) -> None:
        """Refuse the file; the parser calls this where a document type begins, before any entity is defined."""
        raise UserError(f"{self._path} has a document type of its own, which VOC's files do not have: remove it")


def _parse(path: Path) -> ElementTree.Element:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({describe_os_error(error)})") from error
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_PlainTree(path)))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} is not valid XML ({one_line(error)}): correct or delete it") from error
    if root.tag != "annotation":
        raise UserError(f"{path} is not a Pascal VOC file: it begins with <{root.tag}>, not with <annotation>")
    return root


def _read_corners(texts: Sequence[str]) -> list[float] | list[str]:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return list(texts)
    return numbers if all(map(math.isfinite, numbers)) else list(texts)


def _read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Read width and height in pixels; None if they are missing or 0, as some programs write."""
    try:
        width, height = (int(float(root.findtext(f"size/{key}") or 0)) for key in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _read_image_sets(base: Path) -> dict[str, list[str]]:
    """Read the stems that ImageSets/Main lists for each split, without lists of one class such as cat_train.txt."""
    folder = base / "ImageSets" / "Main"
    named = {name: folder / f"{name}.txt" for name in ("train", "val", "test", "trainval")}
    there = {name: path for name, path in named.items() if path.is_file()}
    if "train" in there:
        there.pop("trainval", None)
    listed = {split_of(name): list(_read_stems(path)) for name, path in there.items()}
    return {split: stems for split, stems in listed.items() if stems}


def _read_stems(path: Path) -> Iterator[str]:
    yield from (line.split()[0] for line in read_text(path).splitlines() if line.strip())


def _select(base: Path, files: Sequence[_Labels], stems: Sequence[str]) -> list[_Labels]:
    by_stem = {labels.path.stem: labels for labels in files}
    lost = [stem for stem in stems if stem not in by_stem]
    # The test sets of VOC2007 and 2012 have no public labels.
    if lost and len(lost) < len(stems):
        raise UserError(f"{base}: ImageSets/Main lists {lost[0]}, but there is no {lost[0]}.xml")
    return sorted((by_stem[stem] for stem in dict.fromkeys(stems) if stem in by_stem), key=lambda x: x.image)
