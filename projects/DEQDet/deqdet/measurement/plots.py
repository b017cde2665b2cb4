"""Plots of a training run: detections beside the ground truth, loss curves, residuals against steps."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from detectron2.structures import Instances

from ..atomic import replacing
from ..data import read_image
from ..drawing import arrange, save_picture, text_font
from ..engine.pictures import draw_beside_truth
from .metrics_file import read_lines

MARGIN, HEAD = 6, 26  # pixels: between the pictures of a sheet, and the line of headings
LOSS_KEYS = re.compile(r"(.*/)?total_loss")  # in metrics.json, where the name of the data set may come first
AP_KEYS = re.compile(r"(.*/)?bbox/AP(50)?")


def draw_pair(
    record: dict, detections: Instances, class_names: Sequence[str], *, width: int, threshold: float
) -> np.ndarray:
    """Draw one image twice, side by side: with the ground truth, and with the detections.

    Args:
        record: detectron2's dataset dict, with annotations.
        detections: boxes in pixels of the original image.
        width: width of each half, pixels.
        threshold: detections with a lower score are left out.

    Returns:
        (height, 2 * width + MARGIN, 3) uint8 RGB.

    Raises:
        UserError: the image cannot be read.
    """
    image = _fit(read_image(record["file_name"]), width)
    shown = detections[detections.scores >= threshold].to("cpu")
    truth, found = draw_beside_truth(image, record, shown, class_names)
    gap = np.full((len(image), MARGIN, 3), 255, np.uint8)
    return np.concatenate([truth, gap, found], axis=1)


def contact_sheet(pairs: list[np.ndarray], *, columns: int, path: str | Path) -> None:
    """Write pairs of one width as a grid with a line of headings.

    Args:
        pairs: as draw_pair returns them.
        path: the image file to write.

    Raises:
        UserError: the file cannot be written.
    """
    width, gap = pairs[0].shape[1], 3 * MARGIN
    images = arrange([Image.fromarray(pair) for pair in pairs], columns=columns, width=width, gap=gap)
    sheet = ImageOps.expand(images, border=(0, HEAD, 0, 0), fill="white")
    draw = ImageDraw.Draw(sheet)
    for left in range(0, images.width, width + gap):
        for half, heading in enumerate(("ground truth", "detections")):
            x = left + half * (width + MARGIN) // 2 + 4
            draw.text((x, HEAD // 2), heading, (40, 40, 40), text_font(15), anchor="lm")
    save_picture(sheet, Path(path))


def save_figure(figure: Figure, path: Path, *, dpi: int = 120) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def plot_curves(lines: Sequence[Mapping], path: str | Path) -> None:
    """Draw the total loss and the AP of every evaluation against the iteration, side by side.

    Args:
        lines: as read_lines returns them. detectron2 writes the median loss of the last 20 iterations.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")  # not by pyplot, which would choose a backend
    losses, accuracy = figure.subplots(1, 2)
    highest = 0.0
    for key, colour in zip(_keys(lines, LOSS_KEYS), ("C0", "C1", "C2"), strict=False):
        iterations, values = _series(lines, key)
        losses.plot(iterations, values, color=colour, label=key.replace("_", " "), linewidth=1.4)
        highest = max(highest, min(1.05 * max(values), 3 * float(np.median(values))))
    # The first losses are cut off, because they may be so large that the others could not be seen.
    losses.set(xlabel="iteration", ylabel="loss", title="loss", ylim=(0, highest or 1))
    for key in _keys(lines, AP_KEYS):
        iterations, values = _series(lines, key)
        accuracy.plot(iterations, values, marker="o", markersize=4, linewidth=1.4, label=key.replace("bbox/", ""))
        accuracy.annotate(f"{values[-1]:.1f}", (iterations[-1], values[-1]), textcoords="offset points", xytext=(0, 6),
                          ha="right")  # fmt: skip
    accuracy.set(xlabel="iteration", ylabel="AP", title="box AP on the test set", ylim=(0, 100))
    # Both panels show the same iterations, so that loss and AP can be compared.
    last = max((line["iteration"] for line in lines), default=0)
    for axes in (losses, accuracy):
        axes.set_xlim(0, max(1, 1.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "not in metrics.json", transform=axes.transAxes, ha="center", color="gray")
    save_figure(figure, Path(path))


def _keys(lines: Sequence[Mapping], pattern: re.Pattern) -> list[str]:
    keys = {key for line in lines for key in line if pattern.fullmatch(key)}
    return sorted(key for key in keys if _series(lines, key)[1])


def _series(lines: Sequence[Mapping], key: str) -> tuple[list[int], list[float]]:
    """Return the iterations with a finite value, and these values."""
    pairs = [(line["iteration"], line[key]) for line in lines if np.isfinite(line.get(key, np.nan))]
    return [i for i, _ in pairs], [value for _, value in pairs]


def plot_losses(metrics_file: str | Path, path: str | Path) -> None:
    """Draw the loss of each supervised prediction against the iteration, from a run's metrics.json."""
    lines = [line for line in read_lines(metrics_file) if "total_loss" in line]
    iterations = [line["iteration"] for line in lines]
    names = sorted({key.removeprefix("loss_cls_") for line in lines for key in line if key.startswith("loss_cls_")})
    figure = Figure(figsize=(7, 4), layout="constrained")  # not by pyplot, which would choose a backend
    axes = figure.subplots()
    for name in names:
        sums = [sum(v for k, v in line.items() if k.startswith("loss_") and k.endswith(f"_{name}")) for line in lines]
        axes.plot(iterations, sums, label=name, linewidth=1.2)
    axes.set(xlabel="iteration", ylabel="weighted loss of a prediction", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(title="prediction", frameon=False)
    save_figure(figure, Path(path))


def plot_residuals(residuals: Tensor, path: str | Path) -> None:
    """Plot the median and quartiles over the images against the step, on a logarithmic axis.

    Args:
        residuals: (1 + T, images), as measure_residuals returns them.
    """
    quartiles = np.quantile(residuals.numpy(), [0.25, 0.5, 0.75], axis=1)
    steps = np.arange(len(residuals))
    figure = Figure(figsize=(7, 4), layout="constrained")  # not by pyplot, which would choose a backend
    axes = figure.subplots()
    axes.fill_between(steps, quartiles[0], quartiles[2], alpha=0.25, label="middle half of the images")
    axes.plot(steps, quartiles[1], marker="o", markersize=3, label="median image")
    axes.set(xlabel="layer", ylabel="relative residual", yscale="log")
    shown = [0, 1, *range(5, len(steps), 5)]
    axes.set_xticks(shown, ["g", *(f"f{i}" for i in shown[1:])])
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    save_figure(figure, Path(path))


def _fit(image: np.ndarray, width: int) -> np.ndarray:
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    shrinks = width < image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
