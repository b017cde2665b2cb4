"""Residuals of one image against the step."""

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .refinement import Refinement


def plot_convergence(refinement: Refinement, title: str, rtol: float) -> Figure:
    """Absolute residuals on the left, relative ones on the right, of content and position, logarithmic.

    Args:
        rtol: drawn beside the relative ones if it is positive.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")  # pyplot would choose a backend
    steps = np.arange(1, refinement.steps + 1)
    style = {"marker": "o", "markersize": 3, "linewidth": 1.2}
    absolute, relative = figure.subplots(1, 2)
    every, found = refinement.shifts, refinement.shifts[:, refinement.detected[:, 0]]
    absolute.plot(steps, _positive(refinement.content[:, 0]), "C0", label="content: ‖f(q) − q‖", **style)
    absolute.plot(steps, _positive(_root_mean_square(every)), "C1", label="corners of all boxes: RMS, px", **style)
    if found.shape[1]:
        style_found = {**style, "markerfacecolor": "white", "linestyle": "--"}
        absolute.plot(
            steps, _positive(_root_mean_square(found)), "C1", label="corners of the detections: RMS, px", **style_found
        )
    relative.plot(steps, _positive(refinement.content[:, 1]), "C0", label="content", **style)
    relative.plot(steps, _positive(refinement.position), "C1", label="position (packed units)", **style)
    relative.plot(
        steps, _positive(refinement.residuals), "k:", label="whole state, as rtol is compared with", linewidth=1.2
    )
    if rtol > 0:
        relative.axhline(rtol, color="gray", linestyle="--", linewidth=1, label=f"rtol = {rtol:g}")
    absolute.set_ylabel("absolute residual")
    relative.set_ylabel("relative residual")
    for axes in (absolute, relative):
        axes.set(xlabel="step", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.suptitle(title, parse_math=False)
    return figure


def _root_mean_square(shifts: Tensor) -> Tensor:
    return shifts.square().mean(dim=1).sqrt()


def _positive(values: Tensor) -> np.ndarray:
    """What a logarithmic axis can show; elsewhere a gap."""
    values = values.numpy()
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
