"""Draw detections with detectron2's Visualizer."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.patheffects import withStroke
from PIL import Image, ImageFont

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer

from .atomic import replacing
from .errors import UserError

ENLARGED_SIDE = 640  # pixels: smaller images are enlarged to about this size
MOST_ENLARGED = 16  # maximum factor

Colour = tuple[float, float, float]  # RGB, 0 to 1


def class_colours(count: int) -> list[Colour]:
    """Make `count` colours that are bright and as different in hue as possible."""
    hues = matplotlib.colormaps["hsv"](np.arange(count) / count)[:, :3]
    return [tuple(colour) for colour in (0.15 + 0.85 * hues).tolist()]


def coloured_metadata(metadata: Metadata) -> Metadata:
    """Copy metadata with bright colours, because the Visualizer's own are random and some are too dark to read."""
    classes = metadata.thing_classes
    colours = (255 * np.array(class_colours(len(classes)))).astype(int).tolist()
    return Metadata(name=f"{metadata.name}, coloured", thing_classes=classes, thing_colors=colours)


def find_format(path: Path) -> str:
    """Return Pillow's name of the image format that a file name stands for.

    Raises:
        UserError: the name has no suffix of a format that Pillow can write.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:
        raise UserError(f"{path} is no name for an image: let it end in .jpg or .png")
    return form


def save_picture(image: Image.Image, path: Path) -> None:
    """Save a picture atomically, in the format of the file name.

    Raises:
        UserError: see `find_format`; or the file cannot be written.
    """
    form = find_format(path)
    with replacing(path) as file:
        image.save(file, form, quality=90)


def arrange(tiles: Sequence[Image.Image], *, columns: int, width: int, gap: int) -> Image.Image:
    """Arrange pictures in rows on a white ground, each row as high as its highest picture.

    Args:
        tiles: at least one.
        columns: maximum number of pictures in a row.
        width: of a column, pixels.
        gap: between columns and between rows, pixels.
    """
    columns = min(columns, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    tops = np.cumsum([0, *(gap + max(tile.height for tile in row) for row in rows)]).tolist()
    sheet = Image.new("RGB", (columns * (width + gap) - gap, tops[-1] - gap), "white")
    for top, row in zip(tops[:-1], rows, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * (width + gap), top))
    return sheet


def plain_text(text: str) -> str:
    """Escape a text for matplotlib, which would parse what is between two $ as a formula."""
    return text.replace("$", r"\$")


class BoxVisualizer(Visualizer):
    """detectron2's Visualizer with opaque lines, whose light edges make them visible on any background."""

    def draw_box(self, box_coord, alpha=1.0, edge_color="g", line_style="-") -> VisImage:
        """Draw a box (4,) xyxy; `alpha` is ignored."""
        super().draw_box(box_coord, 1.0, edge_color, line_style)
        line = self.output.ax.patches[-1]
        line.set_path_effects([withStroke(linewidth=line.get_linewidth() + 1.0, foreground="white", alpha=0.7)])
        return self.output


@cache
def text_font(size: int) -> ImageFont.FreeTypeFont:
    """Load matplotlib's font for Pillow, whose own font has only one size in older releases."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarge a small image (H, W, 3) uint8 by an integer factor, so that labels can be read."""
    factor = min(max(1, round(ENLARGED_SIDE / max(image.shape[:2]))), MOST_ENLARGED)
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def draw_detections(image: np.ndarray, instances: Instances, class_names: Sequence[str]) -> np.ndarray:
    """Draw the boxes in the colours of their classes, with names and scores.

    Args:
        image: (H, W, 3) uint8 RGB; the image of the detections, or an enlarged copy.
        instances: on the CPU, in pixels of the original image.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    scale = image.shape[1] / instances.image_size[1]
    scaled = Instances(image.shape[:2], **instances.get_fields())
    scaled.pred_boxes = Boxes(scale * instances.pred_boxes.tensor)
    metadata = coloured_metadata(Metadata(name="detections", thing_classes=[plain_text(x) for x in class_names]))
    visualizer = BoxVisualizer(image, metadata, instance_mode=ColorMode.SEGMENTATION, font_size_scale=0.8)
    visualizer.draw_instance_predictions(scaled, jittering=False)
    separate_labels(visualizer.output)
    return visualizer.output.get_image()


def separate_labels(picture: VisImage) -> None:
    """Move every label into the image and, up or down, to the nearest place where it covers no earlier label."""
    placed: list[tuple[float, float, float, float]] = []  # x, y (upper left), width, height; pixels
    for label in picture.ax.texts:
        extent = label.get_window_extent(picture.canvas.get_renderer())
        w, h = extent.width + 2, extent.height + 2  # with the margin of the dark background
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
