"""A picture of some images of a data set with their boxes drawn, to see at a glance whether the boxes fit."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer

from .images import read_image

_TILE = 320  # pixels, of both sides
_COLUMNS = 4


def draw_contact_sheet(records: Sequence[dict], class_names: Sequence[str], count: int = 16) -> Image.Image:
    """Draw images of a data set with their boxes side by side.

    Args:
        records: in detectron2's format; `count` of them are taken, evenly spread, first from those that have boxes.
        class_names: the labels of the boxes.

    Returns:
        RGB, four images in a row.

    Raises:
        UserError: an image cannot be read.
    """
    with_boxes = [record for record in records if record.get("annotations")]
    pool = with_boxes or list(records)
    chosen = [pool[i] for i in sorted({int(i) for i in np.linspace(0, len(pool) - 1, min(count, len(pool)))})]
    columns = min(_COLUMNS, len(chosen))
    sheet = Image.new("RGB", (columns * _TILE, math.ceil(len(chosen) / columns) * _TILE), "white")
    for i, record in enumerate(chosen):
        sheet.paste(_draw_tile(record, class_names), (i % columns * _TILE, i // columns * _TILE))
    return sheet


def _draw_tile(record: dict, class_names: Sequence[str]) -> Image.Image:
    """One image with its boxes, fitted into a tile. It is scaled before it is drawn on, so that labels stay legible."""
    image = Image.fromarray(read_image(record["file_name"]))
    factor = _TILE / max(image.size)
    small = image.resize([max(1, round(side * factor)) for side in image.size])
    annotations = [
        annotation | {"bbox": [value * factor for value in annotation["bbox"]]}
        for annotation in record.get("annotations", ())
    ]
    metadata = Metadata(name="contact sheet", thing_classes=list(class_names))
    drawn = Visualizer(np.asarray(small), metadata).draw_dataset_dict({"annotations": annotations}).get_image()
    return Image.fromarray(drawn)
