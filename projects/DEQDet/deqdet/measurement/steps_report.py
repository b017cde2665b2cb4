"""Write the results of all solvers: tables as Markdown and JSON, and a plot."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from ..atomic import write_text
from ..errors import plural
from .accuracy import Accuracy
from .cost import Cost
from .duplicates import DUPLICATE_COLUMNS, DUPLICATES_NOTE
from .json_numbers import number_or_nan
from .plots import save_figure
from .steps import Results
from .tables import format_table, format_value

METRICS = tuple(field.name for field in fields(Accuracy))
PLAIN = "plain"  # its rows form the paper's Tables 7 and 8; those of the other solvers form Table 9
MARKERS = "osD^vPX<>*"  # one for each rtol
LEAST_RANGE = 3.0  # minimum range of an AP axis, so that noise does not fill the panel


@dataclass(frozen=True)
class Report:
    """What was evaluated, and the results."""

    command: str  # so that readers can repeat it
    weights: str
    dataset: str
    images: int
    device: str
    limit: int  # TEST_STEPS, the maximum number of steps with an rtol
    cost: Cost  # for an image of the first one's size
    results: list[Results]


def write_report(report: Report, folder: Path) -> None:
    """Write steps.md, steps.json and steps.png into `folder`, each atomically.

    Raises:
        UserError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(format_report(report), folder / "steps.md")
    content = asdict(report) | {"cost": report.cost.to_dict()}
    write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", folder / "steps.json")
    plot_results(report.results, folder / "steps.png")


def format_report(report: Report) -> str:
    """Format the Markdown report: AP against steps by solver, AP against rtol, and the meaning of the columns."""
    plain = [results for results in report.results if results.name == PLAIN]
    others = [results for results in report.results if results.name != PLAIN]
    parts = []
    if plain:
        parts.append("## Steps of plain iteration\n\n" + _steps_table(plain, named=False))
    if others:
        parts.append("## Steps of other solvers\n\n" + _steps_table(others, named=True))
    parts.append("## Stopping at a relative residual\n\n" + _tolerance_table(report.results))
    parts.append("![AP and residual against steps, AP against mean steps with an rtol](steps.png)")
    parts.append("\n".join(f"- {note}" for note in _notes(report)))
    return "\n\n".join(parts) + "\n"


def _steps_table(several: Sequence[Results], *, named: bool) -> str:
    """Format the columns of Tables 7 and 8, residual and latency; with `named`, after the solver, as in Table 9."""
    doubles = [heading for heading, *_ in DUPLICATE_COLUMNS]
    rows = [["solver"] * named + ["multiply-adds (G)", "steps", *METRICS, *doubles, "residual", "s / image"]]
    for results in several:
        for row in results.steps:
            # Two decimals as in the paper, four for a small model.
            billions = f"{row.multiply_adds / 1e9:.{2 if row.multiply_adds >= 1e10 else 4}f}"
            metrics = [format_value(getattr(row.accuracy, name), ".1f") for name in METRICS]
            metrics += [format_value(getattr(row.duplicates, key), form) for _, key, form in DUPLICATE_COLUMNS]
            cells = [billions, str(row.steps), *metrics, format_value(row.residual, ".3g"), f"{row.seconds:.3g}"]
            rows.append([results.name] * named + cells)
    return format_table(rows, names=int(named))


def _tolerance_table(several: Sequence[Results]) -> str:
    head = ["solver", "rtol", "mean steps", "median", "95th percentile", "saved (%)", "converged (%)", "AP", "change"]
    rows = [[*head, "AP, fixed steps"]]
    for results in several:
        for row in results.tolerances:
            steps = (row.mean_steps, row.median_steps, row.percentile_95_steps)
            shares = (row.saved, row.converged, row.accuracy.AP)
            cells = [f"{row.rtol:g}", *(format_value(value, ".1f") for value in steps + shares)]
            change = None if row.difference is None else round(row.difference, 1) + 0.0  # no -0.0
            rows.append([results.name, *cells, format_value(change, "+.1f"), format_value(row.AP_fixed, ".1f")])
    return format_table(rows, names=1)


def _notes(report: Report) -> list[str]:
    (height, width), (padded_height, padded_width) = report.cost.image_size, report.cost.padded_size
    solvers = ", ".join(f"{results.name}: {results.solver}" for results in report.results)
    failed = ", ".join(f"{results.nonfinite} with {results.name}" for results in report.results if results.nonfinite)
    return [
        f"{plural(report.images, 'image')} of {report.dataset}, weights {report.weights}.",
        *([f"Images whose states became infinite or NaN, and that keep the last finite one: {failed}."] * bool(failed)),
        f"Solvers: {solvers}. Each image is walked once with each solver; every row is read off that path.",
        f"Multiply-adds of convolutions and linear layers, as the paper counts them, on an image of {height} x {width} "
        f"pixels, the size of the first one, padded to {padded_height} x {padded_width}; without the solver's "
        "arithmetic.",
        DUPLICATES_NOTE,
        "residual: median over the images of ||f(y) - y|| / ||f(y)||, where y is the iterate of the last step: the "
        "number that is compared with rtol after that step.",
        f"s / image: one image at a time, without loading it, on {report.device}: the time before and after the steps, "
        "plus the number of steps times that of one step; medians.",
        f"rtol: an image stops after the first step whose residual is below it, at the latest after {report.limit} "
        f"(TEST_STEPS). saved: share of the {report.limit} evaluations of f for each image. converged: images below "
        f"rtol. change: of AP, from rtol 0, which is {report.limit} steps. AP, fixed steps: the AP of all images after "
        "the same number of steps, the row's mean steps, at the same cost; interpolated linearly between the two "
        "nearest rows of the steps table. A tolerance saves time only where its AP is above that.",
        f"{date.today().isoformat()}. Command: `{report.command}`",
    ]


def plot_results(several: Sequence[Results], path: Path) -> None:
    """Plot AP and residual against steps, and AP with rtol, in three panels with one colour per solver."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")  # not by pyplot, which would choose a backend
    accuracy, residual, tolerance = figure.subplots(1, 3)
    for axes in (accuracy, residual):
        axes.set(xlabel="steps", xscale="log")
    residual.set_yscale("log")  # before plotting: a logarithmic axis fails on data that are all NaN
    colours = matplotlib.colormaps["tab10"].colors
    for results, colour in zip(several, cycle(colours), strict=False):
        steps, found = [row.steps for row in results.steps], [number_or_nan(row.accuracy.AP) for row in results.steps]
        accuracy.plot(steps, found, color=colour, marker="o", markersize=4, label=results.name)
        residuals = [number_or_nan(value) for value in results.median_residuals]
        residual.plot(range(1, len(residuals) + 1), residuals, color=colour)
        _plot_tolerances(tolerance, results, colour)
    steps = sorted({row.steps for results in several for row in results.steps})
    last = max((len(results.median_residuals) for results in several), default=1)
    for axes, ticks in ((accuracy, steps), (residual, sorted({*_round_numbers(last), *steps, last}))):
        axes.xaxis.set_major_locator(FixedLocator(_spread(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
    accuracy.set(ylabel="AP", title="AP after each number of steps")
    residual.set(ylabel="relative residual", title="Median residual of each step")
    tolerance.set(xlabel="mean steps of an image", ylabel="AP", title="AP when each image stops at rtol")
    tolerance.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (accuracy, tolerance):
        low, high = axes.get_ylim()
        margin = max(0.0, LEAST_RANGE - (high - low)) / 2
        low = max(0.0, low - margin)  # AP is not negative
        axes.set_ylim(low, max(high + margin, low + LEAST_RANGE))
    for axes in (accuracy, residual, tolerance):
        axes.grid(alpha=0.3)
    accuracy.legend(frameon=False)
    handles = [
        Line2D([], [], color="0.4", linestyle="", marker=marker, label=f"{row.rtol:g}" if row.rtol else "0: all steps")
        for row, marker in zip(several[0].tolerances, cycle(MARKERS), strict=False)
    ]
    tolerance.legend(handles=handles, title="rtol", frameon=False)
    save_figure(figure, path)


def _plot_tolerances(axes: Axes, results: Results, colour: tuple[float, ...]) -> None:
    """Draw a marker for each rtol, connected in the order of the mean steps."""
    points = [(row.mean_steps, number_or_nan(row.accuracy.AP)) for row in results.tolerances]
    axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.8, alpha=0.6)
    for point, marker in zip(points, cycle(MARKERS), strict=False):
        axes.plot(*point, color=colour, marker=marker, markersize=6, linestyle="")


def _round_numbers(last: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `last`."""
    return [digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5) if digit * 10**power <= last]


def _spread(ticks: Sequence[int]) -> list[int]:
    """Choose ticks whose labels do not overlap on a logarithmic axis; the last tick is always kept."""
    gap = 0.045 * math.log(ticks[-1] / ticks[0])
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= gap:
            kept.append(tick)
    if kept[-1] != ticks[-1]:
        kept[-1] = ticks[-1]
    return kept
