"""Measure AP and end-to-end latency of detectors for several steps, precisions and modes (eager, compiled, exported).

A `Way` maps an image in memory to its detections, so its latency includes resizing, backbone, decoder and read-out.
First, each way runs on all images for its AP, which also warms it up. Then the ways run alternately on some of these
images, so a change in the machine's speed affects all of them alike. Each way processes an image twice, and only the
second run is timed: during the first, the weights of another model may be in the processor's caches.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

from detectron2.structures import Instances

from ..atomic import write_text
from ..data import read_image
from .accuracy import Accuracy, Evaluation
from .benchmark import Timing
from .plots import save_figure
from .tables import format_table, format_value
from .timing import timed

Detect = Callable[[np.ndarray], Instances]  # image (H, W, 3) uint8 RGB -> detections on the CPU, in its pixels
TIMED = 100  # images for which the latency is measured


@dataclass(frozen=True)
class Way:
    """One detector with one way of running it."""

    model: str
    steps: str  # "8 steps", or "6 layers" for a stack
    precision: str
    mode: str  # "eager", "compiled" or "onnx"
    max_detections: int  # per image
    detect: Detect


@dataclass(frozen=True)
class Row:
    """The results of one way."""

    model: str
    steps: str
    precision: str
    mode: str
    accuracy: Accuracy
    time: Timing  # per image
    first: float  # seconds for the first image, including compilation


@dataclass(frozen=True)
class Report:
    """What was measured, and the results."""

    command: str  # so that readers can repeat it
    dataset: str
    images: int
    timed: int
    device: str
    rows: list[Row]


# Detections are returned on the CPU, so timing needs no synchronisation.
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Detected:
    image_id: int
    detections: Mapping[int, Instances]


def measure_ways(ways: Sequence[Way], records: Sequence[dict], evaluation: Evaluation, *, images: int) -> list[Row]:
    """Evaluate and time each way.

    Args:
        records: detectron2's dataset dicts of the test set, at least one.
        images: how many of the first images are timed; at least 2, since quartiles need several values.

    Raises:
        UserError: an image cannot be read, or the data set has no annotations.
    """
    accuracies, first = [], []
    for way in ways:
        found, seconds = [], []
        label = f"{way.model}, {way.steps}, {way.precision}, {way.mode}"
        for record in tqdm(records, desc=label, unit="image", disable=None):
            instances, taken = timed(partial(way.detect, read_image(record["file_name"])), _CPU)
            found.append(_Detected(record["image_id"], {0: instances}))
            seconds.append(taken)
        first.append(seconds[0])
        accuracies += evaluation(found, [(0,) * len(found)])
    times: list[list[float]] = [[] for _ in ways]
    for record in tqdm(records[:images], desc="taking turns", unit="image", disable=None):
        image = read_image(record["file_name"])
        for way, seconds in zip(ways, times, strict=True):
            way.detect(image)
            seconds.append(timed(partial(way.detect, image), _CPU)[1])
    return [
        Row(way.model, way.steps, way.precision, way.mode, accuracy, Timing.of(seconds), start)
        for way, accuracy, seconds, start in zip(ways, accuracies, times, first, strict=True)
    ]


def write_report(report: Report, folder: Path) -> None:
    """Write speed_accuracy.md, .json and .png into `folder`, each atomically.

    Raises:
        UserError: a file cannot be written.
    """
    save_figure(plot_rows(report.rows), folder / "speed_accuracy.png")
    write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n", folder / "speed_accuracy.json")
    write_text(format_report(report), folder / "speed_accuracy.md")


def format_report(report: Report) -> str:
    """Format the Markdown report: the table, the meaning of its columns, and the command."""
    table = [["model", "at test time", "precision", "run as", "AP", "AP50", "ms an image", "first image (s)"]]
    for row in report.rows:
        time = f"{row.time.median:.1f} ({row.time.low:.1f} to {row.time.high:.1f})"
        scores = [format_value(x, ".1f") for x in (row.accuracy.AP, row.accuracy.AP50)]
        table.append([row.model, row.steps, row.precision, row.mode, *scores, time, f"{row.first:.2f}"])
    return (
        f"{format_table(table, names=4)}\n\n"
        f"AP is that of {report.images} images of {report.dataset}. Times are end-to-end, from the image in "
        f"memory to its detections: medians over {report.timed} of these images, with the first and third quartile in "
        "parentheses. On every image all rows run in turn, each once untimed before its time is taken. The time of the "
        "first image includes compiling, which later rows of the same model need not repeat.\n\n"
        f"{report.device}, {date.today().isoformat()}:\n\n    {report.command}\n"
    )


def plot_rows(rows: Sequence[Row]) -> Figure:
    """Plot AP against latency, with one colour per model and one marker per way of running it."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.model for row in rows))}
    ways = dict.fromkeys((row.precision, row.mode) for row in rows)
    markers = {way: "os^Dv<>P*X"[i % 10] for i, way in enumerate(ways)}
    for way, marker in markers.items():
        for name, colour in colours.items():
            alike = [row for row in rows if (row.precision, row.mode) == way and row.model == name]
            alike = sorted((row for row in alike if row.accuracy.AP is not None), key=lambda row: row.time.median)
            if alike:
                x, y = [row.time.median for row in alike], [row.accuracy.AP for row in alike]
                axes.plot(x, y, marker=marker, color=colour, linewidth=1, label=f"{name}, {way[0]}, {way[1]}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("milliseconds an image")
    axes.set_ylabel("AP")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return figure
