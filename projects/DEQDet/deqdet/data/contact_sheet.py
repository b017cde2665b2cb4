"""A picture of some images of a data set with their boxes drawn, to see at a glance whether the boxes fit."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from detectron2.config import CfgNode

from ..drawing import BoxVisualizer, class_colours, separate_labels, text_font
from .images import read_image
from .results import read_truth
from .train_loader import build_train_loader

_TILE, _GAP = 320, 4  # pixels: the longer side of an image, and between images
_COLUMNS = 4
_LINE, _FONT_SIZE = 24, 15  # pixels: of the legend
_FEW_BOXES, _FEW_CLASSES = 8, 12  # with more boxes in an image their labels would hide it, and the colours must do


def draw_contact_sheet(records: Sequence[dict], class_names: Sequence[str], count: int = 16) -> Image.Image:
    """Draw images of a data set with their boxes side by side.

    Args:
        records: in detectron2's format; `count` of them are taken, evenly spread, first from those that have boxes.
        class_names: the labels of the boxes.

    Returns:
        RGB, four images in a row, above a legend of the classes.

    Raises:
        UserError: an image cannot be read.
    """
    with_boxes = [record for record in records if record.get("annotations")]
    pool = with_boxes or list(records)
    chosen = [pool[i] for i in sorted({int(i) for i in np.linspace(0, len(pool) - 1, min(count, len(pool)))})]
    return _lay_out([_draw_record(record, class_names) for record in chosen], class_names)


def draw_inputs(inputs: Iterable[dict], class_names: Sequence[str], *, order: str) -> Image.Image:
    """Draw what the model gets in training, images after their augmentation with the boxes left in them.

    Args:
        inputs: as the mapper returns them, with "image" (3, H, W) uint8 and "instances".
        order: of the channels, RGB or BGR (INPUT.FORMAT).

    Returns:
        RGB, as draw_contact_sheet.
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
    """The first `count` samples that a training of this config gets: its order of images, seed and augmentation.

    They are those of a training in one process. A negative SEED, for which a training draws one, counts as 0.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # what is drawn does not depend on it
    batches = iter(build_train_loader(cfg))
    return list(islice((sample for batch in batches for sample in batch), count))


def _draw_record(record: dict, class_names: Sequence[str]) -> Image.Image:
    image, truth = read_image(record["file_name"]), read_truth(record)
    return _draw_tile(image, truth.gt_boxes.tensor.numpy(), truth.gt_classes.tolist(), class_names)


def _draw_tile(image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> Image.Image:
    """One image with its boxes, fitted into a tile. It is scaled before it is drawn on, so that labels stay legible.

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
            name = class_names[label].replace("$", r"\$")  # matplotlib reads formulas between two $
            visualizer.draw_text(name, box[:2], font_size=9, color=colours[label], horizontal_alignment="left")
    separate_labels(visualizer.output)
    return Image.fromarray(visualizer.get_output().get_image())


def _lay_out(tiles: Sequence[Image.Image], class_names: Sequence[str]) -> Image.Image:
    """The tiles in rows, and below them the colours of the classes unless these are too many to tell apart."""
    columns = min(_COLUMNS, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    tops = np.cumsum([0, *(_GAP + max(tile.height for tile in row) for row in rows)]).tolist()
    width, height = columns * (_TILE + _GAP) - _GAP, tops[-1]
    legend = _place_legend(class_names, width) if len(class_names) <= _FEW_CLASSES else []
    lines = 1 + max((line for _, line in legend), default=-1)
    sheet = Image.new("RGB", (width, height + _LINE * lines), "white")
    for top, row in zip(tops, rows, strict=False):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * (_TILE + _GAP), top))
    draw = ImageDraw.Draw(sheet)
    for name, colour, (x, line) in zip(class_names, class_colours(len(class_names)), legend, strict=False):
        y = height + _LINE * line + _LINE // 2
        draw.rectangle((x, y - 6, x + 12, y + 6), tuple(round(255 * part) for part in colour))
        draw.text((x + 18, y), name, "black", text_font(_FONT_SIZE), anchor="lm")
    return sheet


def _place_legend(names: Sequence[str], width: int) -> list[tuple[int, int]]:
    """Where each name begins: x in pixels, and the line."""
    places: list[tuple[int, int]] = []
    x, line = 6, 0
    for name in names:
        length = 36 + math.ceil(text_font(_FONT_SIZE).getlength(name))
        if x > 6 and x + length > width:
            x, line = 6, line + 1
        places.append((x, line))
        x += length
    return places
