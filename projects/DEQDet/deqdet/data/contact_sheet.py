"""Draws contact sheets: images of a data set with their boxes, to see at a glance whether the boxes fit."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from detectron2.config import CfgNode

from ..drawing import BoxVisualizer, arrange, class_colours, plain_text, separate_labels, text_font
from .images import read_image
from .results import read_truth
from .train_loader import build_train_loader

_TILE, _GAP = 320, 4  # pixels: the longer side of an image, and between images
_COLUMNS = 4
_LINE, _FONT_SIZE = 24, 15  # pixels: of the legend
_FEW_BOXES, _FEW_CLASSES = 8, 12  # labels on more boxes would hide the image; then the colours alone show the class


def draw_contact_sheet(records: Sequence[dict], class_names: Sequence[str], count: int = 16) -> Image.Image:
    """Draw images of a data set with their boxes side by side.

    Args:
        records: in detectron2's format.
        class_names: the labels of the boxes.
        count: number of images, chosen at even intervals among those with boxes (or all, if none has any).

    Returns:
        An RGB image with four tiles per row, above a legend of the classes.

    Raises:
        UserError: an image cannot be read.
    """
    with_boxes = [record for record in records if record.get("annotations")]
    pool = with_boxes or list(records)
    chosen = [pool[i] for i in sorted({int(i) for i in np.linspace(0, len(pool) - 1, min(count, len(pool)))})]
    return _lay_out([_draw_record(record, class_names) for record in chosen], class_names)


def draw_inputs(inputs: Iterable[dict], class_names: Sequence[str], *, order: str) -> Image.Image:
    """Draw the model's inputs in training: augmented images with their boxes.

    Args:
        inputs: as the mapper returns them, with "image" (3, H, W) uint8 and "instances".
        class_names: the labels of the boxes.
        order: the channel order, RGB or BGR (INPUT.FORMAT).

    Returns:
        An RGB image with the layout of draw_contact_sheet.
    """
    tiles = []
    for sample in inputs:
        image = sample["image"].numpy().transpose(1, 2, 0)
        image = image if order == "RGB" else image[:, :, ::-1]
        truth = sample["instances"]
        boxes, labels = truth.gt_boxes.tensor.numpy(), truth.gt_classes.tolist()
        tiles.append(_draw_tile(np.ascontiguousarray(image), boxes, labels, class_names))
    return _lay_out(tiles, class_names)


def find_first_inputs(cfg: CfgNode, count: int) -> list[dict]:
    """Return the first `count` samples of a training with this config, in its order and with its augmentation.

    They are those of a single-process training. A negative SEED, which training replaces by a random one, counts as 0.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # the samples do not depend on it
    batches = iter(build_train_loader(cfg))
    return list(islice((sample for batch in batches for sample in batch), count))


def _draw_record(record: dict, class_names: Sequence[str]) -> Image.Image:
    image, truth = read_image(record["file_name"]), read_truth(record)
    return _draw_tile(image, truth.gt_boxes.tensor.numpy(), truth.gt_classes.tolist(), class_names)


def _draw_tile(image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> Image.Image:
    """Draw one image with its boxes, scaled to the size of a tile first, so that labels stay legible.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (M, 4) xyxy, pixels.
    """
    factor = _TILE / max(image.shape[:2])
    size = [max(1, round(side * factor)) for side in (image.shape[1], image.shape[0])]
    visualizer = BoxVisualizer(np.asarray(Image.fromarray(image).resize(size)), font_size_scale=0.6)
    colours = class_colours(len(class_names))
    labelled = len(labels) <= _FEW_BOXES or len(class_names) > _FEW_CLASSES
    for box, label in zip(factor * boxes, labels, strict=True):
        visualizer.draw_box(box, edge_color=colours[label])
        if labelled:
            name = plain_text(class_names[label])
            visualizer.draw_text(name, box[:2], font_size=9, color=colours[label], horizontal_alignment="left")
    separate_labels(visualizer.output)
    return Image.fromarray(visualizer.get_output().get_image())


def _lay_out(tiles: Sequence[Image.Image], class_names: Sequence[str]) -> Image.Image:
    """Arrange the tiles in rows, above a legend of the classes unless these are too many to tell apart."""
    images = arrange(tiles, columns=_COLUMNS, width=_TILE, gap=_GAP)
    legend = _place_legend(class_names, images.width) if len(class_names) <= _FEW_CLASSES else []
    lines = 1 + max((line for _, line in legend), default=-1)
    sheet = ImageOps.expand(images, border=(0, 0, 0, _GAP + _LINE * lines), fill="white")
    draw = ImageDraw.Draw(sheet)
    for name, colour, (x, line) in zip(class_names, class_colours(len(class_names)), legend, strict=False):
        y = images.height + _GAP + _LINE * line + _LINE // 2
        draw.rectangle((x, y - 6, x + 12, y + 6), tuple(round(255 * part) for part in colour))
        draw.text((x + 18, y), name, "black", text_font(_FONT_SIZE), anchor="lm")
    return sheet


def _place_legend(names: Sequence[str], width: int) -> list[tuple[int, int]]:
    """Return where each name in the legend begins: x in pixels, and the line."""
    places: list[tuple[int, int]] = []
    x, line = 6, 0
    for name in names:
        length = 36 + math.ceil(text_font(_FONT_SIZE).getlength(name))
        if x > 6 and x + length > width:
            x, line = 6, line + 1
        places.append((x, line))
        x += length
    return places
