"""AP and residual against steps, and what rtol makes of them, in one picture."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from .rows import Results

MARKERS = "osD^vPX<>*"  # of the rtols
LEAST_RANGE = 3.0  # that an axis of AP spans


def plot_results(several: Sequence[Results], path: Path) -> None:
    """Three panels, a colour for each solver."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")  # pyplot would choose a backend
    accuracy, residual, tolerance = figure.subplots(1, 3)
    for axes in (accuracy, residual):
        axes.set(xlabel="steps", xscale="log")
    residual.set_yscale("log")  # before there are data: it would not have NaN alone
    colours = matplotlib.colormaps["tab10"].colors
    for index, results in enumerate(several):
        colour = colours[index % len(colours)]
        _plot_steps(accuracy, residual, results, colour)
        _plot_tolerances(tolerance, results, colour)
    steps = sorted({row.steps for results in several for row in results.steps})
    for axes, ticks in ((accuracy, steps), (residual, sorted({1, 2, *steps}))):
        axes.xaxis.set_major_locator(FixedLocator(_spread(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
    accuracy.set(ylabel="AP", title="AP after so many steps")
    residual.set(ylabel="relative residual", title="Median residual of each step")
    tolerance.set(xlabel="mean steps of an image", ylabel="AP", title="AP when each image stops at rtol")
    tolerance.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (accuracy, residual, tolerance):
        axes.grid(alpha=0.3)
    for axes in (accuracy, tolerance):
        _widen(axes)
    accuracy.legend(frameon=False)
    handles = [
        Line2D([], [], color="0.4", linestyle="", marker=marker, label=f"{row.rtol:g}" if row.rtol else "0: all steps")
        for row, marker in zip(several[0].tolerances, cycle(MARKERS), strict=False)
    ]
    tolerance.legend(handles=handles, title="rtol", frameon=False)
    figure.savefig(path, dpi=120)


def _plot_steps(accuracy: Axes, residual: Axes, results: Results, colour: tuple[float, ...]) -> None:
    steps, found = [row.steps for row in results.steps], [_number(row.accuracy.AP) for row in results.steps]
    accuracy.plot(steps, found, color=colour, marker="o", markersize=4, label=results.name)
    residuals = [_number(value) for value in results.median_residuals]
    residual.plot(range(1, len(residuals) + 1), residuals, color=colour)


def _plot_tolerances(axes: Axes, results: Results, colour: tuple[float, ...]) -> None:
    """A marker for each rtol, joined in the order of their steps."""
    points = [(row.mean_steps, _number(row.accuracy.AP)) for row in results.tolerances]
    axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.8, alpha=0.6)
    for point, marker in zip(points, cycle(MARKERS), strict=False):
        axes.plot(*point, color=colour, marker=marker, markersize=6, linestyle="")


def _widen(axes: Axes) -> None:
    """At least LEAST_RANGE of AP, lest noise fills the panel."""
    low, high = axes.get_ylim()
    margin = max(0.0, LEAST_RANGE - (high - low)) / 2
    axes.set_ylim(low - margin, high + margin)


def _spread(ticks: Sequence[int]) -> list[int]:
    """Those of the rising numbers whose labels do not touch on a logarithmic axis."""
    gap = 0.045 * math.log(ticks[-1] / ticks[0])
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= gap:
            kept.append(tick)
    return kept


def _number(value: float | None) -> float:
    return math.nan if value is None else value
