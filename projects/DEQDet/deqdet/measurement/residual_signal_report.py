"""Write the results of the residual signal: tables as Markdown and JSON, and the reliability plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..atomic import write_text
from ..errors import plural
from .corruptions import CLEAN, CONDITIONS, CORRUPTIONS
from .duplicates import CONFIDENT, SAME_OBJECT
from .plots import save_figure
from .rank_statistics import LEVEL, RESAMPLES, Estimate
from .residual_signal import SIGNALS, ConditionRow, DetectionRows, GroupRow, ImageRows
from .tables import format_table, format_value
from .verdicts import NEAR, VERDICTS

BINS = 10  # of the reliability plot: deciles
LEAST_IN_BIN = 5  # images or detections, so that the mean of a bin is more than noise


@dataclass(frozen=True)
class Report:
    """What was measured, and the results."""

    command: str  # so that readers can repeat it
    weights: str
    dataset: str
    images: int
    device: str
    steps: int
    conditions: list[ConditionRow]
    groups: list[GroupRow]


def write_report(report: Report, images: ImageRows, detections: DetectionRows, folder: Path) -> None:
    """Write residual_signal.md, .json (with the numbers of each image) and .png, each atomically.

    Raises:
        UserError: a file cannot be written.
    """
    columns = {
        "image_id": images.image.tolist(),
        "condition": [str(CONDITIONS[index]) for index in images.condition],
        **{key: _finite_list(getattr(images, key)) for key in ("residual", "content_residual", "confidence", "AP")},
    }
    content = asdict(report) | {"each_image": columns}
    save_figure(plot_reliability(images, detections), folder / "residual_signal.png", dpi=110)
    write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", folder / "residual_signal.json")
    write_text(format_report(report), folder / "residual_signal.md")


def _finite_list(column: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in column]


def format_report(report: Report) -> str:
    """Format the Markdown report: images, detections, mistakes, each condition, and the meaning of the columns."""
    return "\n\n".join([
        "## Images: does the signal rank them as their AP does?\n\n" + _images_table(report.groups),
        "## Detections: does the signal put right before wrong?\n\n" + _detections_table(report.groups),
        "## Mistakes: how far have their queries settled?\n\n" + _verdicts_table(report.groups),
        "## Each condition\n\n" + _conditions_table(report.conditions),
        "![AP of images and precision of detections by residual and by confidence](residual_signal.png)",
        "\n".join(f"- {note}" for note in _notes(report)),
    ]) + "\n"  # fmt: skip


def _images_table(groups: Sequence[GroupRow]) -> str:
    rows = [["conditions", "images", *SIGNALS, "residual given confidence"]]
    for row in groups:
        cells = [_format_estimate(row.correlations[name]) for name in SIGNALS]
        rows.append([row.name, str(row.images), *cells, format_value(row.image_partial, "+.2f")])
    return format_table(rows, names=1)


def _detections_table(groups: Sequence[GroupRow]) -> str:
    signals = ["residual of the image", "residual of its query", "score", "residual given score"]
    rows = [["conditions", "right", "wrong", *signals]]
    for row in groups:
        cells = [_format_estimate(row.separations[name], sign="") for name in SIGNALS]
        rows.append([row.name, str(row.right), str(row.wrong), *cells, format_value(row.detection_partial, "+.2f")])
    return format_table(rows, names=1)


def _verdicts_table(groups: Sequence[GroupRow]) -> str:
    rows = [["conditions", *VERDICTS]]
    for row in groups:
        cells = [row.verdicts[name] for name in VERDICTS]
        rows.append([row.name, *(f"{x.count}: {format_value(x.residual, '.2g')}" if x.count else "0" for x in cells)])
    return format_table(rows, names=1)


def _conditions_table(conditions: Sequence[ConditionRow]) -> str:
    signals = [f"rank: {name}" for name in SIGNALS]
    head = ["corruption", "strength", "AP", "AP50", "precision (%)", "residual", "residual of detections", "confidence"]
    rows = [[*head, *signals]]
    for row in conditions:
        accuracy = (row.accuracy.AP, row.accuracy.AP50, row.precision)
        medians = (row.residual, row.content_residual, row.confidence)
        rows.append([
            row.corruption,
            f"{row.strength:g}" if row.strength else "",
            *(format_value(value, ".1f") for value in accuracy),
            *(format_value(value, ".3f") for value in medians),
            *(format_value(row.correlations[name], "+.2f") for name in SIGNALS),
        ])  # fmt: skip
    return format_table(rows, names=1)


def _format_estimate(estimate: Estimate, sign: str = "+") -> str:
    if estimate.low is None or estimate.high is None:
        return format_value(estimate.value, f"{sign}.2f")
    return f"{estimate.value:{sign}.2f} ({estimate.low:{sign}.2f} to {estimate.high:{sign}.2f})"


def _notes(report: Report) -> list[str]:
    strengths = "; ".join(f"{name} is the {kind.meaning}" for name, kind in CORRUPTIONS.items())
    return [
        f"{plural(report.images, 'image')} of {report.dataset}, each under {len(report.conditions)} conditions, after "
        f"{report.steps} steps; weights {report.weights}; {report.device}.",
        f"Images: Spearman's rank correlation of the signal with the COCO AP of the image alone, in brackets the "
        f"{LEVEL:.0%} interval of a bootstrap over images ({RESAMPLES} resamples). The sign of the residuals is "
        "reversed, so that +1 is a perfect signal in every column and 0 none. The AP of an image is the mean over the "
        "classes of its objects; images without objects do not count.",
        "residual: ||f(y) - y|| / ||f(y)|| of the whole state at the last step. residual of detections: the same of "
        f"the contents of the queries whose score is at least {CONFIDENT:g}. confidence: the mean score of these "
        "detections. An image without any is represented by its highest-scoring detection.",
        "residual given confidence, residual given score: Spearman's partial correlation of the residual with the AP, "
        "or of the query's residual with being right, given the score: what the residual adds for a user who knows the "
        "scores. 0 means nothing.",
        f"Detections: those with a score of at least {CONFIDENT:g}, right if their IoU with an object of their class "
        f"that no higher-scoring one has been matched to is at least {SAME_OBJECT:g}. The figure is the probability "
        "that a right detection has a lower residual, or a higher score, than a wrong one; 0.5 is no signal. Interval "
        "as above.",
        "Mistakes: the number of the detections, and the median residual of the content of their queries. double: the "
        "object has been matched already; class: the IoU with an object of another class is at least "
        f"{SAME_OBJECT:g}; box: the IoU with any object is at least {NEAR:g}; nothing: it is lower.",
        "Each condition: medians over the images; rank: the correlation as above, within the condition. Strength of "
        f"{strengths}.",
        f"{date.today().isoformat()}. Command: `{report.command}`",
    ]


def plot_reliability(images: ImageRows, detections: DetectionRows) -> Figure:
    """Draw the AP of images and the precision of detections in each decile of residual and of confidence.

    There is one line for the clean images and one for each corruption. They coincide if a value of the signal means the
    same under all conditions.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained")  # not by pyplot, which would choose a backend
    (image_residual, image_confidence), (query_residual, score) = figure.subplots(2, 2, sharey="row")
    AP, right = images.AP, 100.0 * detections.right
    _plot_deciles(image_residual, images.residual, AP, images.condition)
    _plot_deciles(image_confidence, images.confidence, AP, images.condition)
    _plot_deciles(query_residual, detections.residual, right, detections.condition)
    _plot_deciles(score, detections.score, right, detections.condition)
    image_residual.set(title="Images by residual", ylabel="mean AP of the images", xlabel="residual of the state")
    image_confidence.set(title="Images by confidence", xlabel="mean score of the confident detections")
    query_residual.set(title="Detections by residual", ylabel="right (%)", xlabel="residual of the query's content")
    score.set(title="Detections by confidence", xlabel="score")
    score.plot([CONFIDENT, 1], [100 * CONFIDENT, 100], color="0.5", linestyle=":")
    score.annotate("score = share", (0.75, 73), color="0.4", va="top")
    for axes in (image_residual, query_residual):
        axes.set_xscale("log")
        axes.invert_xaxis()  # trust rises to the right in every panel
        axes.set_xlabel(axes.get_xlabel() + ", falling")
    for axes in figure.axes:
        axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
    image_confidence.legend(frameon=False, loc="lower right")
    return figure


def _plot_deciles(axes: Axes, signal: np.ndarray, outcome: np.ndarray, condition: np.ndarray) -> None:
    """Draw the mean outcome against the median signal of each decile, for clean images and for each corruption."""
    known = np.isfinite(signal) & ~np.isnan(outcome)
    for number, name in enumerate(("clean", *CORRUPTIONS)):
        alike = [index for index, x in enumerate(CONDITIONS) if x.corruption == name]
        mine = known & np.isin(condition, alike)
        points = deciles(signal[mine], outcome[mine])
        clean = name == CLEAN.corruption
        style = {"color": "black", "linewidth": 2.2, "zorder": 3} if clean else {"color": f"C{number - 1}"}
        axes.plot(*points, marker="o", markersize=4, label=name, **style)


def deciles(signal: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute median signal and mean outcome of each decile of the signal, lowest first; few rows give fewer bins."""
    bins = max(1, min(BINS, len(signal) // LEAST_IN_BIN))
    parts = [part for part in np.array_split(np.argsort(signal, kind="stable"), bins) if len(part)]
    medians = np.array([np.median(signal[part]) for part in parts])
    return medians, np.array([outcome[part].mean() for part in parts])
