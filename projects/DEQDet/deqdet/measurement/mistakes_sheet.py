"""Draw the images in which a detector makes the most mistakes: ground truth beside detections."""

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..data import read_image
from ..drawing import BoxVisualizer, arrange, plain_text, save_picture, separate_labels, text_font
from .mistakes import Judgement, Outcome

TILE = 480  # pixels: the longer side of each half of a pair
GAP, LINE, HEAD = 8, 24, 60  # pixels: between halves, a caption, the legend
FONT_SIZE = 15
FEW = 8  # boxes: right ones are labelled too, if an image has at most this many
INK, PAPER = (40, 40, 40), (255, 255, 255)
COLOURS = {  # RGB
    Outcome.RIGHT: (40, 170, 70),
    Outcome.CONFUSED: (240, 150, 0),
    Outcome.ALONE: (235, 60, 60),
    Outcome.IGNORED: (130, 130, 130),
}
_LEFT = {Outcome.RIGHT: "found", Outcome.ALONE: "missed", Outcome.CONFUSED: "found as another class"}
_RIGHT = {Outcome.RIGHT: "right", Outcome.ALONE: "false", Outcome.CONFUSED: "another class"}


def write_mistakes(
    records: Sequence[dict],
    judgements: Sequence[Judgement],
    class_names: Sequence[str],
    path: Path,
    *,
    threshold: float,
    columns: int = 2,
) -> None:
    """Write a sheet of images in the given order, each with its ground truth on the left and its detections beside it.

    The colour of a box shows its outcome. Right boxes are labelled only in images with few boxes.

    Args:
        records: detectron2's dataset dicts of the images, at least one.
        judgements: one for each record.
        path: .jpg or .png.
        threshold: the score threshold of the judgements, for the legend.

    Raises:
        UserError: an image cannot be read, or the file cannot be written.
    """
    pairs = [_draw_pair(*pair, class_names) for pair in zip(records, judgements, strict=True)]
    images = arrange(pairs, columns=columns, width=2 * TILE + GAP, gap=2 * GAP)
    sheet = ImageOps.expand(images, border=(0, HEAD, 0, 0), fill=PAPER)
    _draw_legend(sheet, threshold)
    save_picture(sheet, path)


def describe(judgement: Judgement) -> str:
    """Describe the mistakes in words, such as "2 missed, 1 false"."""
    counts = {"missed": judgement.missed, "false": judgement.false, "of another class": judgement.confused}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no mistake"


def _draw_pair(record: dict, judgement: Judgement, class_names: Sequence[str]) -> Image.Image:
    image = read_image(record["file_name"])
    truth, found = judgement.truth, judgement.found
    scale = TILE / max(image.shape[:2])
    size = [max(1, round(scale * side)) for side in (image.shape[1], image.shape[0])]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    few = max(len(truth), len(found)) <= FEW
    labels = [class_names[label] for label in truth.gt_classes.tolist()]
    halves = [_draw_boxes(small, scale * truth.gt_boxes.tensor.numpy(), labels, judgement.truth_outcomes, few)]
    labels = [
        f"{class_names[label]} {score:.2f}"
        for label, score in zip(found.pred_classes.tolist(), found.scores.tolist(), strict=True)
    ]
    halves.append(_draw_boxes(small, scale * found.pred_boxes.tensor.numpy(), labels, judgement.found_outcomes, few))
    pair = Image.new("RGB", (2 * TILE + GAP, LINE + size[1]), PAPER)
    for place, half in enumerate(halves):
        pair.paste(Image.fromarray(half), (place * (TILE + GAP) + (TILE - size[0]) // 2, LINE))
    name = Path(record["file_name"]).name.encode(errors="replace").decode()
    caption = f"{name if len(name) < 60 else name[:57] + '...'}: {describe(judgement)}"
    ImageDraw.Draw(pair).text((GAP, LINE // 2), caption, INK, text_font(FONT_SIZE), anchor="lm")
    return pair


def _draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[str], outcomes: np.ndarray, label_all: bool
) -> np.ndarray:
    """Draw boxes, the right ones first, so that they never hide a mistake.

    Args:
        boxes: (M, 4) xyxy, pixels of the image.
    """
    visualizer = BoxVisualizer(image, font_size_scale=0.8)
    for index in sorted(range(len(labels)), key=lambda i: outcomes[i] in (Outcome.CONFUSED, Outcome.ALONE)):
        colour = tuple(part / 255 for part in COLOURS[outcomes[index]])
        visualizer.draw_box(boxes[index], edge_color=colour, line_style="-" if outcomes[index] < 2 else "--")
        if label_all or outcomes[index] in (Outcome.CONFUSED, Outcome.ALONE):
            text = plain_text(labels[index])
            visualizer.draw_text(text, boxes[index, :2], font_size=10, color=colour, horizontal_alignment="left")
    separate_labels(visualizer.output)
    return visualizer.get_output().get_image()


def _draw_legend(sheet: Image.Image, threshold: float) -> None:
    draw = ImageDraw.Draw(sheet)
    halves = ("left: ground truth", _LEFT), (f"right: detections, score ≥ {threshold:.2f}", _RIGHT)
    for line, (title, names) in enumerate(halves):
        x, y = GAP, 16 + line * LINE
        draw.text((x, y), title, INK, text_font(FONT_SIZE), anchor="lm")
        x += 240
        for outcome, name in names.items():
            draw.rectangle((x, y - 7, x + 14, y + 7), outline=COLOURS[outcome], width=3)
            draw.text((x + 20, y), name, INK, text_font(FONT_SIZE), anchor="lm")
            x += 40 + math.ceil(text_font(FONT_SIZE).getlength(name))
