"""Colours of classes, for every picture with boxes."""

import matplotlib
import numpy as np

from detectron2.data import Metadata

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
