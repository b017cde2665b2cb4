"""The boxes of an image's detections step by step, as a GIF and as one row of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from detectron2.utils.visualizer import Visualizer

from ..drawing import Colour, class_colours
from .drawing import MOST_ENLARGED, draw_box
from .refinement import Refinement

GIF_SIDE, PANEL_SIDE = 640, 256  # longest side of the picture in a frame of the GIF, in a panel of the strip; pixels
LEAST_WIDTH = 340, 210  # of a frame, of a panel; pixels, for the text
STRIP_STEPS = (0, 1, 2, 3, 5, 10)  # and the last one
FONT_SIZE = 16  # pixels
LINE = 24  # pixels
INK, PAPER = (40, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class Scene:
    """An image in its final size with the paths of its detections. S = 2 + T states: initial boxes, g, steps 1 to T."""

    picture: np.ndarray  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (S, M, 4)  xyxy, pixels of the picture
    sure: np.ndarray  # (S, M)  bool, whether the score has reached the threshold
    colours: list[Colour]  # M
    legend: dict[str, Colour]  # class names
    titles: list[str]  # S
    notes: list[str]  # S  the residuals
    threshold: float


def build_scene(
    image: np.ndarray, refinement: Refinement, class_names: Sequence[str], threshold: float, side: int
) -> Scene:
    """
    Args:
        image: (H, W, 3) uint8 RGB, the original.
        side: the longest one of the picture, pixels.
    """
    height, width = refinement.image_size
    scale = min(side / max(height, width), MOST_ENLARGED)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    queries, labels = refinement.detected.unbind(1)
    boxes = torch.cat([refinement.initial_boxes[None], refinement.boxes])[:, queries].numpy()
    scores = refinement.scores[:, queries, labels].numpy()
    limits = np.maximum(np.array(size) - 2.0, 1.0)  # so that the lines stay within
    colours = class_colours(len(class_names))
    steps = refinement.steps
    return Scene(
        picture=cv2.resize(image, size, interpolation=interpolation),
        boxes=(scale * boxes).clip(1.0, np.tile(limits, 2)),
        sure=np.concatenate([np.zeros_like(scores[:1], dtype=bool), scores >= threshold]),
        colours=[colours[label] for label in labels.tolist()],
        legend={class_names[label]: colours[label] for label in sorted(set(labels.tolist()))},
        titles=["initial boxes", "step 0: g", *(f"step {t}" for t in range(1, steps + 1))],
        notes=["", "", *(f"relative residual {residual:.2g}" for residual in refinement.shown.tolist())],
        threshold=threshold,
    )


def write_gif(scene: Scene, path: Path) -> None:
    """All states, the first and the last ones for longer; it starts again and again."""
    last = len(scene.titles) - 1
    frames = []
    for state in range(last + 1):
        title = scene.titles[state] + (f" of {last - 1}" if state > 1 else "")
        frames.append(_frame(scene, state, title))
    durations = [1000, 1000, *[500] * 5, *[250] * last][:last] + [2500]  # ms
    palette = _palette(frames, scene)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def write_strip(scene: Scene, path: Path) -> None:
    """One row of at most seven steps."""
    last = len(scene.titles) - 2
    steps = sorted({step for step in STRIP_STEPS if step < last} | {last})
    panels = [_draw(scene, step + 1, line=0.45) for step in steps]
    gap = 8
    width, height = max(panels[0].width, LEAST_WIDTH[1]), panels[0].height
    total = len(panels) * (width + gap) - gap
    legend = _legend(scene, total)
    strip = Image.new("RGB", (total, 2 * LINE + height + legend.height), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, (step, panel) in enumerate(zip(steps, panels, strict=True)):
        x = index * (width + gap)
        draw.text((x, LINE // 2), scene.titles[step + 1], INK, _font(), anchor="lm")
        draw.text((x, LINE + LINE // 2), scene.notes[step + 1], INK, _font(), anchor="lm")
        strip.paste(panel, (x, 2 * LINE))
    strip.paste(legend, (0, 2 * LINE + height))
    strip.save(path, optimize=True)


def _frame(scene: Scene, state: int, title: str) -> Image.Image:
    """Title and residual above the picture, the legend below."""
    picture = _draw(scene, state, line=0.8)
    width = max(picture.width, LEAST_WIDTH[0])
    legend = _legend(scene, width)
    frame = Image.new("RGB", (width, LINE + picture.height + legend.height), PAPER)
    draw = ImageDraw.Draw(frame)
    draw.text((4, LINE // 2), title, INK, _font(), anchor="lm")
    draw.text((width - 4, LINE // 2), scene.notes[state], INK, _font(), anchor="rm")
    frame.paste(picture, ((width - picture.width) // 2, LINE))
    frame.paste(legend, (0, LINE + picture.height))
    return frame


def _draw(scene: Scene, state: int, line: float) -> Image.Image:
    """The picture with its boxes, dashed where the score is below the threshold. `line`: see font_size_scale."""
    visualizer = Visualizer(scene.picture, font_size_scale=line)
    for box, sure, colour in zip(scene.boxes[state], scene.sure[state], scene.colours, strict=True):
        draw_box(visualizer, box, colour, dashed=not sure)
    return Image.fromarray(visualizer.get_output().get_image())


def _legend(scene: Scene, width: int) -> Image.Image:
    """The colours of the classes, in as many lines as it takes."""
    entries: list[tuple[str, Colour | None]] = list(scene.legend.items())
    entries.append((f"dashed: score below {scene.threshold:g}", None))
    if not scene.legend:
        entries = [(f"no detection has a score of {scene.threshold:g}", None)]
    font, swatch, places = _font(), FONT_SIZE, []
    x, y = 4, 0
    for name, colour in entries:
        length = round(font.getlength(name)) + (swatch + 6 if colour else 0)
        if x > 4 and x + length > width:
            x, y = 4, y + LINE
        places.append((x, y))
        x += length + swatch
    legend = Image.new("RGB", (width, y + LINE), PAPER)
    draw = ImageDraw.Draw(legend)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        if colour:
            top = y + (LINE - swatch) // 2
            draw.rectangle((x, top, x + swatch - 1, top + swatch - 1), _to_bytes(colour))
            x += swatch + 6
        draw.text((x, y + LINE // 2), name, INK, font, anchor="lm")
    return legend


def _palette(frames: Sequence[Image.Image], scene: Scene) -> Image.Image:
    """One for all frames, so that what does not move is stored once; the colours of lines and text are exact in it."""
    exact = list(dict.fromkeys([PAPER, INK, *map(_to_bytes, scene.legend.values())]))[:128]
    others = frames[-1].quantize(256 - len(exact)).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(part for colour in exact for part in colour), *others][: 3 * 256])
    return palette


def _to_bytes(colour: Colour) -> tuple[int, int, int]:
    return tuple(round(255 * part) for part in colour)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """matplotlib brings one; Pillow's own has only one size in its older releases."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)
