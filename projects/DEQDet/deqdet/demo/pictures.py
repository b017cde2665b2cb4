"""Detection in one image with its time, and detections drawn with detectron2's Visualizer."""

import time
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from matplotlib.patheffects import withStroke

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer

from ..drawing import coloured_metadata
from ..errors import UserError
from ..predictor import Detections, Predictor

ENLARGED_SIDE = 640  # pixels: smaller images are drawn about this large
MOST_ENLARGED = 16  # times


class BoxVisualizer(Visualizer):
    """detectron2's Visualizer with opaque lines, whose light edges keep them visible on any background."""

    def draw_box(self, box_coord, alpha=1.0, edge_color="g", line_style="-") -> VisImage:
        """Draw a box (4,) xyxy; `alpha` is ignored."""
        super().draw_box(box_coord, 1.0, edge_color, line_style)
        line = self.output.ax.patches[-1]
        line.set_path_effects([withStroke(linewidth=line.get_linewidth() + 1.0, foreground="white", alpha=0.7)])
        return self.output


def detect(predictor: Predictor, image: np.ndarray, name: str, options: Mapping[str, Any]) -> tuple[Detections, float]:
    """Detect in an image (H, W, 3) uint8 RGB, and measure the seconds. A UserError begins with the name."""
    start = time.perf_counter()
    try:
        found = predictor(image, **options)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return found, time.perf_counter() - start


def enlarge(image: np.ndarray) -> np.ndarray:
    """Make a small image (H, W, 3) uint8 a whole number of times as large, so that labels can be read."""
    factor = min(max(1, round(ENLARGED_SIDE / max(image.shape[:2]))), MOST_ENLARGED)
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def draw_detections(image: np.ndarray, found: Detections) -> np.ndarray:
    """Draw the boxes in the colours of their classes, with names and scores.

    Args:
        image: (H, W, 3) uint8 RGB; the one of the detections, or an enlarged copy of it.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    scale = image.shape[1] / found.instances.image_size[1]
    scaled = Instances(image.shape[:2], **found.instances.get_fields())
    scaled.pred_boxes = Boxes(scale * found.instances.pred_boxes.tensor)
    names = [name.replace("$", r"\$") for name in found.class_names]  # matplotlib reads formulas between two $
    metadata = coloured_metadata(Metadata(name="demo", thing_classes=names))
    visualizer = BoxVisualizer(image, metadata, instance_mode=ColorMode.SEGMENTATION, font_size_scale=0.8)
    visualizer.draw_instance_predictions(scaled, jittering=False)
    separate_labels(visualizer.output)
    return visualizer.output.get_image()


def separate_labels(picture: VisImage) -> None:
    """Move every label into the image and, up or down, to the nearest place where it covers no earlier label."""
    placed: list[tuple[float, float, float, float]] = []  # x, y (upper left), width, height; pixels
    for label in picture.ax.texts:
        extent = label.get_window_extent(picture.canvas.get_renderer())
        w, h = extent.width + 2, extent.height + 2  # with the margin of the dark ground
        lowest = max(0.0, picture.height - h)
        x, y = np.clip(label.get_position(), 0, (max(0.0, picture.width - w), lowest))
        rows = np.append(np.arange(y, lowest, h / 2), np.arange(y, 0, -h / 2))
        free = (
            row
            for row in sorted(rows, key=lambda row: abs(row - y))
            if all(x >= a + c or a >= x + w or row >= b + d or b >= row + h for a, b, c, d in placed)
        )
        placed.append((x, next(free, y), w, h))
        label.set_position(placed[-1][:2])
