"""Detections drawn on an image with detectron2's Visualizer: one colour a class, labels that can be read."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.patheffects import withStroke

from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from ..drawing import Colour, class_colours

ENLARGED_SIDE = 640  # pixels: smaller images are drawn about this large
MOST_ENLARGED = 16  # times


def enlarge(image: np.ndarray) -> np.ndarray:
    """A small image a whole number of times as large, so that labels can be read; (H, W, 3) uint8."""
    factor = min(max(1, round(ENLARGED_SIDE / max(image.shape[:2]))), MOST_ENLARGED)
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def draw_detections(image: np.ndarray, instances: Instances, class_names: Sequence[str]) -> np.ndarray:
    """
    Args:
        image: (H, W, 3) uint8 RGB.
        instances: in pixels of an image of these proportions, on the CPU.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    scale = image.shape[1] / instances.image_size[1]
    boxes, classes = scale * instances.pred_boxes.tensor.numpy(), instances.pred_classes.tolist()
    colours = class_colours(len(class_names))
    visualizer = Visualizer(image, font_size_scale=0.8)
    labels = []
    font_size = max(8.0, 0.0145 * math.sqrt(image.shape[0] * image.shape[1]))  # points
    for box, label, score in zip(boxes, classes, instances.scores.tolist(), strict=True):
        draw_box(visualizer, box, colours[label])
        text = f"{class_names[label]} {score:.0%}".replace("$", r"\$")  # no formula
        style = {"font_size": font_size, "color": _lighter(colours[label]), "horizontal_alignment": "left"}
        visualizer.draw_text(text, (0, 0), **style)
        labels.append(visualizer.output.ax.texts[-1])
    renderer = visualizer.output.canvas.get_renderer()
    extents = [label.get_window_extent(renderer) for label in labels]
    sizes = np.array([(extent.width, extent.height) for extent in extents]).reshape(-1, 2)
    places = place_labels(boxes, sizes, image.shape[1], image.shape[0])
    for label, place in zip(labels, places, strict=True):
        label.set_position(place)
    return visualizer.get_output().get_image()


def draw_box(visualizer: Visualizer, box: np.ndarray, colour: Colour, dashed: bool = False) -> None:
    """A line with light edges, so that it can be seen on any ground. `box`: (4,) xyxy."""
    visualizer.draw_box(box, alpha=1.0, edge_color=colour, line_style="--" if dashed else "-")
    line = visualizer.output.ax.patches[-1]
    line.set_path_effects([withStroke(linewidth=line.get_linewidth() + 1.0, foreground="white", alpha=0.7)])


def place_labels(boxes: np.ndarray, sizes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Above, in or below each box, within the image, where it covers least of the labels before it.

    Args:
        boxes: (n, 4) xyxy, pixels.
        sizes: (n, 2) width and height of the labels, pixels.

    Returns:
        (n, 2) x and y of their upper left corners.
    """
    placed = np.zeros((0, 4))
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes, strict=True):
        left, right = x0, x1 - w
        corners = [(left, y0 - h), (left, y0), (left, y1), (right, y0 - h), (right, y0), (right, y1), (left, y1 - h)]
        corners = np.array(corners).clip(0, np.maximum([width - w, height - h], 0))
        places = np.concatenate([corners, corners + (w, h)], axis=1)  # (7, 4)
        low = np.maximum(places[:, None, :2], placed[None, :, :2])
        high = np.minimum(places[:, None, 2:], placed[None, :, 2:])
        covered = (high - low).clip(min=0).prod(axis=2).sum(axis=1)  # (7,)
        placed = np.concatenate([placed, places[covered.argmin()][None]])  # the first of the best
    return placed[:, :2]


def _lighter(colour: Colour) -> Colour:
    """For text on a dark ground."""
    return tuple(0.5 + 0.5 * part for part in colour)
