"""Reads the boxes of a COCO-format file, repairs faults where possible, and reports all others.

Boxes are (x, y, width, height) in pixels, as COCO defines, unless DATASETS.BOX_FORMAT says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .coco_file import LARGEST_ID, SOURCE, Category, ImageRecord, look_up, read_id
from .findings import BROKEN, REMARK, REPAIRED, Findings

BOX_FORMATS = ("check", "xywh", "xyxy", "xywh_relative", "xyxy_relative")
_SMALLEST_SIDE = 1e-3  # pixels: narrower boxes may have zero area in float32 coordinates of an ordinary image
_TOLERANCE = 1.0  # pixels that a box may extend beyond its image, by rounding, before it is clipped
_LARGEST_AREA = 1e10  # square pixels: COCO's evaluation ignores larger objects
_LEFT_OUT = "correct the file, or set DATASETS.SKIP_BROKEN True to leave such annotations out"
_RENUMBERED = "the annotations are renumbered within the run"


@dataclass(frozen=True)
class Boxes:
    """The usable boxes of a file; row i of each array belongs to box i."""

    records: list[dict]  # the n annotations, as in the file
    image: np.ndarray  # (n,) int64, indices into the list of images
    category: np.ndarray  # (n,) int64, indices into the list of categories
    xywh: np.ndarray  # (n, 4) float64, pixels
    area: np.ndarray  # (n,) float64, square pixels
    crowd: np.ndarray  # (n,) bool

    def select(self, rows: np.ndarray) -> "Boxes":
        """Return the boxes that a mask (n,) selects."""
        records = [self.records[i] for i in np.flatnonzero(rows)]
        return Boxes(
            records, self.image[rows], self.category[rows], self.xywh[rows], self.area[rows], self.crowd[rows]
        )


def read_boxes(
    where: str,
    annotations: Sequence[object],
    images: Sequence[ImageRecord],
    sizes: np.ndarray,
    categories: Sequence[Category],
    findings: Findings,
    *,
    box_format: str,
) -> Boxes:
    """Read and check every annotation.

    Args:
        where: what to call the file in messages.
        annotations: the list "annotations" of the file.
        images, categories: those of the file.
        sizes: (number of images, 2) width and height of the images in pixels, 0 if unknown.
        findings: collects the faults; annotations with a fault of the level BROKEN are left out of the result.
        box_format: one of BOX_FORMATS.

    Raises:
        UserError: the boxes as a whole seem to be in another format.
    """
    columns = _read_records(annotations, images, categories, findings)
    numbers = np.array([columns.numbers]).reshape(-1, 4).astype(np.float64)
    image = np.array(columns.image, dtype=np.int64)
    extent = sizes[image] if len(image) else np.zeros((0, 2))  # (n, 2)
    if box_format == "check":
        refuse_other_formats(where, numbers, extent)
    elif box_format != "xywh":
        findings.add(REPAIRED, "box format", "the file", f"has boxes as {box_format}, as DATASETS.BOX_FORMAT says",
                     "they are converted")  # fmt: skip
    xywh = to_xywh(numbers, extent, box_format)
    boxes = Boxes(
        columns.records,
        image,
        np.array(columns.category, dtype=np.int64),
        xywh,
        np.array(columns.area, dtype=np.float64),
        np.array(columns.crowd, dtype=bool),
    )
    return _check_geometry(boxes, extent, images, findings)


def name_annotation(record: Mapping, image: ImageRecord | None = None, index: int | None = None) -> str:
    """Name an annotation in messages so that the user can find it, possibly in a label file that was converted.

    Args:
        image: the annotation's image; None if it is unknown.
        index: position in the file, which names an annotation without an id.
    """
    if image is not None and image.source and SOURCE in record:
        return f"{record[SOURCE]} of {image.source} (image {image.file_name})"
    number = repr(record["id"]) if "id" in record else "without an id" if index is None else f"number {index}"
    return f"annotation {number}" + (f" of {image.file_name}" if image is not None else "")


def to_xywh(numbers: np.ndarray, extent: np.ndarray, box_format: str) -> np.ndarray:
    """Convert boxes (n, 4) of any of BOX_FORMATS to (x, y, width, height) in pixels; extent (n, 2) is the image's."""
    boxes = numbers.copy()
    if box_format.endswith("_relative"):
        boxes *= np.tile(extent, 2)
    if box_format.startswith("xyxy"):
        boxes[:, 2:] -= boxes[:, :2]
    return boxes


def refuse_other_formats(where: str, numbers: np.ndarray, extent: np.ndarray) -> None:
    """Raise a UserError if the boxes (n, 4) look like corners (x1, y1, x2, y2) or like fractions of the image.

    Fractions: no number is above 1, although the images have more than 8 pixels per side; a file of boxes in pixels is
    never like that by chance. Corners: at least a fifth of the boxes leave their images if read as (x, y, width,
    height), whereas 99 in 100 lie within them if read as corners. If corners are mistaken for width and height, most
    random boxes leave their images.
    """
    known = (extent > 8).all(1) & np.isfinite(numbers).all(1)
    numbers, extent = numbers[known], extent[known]
    count = len(numbers)
    if count == 0:
        return
    if numbers.max() <= 1 + 1e-6 and numbers.min() >= 0:
        raise UserError(
            f"{where}: none of the numbers of {count} boxes is above 1, so they must be fractions of the image, not "
            "pixels: set DATASETS.BOX_FORMAT xywh_relative (x, y, width, height) or xyxy_relative (two corners)"
        )
    far = numbers[:, :2] + numbers[:, 2:]
    leaves = (far > extent + _TOLERANCE).any(1)
    fits = (numbers[:, 2:] > numbers[:, :2]).all(1) & (numbers[:, 2:] <= extent + _TOLERANCE).all(1)
    if leaves.mean() >= 0.2 and fits.mean() >= 0.99:
        raise UserError(
            f"{where}: the boxes look like two corners (x1, y1, x2, y2): read as COCO's (x, y, width, height), "
            f"{leaves.sum()} of {count} leave their images, and read as corners {fits.sum()} of {count} lie within: "
            "set DATASETS.BOX_FORMAT xyxy, or xywh if they are (x, y, width, height) nevertheless"
        )


@dataclass(frozen=True)
class _Columns:
    records: list[dict]
    image: list[int]
    category: list[int]
    numbers: list[list[float]]  # the four numbers of "bbox"
    area: list[float]  # NaN if the area of the box is to be used
    crowd: list[bool]


def _read_records(
    annotations: Sequence[object], images: Sequence[ImageRecord], categories: Sequence[Category], findings: Findings
) -> _Columns:
    by_image = {image.id: index for index, image in enumerate(images)}
    by_category = {category.id: index for index, category in enumerate(categories)}
    columns, seen = _Columns([], [], [], [], [], []), set()
    for index, record in enumerate(annotations):
        if not isinstance(record, dict):
            findings.add(BROKEN, "no record", f"annotation number {index}", "is not a JSON object", _LEFT_OUT)
            continue
        name = name_annotation(record, index=index)
        missing = [key for key in ("image_id", "category_id", "bbox") if key not in record]
        if missing:
            findings.add(BROKEN, "incomplete", name, f"has no {', '.join(missing)}", _LEFT_OUT)
            continue
        image = look_up(record["image_id"], by_image)
        if image is None:
            words = f'has image_id {record["image_id"]!r}, which "images" lacks'
            findings.add(BROKEN, "unknown image", name, words, _LEFT_OUT)
            continue
        name = name_annotation(record, images[image], index)
        category = look_up(record["category_id"], by_category)
        if category is None:
            words = f'has category_id {record["category_id"]!r}, which "categories" lacks'
            if SOURCE in record:
                words = f"has class {record['category_id']!r}, which the list of classes lacks"
            findings.add(BROKEN, "unknown category", name, words, _LEFT_OUT)
            continue
        box, crowd = _read_box(name, record["bbox"], findings), _read_crowd(name, record, findings)
        if box is None or crowd is None:
            continue
        _check_id(name, record, seen, findings)
        for key, known in (("image_id", images[image].id), ("category_id", categories[category].id)):
            if type(record[key]) is not type(known):
                words = f"has {key} {record[key]!r}, but the {key.removesuffix('_id')} has the id {known!r}"
                findings.add(REPAIRED, f"other type of {key}", name, words, "they are taken for the same")
        _check_segmentation(name, record.get("segmentation"), findings)
        columns.records.append(record)
        columns.image.append(image)
        columns.category.append(category)
        columns.numbers.append(box)
        columns.area.append(_read_area(name, record, findings))
        columns.crowd.append(crowd)
    return columns


def _read_box(name: str, given: object, findings: Findings) -> list[float] | None:
    """Return the four numbers of a box; None, with a finding, if there are no four numbers."""
    numbers = [read_number(value) for value in given] if isinstance(given, list) and len(given) == 4 else [None]
    if None in numbers:
        shown = repr(given) if len(repr(given)) < 100 else repr(given)[:97] + "..."
        words = f"has bbox {shown}, which must be four finite numbers (x, y, width, height)"
        findings.add(BROKEN, "no box", name, words, _LEFT_OUT)
        return None
    if any(isinstance(value, str) for value in given):
        findings.add(REPAIRED, "box in text", name, f"has bbox {given!r}, with text", "it is read as numbers")
    return numbers


def _read_crowd(name: str, record: Mapping, findings: Findings) -> bool | None:
    """Return whether an annotation is a crowd; None, with a finding, if its "iscrowd" cannot be interpreted."""
    given = record.get("iscrowd")
    if type(given) is int and given in (0, 1):
        return bool(given)
    if given is None:
        words = "has no iscrowd" if "iscrowd" not in record else "has iscrowd null"
        findings.add(REPAIRED, "no iscrowd", name, words, "it is taken for 0, a single object")
        return False
    text = str(given).strip().lower()
    if text in ("0", "0.0", "false", "1", "1.0", "true"):
        value = text in ("1", "1.0", "true")
        findings.add(REPAIRED, f"iscrowd {value}", name, f"has iscrowd {given!r}", f"it is read as {int(value)}")
        return value
    findings.add(BROKEN, "iscrowd", name, f"has iscrowd {given!r}, which must be 0 or 1", _LEFT_OUT)
    return None


def _read_area(name: str, record: Mapping, findings: Findings) -> float:
    """Return the area in square pixels; NaN, with a finding, if it is missing or invalid."""
    given = record.get("area")
    value = read_number(given)
    if value is not None and 0 <= value <= _LARGEST_AREA:
        if isinstance(given, str):
            findings.add(REPAIRED, "area in text", name, f"has area {given!r}, as text", "it is read as a number")
        return value
    words = f"has area {given!r}" if "area" in record else "has no area"
    findings.add(REPAIRED, "area", name, words, "the area of its box is used instead")
    return math.nan


def _check_id(name: str, record: Mapping, seen: set, findings: Findings) -> None:
    """Note an id that pycocotools cannot use: it reads 0 as "no match", and finds only one of two equal ids."""
    given = record.get("id")
    if type(given) is not int or not 0 < given < LARGEST_ID:
        words = "has no id" if "id" not in record else f"has id {given!r}, which pycocotools cannot use"
        findings.add(REPAIRED, "annotation id", name, words, _RENUMBERED)
        given = read_id(given)
    elif given in seen:
        findings.add(REPAIRED, "annotation id twice", name, "has the id of another annotation", _RENUMBERED)
    seen.add(given)


def _check_segmentation(name: str, given: object, findings: Findings) -> None:
    """Note an invalid segmentation; its box is used all the same, since only boxes are detected."""
    if given is None or given == [] or isinstance(given, dict):
        return
    if isinstance(given, list) and all(
        isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in given
    ):
        return
    words = "has a segmentation that is not a list of polygons with at least 3 points"
    findings.add(REMARK, "segmentation", name, words, "only the box is used")


def _check_geometry(boxes: Boxes, extent: np.ndarray, images: Sequence[ImageRecord], findings: Findings) -> Boxes:
    """Leave out boxes that are invalid or lie outside their image, and clip those that extend beyond it."""
    xywh, known = boxes.xywh, (extent > 0).all(1)
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]

    def note(rows: np.ndarray, level: str, kind: str, words: str, outcome: str) -> None:
        for i in np.flatnonzero(rows):
            record, image = boxes.records[i], images[boxes.image[i]]
            size = f"{extent[i, 0]:.0f} x {extent[i, 1]:.0f}"
            box = f"bbox {record['bbox']}"
            if SOURCE in record:
                box = f"the box [{', '.join(f'{side:.6g}' for side in xywh[i])}] (x, y, width, height) in pixels"
            findings.add(level, kind, name_annotation(record, image), f"has {box}, {words.format(size=size)}", outcome)

    negative = (xywh[:, 2:] < 0).any(1)
    note(negative, BROKEN, "negative side", "whose width or height is negative", _LEFT_OUT)
    # Beyond twice the image's size on any side, a coordinate such as 1e30 is an error, not an inaccuracy.
    huge = known & ~negative & ((low < -2 * extent) | (high > 3 * extent)).any(1)
    note(huge, BROKEN, "far outside", "which reaches far beyond its image of {size}", _LEFT_OUT)
    flat = ~negative & ~huge & (xywh[:, 2:] < _SMALLEST_SIDE).any(1)
    note(flat, REPAIRED, "no area", "which has no area", "it is left out")
    rest = ~(negative | huge | flat)
    outside = rest & known & ((high < _SMALLEST_SIDE) | (low > extent - _SMALLEST_SIDE)).any(1)
    note(outside, BROKEN, "outside", "which lies outside its image of {size}", _LEFT_OUT)
    rest &= ~outside
    leaves = rest & known & ((low < -_TOLERANCE) | (high > extent + _TOLERANCE)).any(1)
    note(leaves, REPAIRED, "leaves the image", "which leaves its image of {size}", "it is cut at the border")
    low = np.where(leaves[:, None], np.clip(low, 0, extent), low)
    high = np.where(leaves[:, None], np.clip(high, 0, extent), high)
    xywh = np.where(leaves[:, None], np.concatenate([low, high - low], 1), xywh)
    own = xywh[:, 2] * xywh[:, 3]
    area = np.where(np.isnan(boxes.area), own, boxes.area)
    area = np.where(leaves, np.minimum(area, own), area)
    return Boxes(boxes.records, boxes.image, boxes.category, xywh, area, boxes.crowd).select(rest)


def read_number(value: object) -> float | None:
    """Return a finite number, which may be given as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
