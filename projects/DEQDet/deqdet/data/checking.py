"""Checks a data set in COCO's format before the first iteration. Repairs go into a copy of the annotation file.

    checked = check_coco_file("my set", "train.json", "images", CheckOptions())

Training, evaluation and deqdet-check-data all use this function. Its result is cached (see cache.py) for as long as the
file's contents, the options, and the size and modification time of every image stay the same.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import PIL
from iopath.common.file_io import file_lock

from ..errors import UserError, list_first
from .annotations import Boxes, read_boxes
from .cache import find_cache, read_json, write_json
from .coco_file import ANY_SUFFIX, LARGEST_ID, Category, ImageRecord, parse, read_bytes, read_categories, read_images
from .findings import BROKEN, REMARK, REPAIRED, Finding, Findings
from .image_headers import MISSING, ImageHeader, Stamp, read_headers, read_stamps
from .images import IMAGE_SUFFIXES
from .report import Report, summarize

_VERSION = f"5, Pillow {PIL.__version__}"  # raise the number when the checks or their messages change
_SKIP = "replace the image or correct the file, or set DATASETS.SKIP_BROKEN True to leave such images out"


@dataclass(frozen=True)
class CheckOptions:
    """What a check accepts; see the config keys of the same names."""

    skip_broken: bool = False  # leave out unusable images and annotations instead of refusing the set
    allow_outside_root: bool = False
    max_image_pixels: int = 100_000_000
    max_side: int = 0  # pixels: the loaders shrink an image until its longer side fits this; 0: they do not resize
    box_format: str = "check"  # one of annotations.BOX_FORMATS
    num_queries: int = 0  # remark on images with more boxes than this; 0: no limit
    check_images: bool = True  # False: check only the annotation file, since this package has drawn the images
    trained: bool = False  # the set is for training, so it needs boxes
    unlabelled_allowed: bool = True  # accept a file without annotations, for predictions without AP


@dataclass(frozen=True)
class CheckedSet:
    """A data set that passed the check."""

    json_file: str  # the file itself, or the repaired copy
    category_ids: tuple[int, ...]  # in json_file, ascending, which is the model's order
    class_names: tuple[str, ...]  # in the model's order
    labelled: bool  # False: without labels, so there is no AP
    findings: tuple[Finding, ...]
    report: Report
    fingerprints: dict[str, str]  # of the usable images by path (see `ImageHeader`); empty if images are not checked
    from_cache: bool = False


def check_coco_file(
    where: str,
    json_file: str,
    image_root: str,
    options: CheckOptions,
    *,
    class_names: Sequence[str] = (),
    model: str = "",
) -> CheckedSet:
    """Check a data set, and repair what can be repaired.

    Args:
        where: what to call the file in messages.
        json_file: the annotation file.
        image_root: the folder of the images.
        options: what to accept.
        class_names: the model's classes in order; the file's classes are matched to them by name. Empty: the file's
            own classes, ordered by id.
        model: where the model's classes come from, for messages.

    Raises:
        UserError: the set cannot be used. The message names the image or annotation and says what to do.
    """
    content = read_bytes(where, json_file)
    cache = find_cache()
    root = os.path.abspath(image_root)
    key = _digest(_VERSION, content, root)
    # If several processes get here at once, one of them checks, and the others find its result.
    with file_lock(str(cache / f"{key}.check")) if options.check_images else nullcontext():
        result_file = cache / f"{key[:32]}-{_digest(asdict(options), list(class_names), image_root)[:16]}.json"
        result = _remembered(result_file, json_file)
        if result is not None:
            return result
        check = _Check(where, image_root, options, cache / f"{key}-headers.json")
        return check.run(json_file, content, result_file, list(class_names), model)


class _Check:
    """One run of the check: the state that its steps share."""

    def __init__(self, where: str, image_root: str, options: CheckOptions, headers_file: Path):
        self.where, self.image_root, self.options = where, image_root, options
        self.headers_file, self.findings = headers_file, Findings()

    def run(
        self, json_file: str, content: bytes, result_file: Path, class_names: list[str], model: str
    ) -> CheckedSet:
        """Run all steps (see check_coco_file)."""
        options = self.options
        if not os.path.isdir(self.image_root):
            raise UserError(
                f"{self.where}: its image root {self.image_root} is not a directory: correct the image root, the "
                "entry's third string"
            )
        whole = parse(self.where, content, self.findings, annotated=not options.unlabelled_allowed)
        categories = read_categories(self.where, whole, self.findings)
        order = compare_classes(self.where, [category.name for category in categories], class_names, model)
        images = read_images(
            self.where, whole, self.image_root, self.findings, allow_outside_root=options.allow_outside_root
        )
        stamps, headers, usable, sizes = self._check_images(images)
        labelled = bool(whole.get("annotations"))
        boxes = read_boxes(
            self.where,
            whole.get("annotations", []),
            images,
            sizes,
            categories,
            self.findings,
            box_format=options.box_format,
        )
        boxes = boxes.select(usable[boxes.image])
        if labelled:
            self._note_crowded_images(boxes, images)
        self._refuse_broken(usable)
        labelled = self._check_labels(boxes, labelled)
        report = summarize(boxes, sizes, usable, [categories[i].name for i in order], order)
        if order != sorted(order):
            words = f"lists the classes in another order than {model}"
            self.findings.add(REPAIRED, "order", "the file", words, "they are matched by name")
        category_ids = [categories[i].id for i in order]
        changed = any(finding.level in (BROKEN, REPAIRED) for finding in self.findings.all())
        copied = changed or ("annotations" in whole) != labelled
        if copied:
            copy = _normalized(whole, images, usable, sizes, categories, order, boxes if labelled else None)
            json_file = str(result_file.with_name(f"{Path(json_file).stem[:40]}-{result_file.stem}.copy.json"))
            write_json(Path(json_file), copy)
            category_ids = [category["id"] for category in copy["categories"]]
        names = tuple(categories[i].name for i in order)
        paths = [image.path for image in images] if options.check_images else []
        marks = {path: header.fingerprint for path, header, use in zip(paths, headers, usable, strict=False) if use}
        result = CheckedSet(json_file, tuple(category_ids), names, labelled, tuple(self.findings.all()), report, marks)
        _remember(result_file, result, paths, stamps, copied=copied)
        return result

    def _check_images(
        self, images: Sequence[ImageRecord]
    ) -> tuple[list[Stamp], list[ImageHeader], np.ndarray, np.ndarray]:
        """Return the n image files' stamps and headers, a mask of usable images (n,), and widths and heights (n, 2)."""
        sizes = np.array([(image.width or 0, image.height or 0) for image in images], dtype=np.int64)
        usable = np.ones(len(images), dtype=bool)
        if not self.options.check_images:
            return [], [], usable, sizes
        paths = [image.path for image in images]
        stamps = read_stamps(paths)
        headers = read_headers(paths, f"Checking images of {self.where}", _load_headers(self.headers_file), stamps)
        write_json(
            self.headers_file,
            {
                path: [stamp.size, stamp.modified, *asdict(header).values()]
                for path, stamp, header in zip(paths, stamps, headers, strict=True)
            },
        )
        if all(header.problem.startswith(MISSING) for header in headers):
            raise UserError(
                f"{self.where}: none of its {len(images)} images exists, the first one would be {paths[0]}: correct "
                "the image root"
            )
        for i, (image, header) in enumerate(zip(images, headers, strict=True)):
            fault = self._find_fault(image, header)
            if fault:
                usable[i] = False
                self.findings.add(BROKEN, *fault, _SKIP)
            sizes[i] = header.width or sizes[i, 0], header.height or sizes[i, 1]
        return stamps, headers, usable, sizes

    def _find_fault(self, image: ImageRecord, header: ImageHeader) -> tuple[str, str, str] | None:
        """Return the kind, name and words of a finding if an image cannot be used; None if it can."""
        name = image.title
        if image.source and image.file_name.endswith(ANY_SUFFIX) and header.problem.startswith(MISSING):
            folder, stem = os.path.split(image.path.removesuffix(ANY_SUFFIX))
            words = f"has no image: {folder} holds no {stem} with one of the endings {', '.join(IMAGE_SUFFIXES)}"
            return "label file without an image", f"label file {image.source}", words
        if header.problem:
            return header.problem.split(":")[0], name, header.problem
        limit = self.options.max_image_pixels
        shown = f"{header.width} x {header.height}"
        if header.width * header.height > limit:
            words = f"has {shown} pixels, more than INPUT.MAX_IMAGE_PIXELS {limit}"
            return "too large", name, words
        shorter, longer = sorted((header.width, header.height))
        if 2 * shorter * self.options.max_side < longer and self.options.max_side:
            words = f"has {shown} pixels; resized to {self.options.max_side} pixels, its shorter side would vanish"
            return "too elongated", name, words
        given = image.width or header.width, image.height or header.height
        if given == (header.width, header.height):
            return None
        words = f"is {shown} pixels, but {image.source or 'the annotation file'} says {given[0]} x {given[1]}"
        if given == (header.height, header.width):
            cause = (
                f"its EXIF orientation {header.orientation} turns it"
                if header.orientation >= 5
                else "most likely its EXIF orientation was removed or applied"
            )
            words += f" (width and height are exchanged: {cause}, so the boxes may be those of the turned image)"
        return "other size", name, words

    def _note_crowded_images(self, boxes: Boxes, images: Sequence[ImageRecord]) -> None:
        limit = self.options.num_queries
        counts = np.bincount(boxes.image[~boxes.crowd], minlength=len(images))
        for i in np.argsort(-counts, kind="stable") if limit else ():
            if counts[i] <= limit:
                break
            words = f"has {counts[i]} boxes, more than the model's {limit} queries"
            outcome = "not all of them can be found: raise MODEL.DEQDET.NUM_QUERIES"
            self.findings.add(REMARK, "more boxes than queries", images[i].title, words, outcome)

    def _refuse_broken(self, usable: np.ndarray) -> None:
        broken = self.findings.of_level(BROKEN)
        if broken and not self.options.skip_broken:
            others = ", ".join(f"{finding.count} x {finding.kind}" for finding in broken[1:])
            more = f" (there are other faults too, {others}; deqdet-check-data lists all)" if others else ""
            raise UserError(f"{self.where}: {broken[0].line()}{more}")
        if not usable.any():
            raise UserError(f"{self.where}: none of its {len(usable)} images can be used: {broken[0].facts()}")

    def _check_labels(self, boxes: Boxes, labelled: bool) -> bool:
        """Return whether the set can be evaluated.

        Raises:
            UserError: there is no box to train on.
        """
        if (~boxes.crowd).any():
            return True
        if self.options.trained:
            raise UserError(f"{self.where} has no box to train on: give a file with annotations")
        words = "has no box" if labelled else "has no annotations"
        self.findings.add(REMARK, "unlabelled", "the file", words, "predictions are written, but no AP is computed")
        return False


def compare_classes(where: str, names: Sequence[str], class_names: Sequence[str], model: str) -> list[int]:
    """Match the class names of a data set to the model's.

    Args:
        where: what to call the data set in messages.
        names: the data set's class names.
        class_names: the model's class names, in order; empty: those of the data set.
        model: where the model's classes come from, for messages.

    Returns:
        The index in `names` of each of the model's classes.

    Raises:
        UserError: the two sets of names differ.
    """
    if not class_names:
        return list(range(len(names)))
    lacks, foreign = [n for n in class_names if n not in names], [n for n in names if n not in class_names]
    if lacks or foreign:
        parts = [f"it lacks {list_first(lacks, 8)}"] if lacks else []
        parts += [f"it alone has {list_first(foreign, 8)}"] if foreign else []
        alike = {n.strip().casefold() for n in lacks} == {n.strip().casefold() for n in foreign}
        hint = " (they differ only in spaces or capital letters)" if alike else ""
        raise UserError(
            f"{where} has other class names than {model}: {', and '.join(parts)}{hint}: "
            'rename or add "categories" in one of the files'
        )
    return [names.index(name) for name in class_names]


def _normalized(
    whole: dict,
    images: Sequence[ImageRecord],
    usable: np.ndarray,
    sizes: np.ndarray,
    categories: Sequence[Category],
    order: Sequence[int],
    boxes: Boxes | None,
) -> dict:
    """Return the usable contents of the file in a form that pycocotools and detectron2 can read.

    Ids are kept if possible. If the ids of images, categories or annotations must be renumbered, each record keeps its
    own as "original_id". Category ids follow the model's order, since detectron2 orders classes by id.

    Args:
        boxes: the usable boxes; None for a file without labels.
    """
    image_ids = _number([image.id for image in images])
    in_order = list(order) == sorted(order)
    category_ids = _number([categories[i].id for i in order], keep=in_order)
    copy = {
        "info": whole.get("info") if isinstance(whole.get("info"), dict) else {},
        "licenses": whole.get("licenses", []),
        "images": [
            {
                **{"id": image_ids[i], "file_name": image.file_name},
                **{"width": int(sizes[i, 0]), "height": int(sizes[i, 1])},
                **({} if image_ids[i] == image.id else {"original_id": whole["images"][i]["id"]}),
            }
            for i, image in enumerate(images)
            if usable[i]
        ],
        "categories": [
            {
                **{"id": number, "name": categories[i].name},
                **({} if number == categories[i].id else {"original_id": categories[i].id}),
            }
            for number, i in zip(category_ids, order, strict=True)
        ],
    }
    if boxes is not None:
        place = {index: number for number, index in zip(category_ids, order, strict=True)}
        ids = _number([record.get("id") for record in boxes.records], lowest=1)
        columns = zip(
            ids, boxes.records, boxes.image, boxes.category, boxes.xywh.tolist(), boxes.area.tolist(), boxes.crowd,
            strict=True,
        )  # fmt: skip
        copy["annotations"] = [
            {
                **{"id": number, "image_id": image_ids[image], "category_id": place[category]},
                **{"bbox": xywh, "area": area, "iscrowd": int(crowd)},
                **({} if number == record.get("id") else {"original_id": record.get("id")}),
            }
            for number, record, image, category, xywh, area, crowd in columns
        ]
    return copy


def _number(ids: Sequence[object], *, keep: bool = True, lowest: int = -LARGEST_ID) -> list[int]:
    """Return the ids themselves if all are distinct integers and none is below `lowest`; else 1, 2, ..."""
    plain = all(type(number) is int and lowest <= number < LARGEST_ID for number in ids)
    return list(ids) if keep and plain and len(set(ids)) == len(ids) else list(range(1, len(ids) + 1))


def _remember(
    path: Path, result: CheckedSet, images: Sequence[str], stamps: Sequence[Stamp], *, copied: bool
) -> None:
    content = asdict(replace(result, from_cache=True))
    marks = content.pop("fingerprints")
    files = {
        name: [stamp.size, stamp.modified, marks.get(name, "")] for name, stamp in zip(images, stamps, strict=True)
    }
    write_json(path, {"files": files, "copied": copied, "result": content})


def _remembered(path: Path, json_file: str) -> CheckedSet | None:
    """Return the result of an earlier check of the same contents; None if there is none, or an image has changed since.

    Args:
        path: the cached result.
        json_file: the file that has these contents now. The earlier file may be elsewhere, and may have changed.
    """
    known = read_json(path)
    if known is None:
        return None
    files, result = known["files"], known["result"]
    if not known["copied"]:
        result["json_file"] = json_file
    if [[stamp.size, stamp.modified] for stamp in read_stamps(list(files))] != [row[:2] for row in files.values()]:
        return None
    result["fingerprints"] = {name: row[2] for name, row in files.items() if row[2]}
    if not os.path.isfile(result["json_file"]):
        return None
    result["findings"] = tuple(Finding(**finding) for finding in result["findings"])
    result["category_ids"], result["class_names"] = tuple(result["category_ids"]), tuple(result["class_names"])
    return CheckedSet(**{**result, "report": Report(**result["report"])})


def _load_headers(path: Path) -> dict[str, tuple[Stamp, ImageHeader]]:
    """Return the headers that an earlier check read, by path."""
    known = read_json(path) or {}
    return {name: (Stamp(*row[:2]), ImageHeader(*row[2:])) for name, row in known.items()}


def _digest(*parts: object) -> str:
    """Return a hexadecimal digest of the parts."""
    state = hashlib.sha256()
    for part in parts:
        state.update(hashlib.sha256(part if isinstance(part, bytes) else json.dumps(part).encode()).digest())
    return state.hexdigest()
