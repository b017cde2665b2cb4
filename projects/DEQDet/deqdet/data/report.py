"""Statistics of a data set, and the report that deqdet-check-data prints."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .annotations import Boxes
from .findings import BROKEN, Finding

_QUANTILES = (0, 5, 50, 95, 100)  # percent
_SMALL, _LARGE = 32**2, 96**2  # square pixels: COCO's bounds of small, medium and large objects


@dataclass(frozen=True)
class Report:
    """Statistics of the images and boxes that are used.

    Quantiles are the minimum, the 5th, 50th and 95th percentiles, and the maximum.
    """

    num_images: int
    num_images_left_out: int
    num_images_without_boxes: int
    num_boxes: int  # without crowds
    num_crowds: int
    boxes_of_class: dict[str, int]  # by name, in the model's order
    boxes_of_size: dict[str, int]  # small, medium and large, by the box's area
    box_side: list[float]  # quantiles of sqrt(width * height), pixels
    aspect_ratio: list[float]  # quantiles of width / height
    boxes_per_image: list[float]  # quantiles
    image_width: list[float]  # quantiles, pixels
    image_height: list[float]

    def to_dict(self) -> dict:
        """Return the statistics as a dict for JSON."""
        return asdict(self)


def summarize(
    boxes: Boxes, sizes: np.ndarray, usable: np.ndarray, class_names: Sequence[str], order: Sequence[int]
) -> Report:
    """Compute the statistics of a data set.

    Args:
        boxes: the boxes of the usable images.
        sizes: (number of images, 2) width and height in pixels.
        usable: (number of images,) bool.
        class_names: in the model's order.
        order: for each of the model's classes, its index in the list that boxes.category refers to.
    """
    single = boxes.select(~boxes.crowd)
    area = single.xywh[:, 2] * single.xywh[:, 3]
    per_class = np.bincount(single.category, minlength=len(order))
    per_image = np.bincount(single.image, minlength=len(usable))[usable]
    size = {
        "small": int((area < _SMALL).sum()),
        "medium": int(((area >= _SMALL) & (area < _LARGE)).sum()),
        "large": int((area >= _LARGE).sum()),
    }
    return Report(
        num_images=int(usable.sum()),
        num_images_left_out=int((~usable).sum()),
        num_images_without_boxes=int((per_image == 0).sum()),
        num_boxes=len(area),
        num_crowds=int(boxes.crowd.sum()),
        boxes_of_class={name: int(per_class[i]) for name, i in zip(class_names, order, strict=True)},
        boxes_of_size=size,
        box_side=_quantiles(np.sqrt(area)),
        aspect_ratio=_quantiles(single.xywh[:, 2] / single.xywh[:, 3]),
        boxes_per_image=_quantiles(per_image),
        image_width=_quantiles(sizes[usable, 0]),
        image_height=_quantiles(sizes[usable, 1]),
    )


def format_report(report: Report, findings: Sequence[Finding], num_queries: int = 0) -> str:
    """Format a report as text, followed by the findings.

    Args:
        num_queries: the model's number of queries N, shown next to the number of boxes per image; 0: unknown.
    """
    without = f", {report.num_images_without_boxes} of them without boxes"
    crowds = f", and {report.num_crowds} crowds" if report.num_crowds else ""
    names = max(map(len, report.boxes_of_class), default=0)
    lines = [
        f"images: {report.num_images}{without}; {report.num_images_left_out} left out",
        f"boxes: {report.num_boxes}{crowds}",
        *(f"  {name.ljust(names)}  {count}" for name, count in report.boxes_of_class.items()),
        "  " + ", ".join(f"{count} {name}" for name, count in report.boxes_of_size.items()) + " (COCO's sizes)",
        _row("box size, sqrt(width * height), pixels", report.box_side),
        _row("box aspect ratio, width / height", report.aspect_ratio),
        _row("boxes per image" + (f" (the model has {num_queries} queries)" if num_queries else ""),
             report.boxes_per_image),
        _row("image width, pixels", report.image_width),
        _row("image height, pixels", report.image_height),
    ]  # fmt: skip
    for finding in findings:
        broken = finding.level == BROKEN
        lines.append(f"left out: {finding.facts()}" if broken else f"{finding.level}: {finding.line()}")
    return "\n".join(lines)


def _row(title: str, values: Sequence[float]) -> str:
    if not values:
        return f"{title}: none"
    shown = [f"{value:.0f}" if value >= 100 or value == math.floor(value) else f"{value:.2f}" for value in values]
    return f"{title}: smallest {shown[0]}, 5% {shown[1]}, median {shown[2]}, 95% {shown[3]}, largest {shown[4]}"


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, _QUANTILES)] if len(values) else []
