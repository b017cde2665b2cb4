"""Draw the boxes of an image's detections step by step, as a GIF and as a strip of panels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

from ..drawing import MOST_ENLARGED, BoxVisualizer, Colour, class_colours, text_font
from .refinement import Refinement

GIF_SIDE, PANEL_SIDE = 640, 256  # longest side of the picture in a frame of the GIF, in a panel of the strip; pixels
LEAST_WIDTH = {GIF_SIDE: 340, PANEL_SIDE: 210}  # of a frame and a panel, so that the text fits; pixels
LINE_WIDTH = {GIF_SIDE: 0.8, PANEL_SIDE: 0.45}  # font_size_scale of the Visualizer, to which lines are proportional
STRIP_STEPS = (0, 1, 2, 3, 5, 10)  # and the last one
FONT_SIZE, LINE, GAP = 16, 24, 8  # pixels
INK, PAPER = (40, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class Scene:
    """A resized image with the paths of its detections. S = 2 + T states: initial boxes, g, steps 1 to T."""

    side: int  # GIF_SIDE or PANEL_SIDE
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (S, M, 4)  xyxy, pixels of the picture
    sure: np.ndarray  # (S, M)  bool, whether the score has reached the threshold
    colours: list[Colour]  # M
    legend: dict[str, Colour | None]  # the meaning of the colours and of dashed lines
    titles: list[str]  # S
    notes: list[str]  # S  the residuals


def build_scene(
    image: np.ndarray, refinement: Refinement, class_names: Sequence[str], threshold: float, side: int
) -> Scene:
    """Scale an image and its boxes.

    Args:
        image: (H, W, 3) uint8 RGB, the original.
        side: the longest side of the picture, GIF_SIDE or PANEL_SIDE.
    """
    (height, width), steps = refinement.image_size, refinement.steps
    scale = min(side / max(height, width), MOST_ENLARGED)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    queries, labels = refinement.detected.unbind(1)
    boxes = torch.cat([refinement.initial_boxes[None], refinement.boxes])[:, queries].numpy()
    scores = refinement.scores[:, queries, labels].numpy()
    limits = np.maximum(np.array(size) - 2.0, 1.0)  # so that the lines stay within the picture
    colours = class_colours(len(class_names))
    legend = {class_names[label]: colours[label] for label in sorted(set(labels.tolist()))}
    explanation = f"dashed: score below {threshold:g}" if legend else f"no score reaches {threshold:g}"
    return Scene(
        side=side,
        picture=cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC),
        boxes=(scale * boxes).clip(1.0, np.tile(limits, 2)),
        sure=np.concatenate([np.zeros_like(scores[:1], dtype=bool), scores >= threshold]),
        colours=[colours[label] for label in labels.tolist()],
        legend=legend | {explanation: None},
        titles=["initial boxes", "step 0: g", *(f"step {t} of {steps}" for t in range(1, steps + 1))],
        notes=["", "", *(f"relative residual {residual:.2g}" for residual in refinement.shown.tolist())],
    )


def write_gif(scene: Scene, path: Path) -> None:
    """Write all states as a looping animation that shows the first states and the last one for longer."""
    rows, last = list(zip(scene.titles, scene.notes, strict=True)), len(scene.titles) - 1
    frames = [_with_legend(_panel(scene, state, [row]), scene) for state, row in enumerate(rows)]
    durations = [1000, 1000, *[500] * 5, *[250] * last][:last] + [2500]  # ms
    palette = _palette(frames[-1], scene)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def write_strip(scene: Scene, path: Path) -> None:
    """Write a row of panels with at most seven steps."""
    last = len(scene.titles) - 2
    states = [step + 1 for step in sorted({step for step in STRIP_STEPS if step < last} | {last})]
    panels = [_panel(scene, state, [(scene.titles[state], ""), (scene.notes[state], "")]) for state in states]
    step = panels[0].width + GAP
    row = Image.new("RGB", (len(panels) * step - GAP, panels[0].height), PAPER)
    for index, panel in enumerate(panels):
        row.paste(panel, (index * step, 0))
    _with_legend(row, scene).save(path, optimize=True)


def _panel(scene: Scene, state: int, rows: Sequence[tuple[str, str]]) -> Image.Image:
    """Draw the picture with its boxes, dashed if the score is below the threshold, under rows of text (left, right)."""
    visualizer = BoxVisualizer(scene.picture, font_size_scale=LINE_WIDTH[scene.side])
    for box, sure, colour in zip(scene.boxes[state], scene.sure[state], scene.colours, strict=True):
        visualizer.draw_box(box, edge_color=colour, line_style="-" if sure else "--")
    picture = Image.fromarray(visualizer.get_output().get_image())
    width, top = max(picture.width, LEAST_WIDTH[scene.side]), LINE * len(rows)
    panel = Image.new("RGB", (width, top + picture.height), PAPER)
    draw = ImageDraw.Draw(panel)
    for index, (left, right) in enumerate(rows):
        y = index * LINE + LINE // 2
        draw.text((4, y), left, INK, text_font(FONT_SIZE), anchor="lm")
        draw.text((width - 4, y), right, INK, text_font(FONT_SIZE), anchor="rm")
    panel.paste(picture, ((width - picture.width) // 2, top))
    return panel


def _with_legend(above: Image.Image, scene: Scene) -> Image.Image:
    """Add the legend below a picture, with line breaks where needed."""
    places = []
    x, y = 4, above.height
    for name, colour in scene.legend.items():
        length = round(text_font(FONT_SIZE).getlength(name)) + (FONT_SIZE + 6 if colour else 0)
        if x > 4 and x + length > above.width:
            x, y = 4, y + LINE
        places.append((x, y))
        x += length + FONT_SIZE
    whole = Image.new("RGB", (above.width, y + LINE), PAPER)
    whole.paste(above)
    draw = ImageDraw.Draw(whole)
    for (name, colour), (x, y) in zip(scene.legend.items(), places, strict=True):
        if colour:
            top = y + (LINE - FONT_SIZE) // 2
            draw.rectangle((x, top, x + FONT_SIZE - 1, top + FONT_SIZE - 1), _to_bytes(colour))
            x += FONT_SIZE + 6
        draw.text((x, y + LINE // 2), name, INK, text_font(FONT_SIZE), anchor="lm")
    return whole


def _palette(frame: Image.Image, scene: Scene) -> Image.Image:
    """Make one palette for all frames, so that unchanged pixels are stored once; lines and text keep their colours."""
    exact = list(dict.fromkeys([PAPER, INK, *(_to_bytes(x) for x in scene.legend.values() if x)]))[:128]
    others = frame.quantize(256 - len(exact)).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(part for colour in exact for part in colour), *others][: 3 * 256])
    return palette


def _to_bytes(colour: Colour) -> tuple[int, int, int]:
    return tuple(round(255 * part) for part in colour)
