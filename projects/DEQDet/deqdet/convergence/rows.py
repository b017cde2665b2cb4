"""The rows of the tables, from the paths of all images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..analysis import Cost
from ..equilibrium import first_below
from .accuracy import Accuracy
from .latency import Latency
from .paths import ImagePath, Plan

Evaluate = Callable[[Sequence[ImagePath], Sequence[tuple[int, ...]]], list[Accuracy]]


@dataclass(frozen=True)
class StepsRow:
    """All images after a fixed number of steps: a row of Tables 7 to 9, and more."""

    steps: int
    multiply_adds: int  # of convolutions and linear layers; a solver's own arithmetic is not counted
    seconds: float  # an image
    residual: float | None  # median over the images, of the last step's input; None: it is infinite
    accuracy: Accuracy


@dataclass(frozen=True)
class ToleranceRow:
    """Each image until its relative residual is below rtol, at most `limit` steps."""

    rtol: float  # 0: all images take all steps
    mean_steps: float
    median_steps: float
    percentile_95_steps: float
    saved: float  # percent of the `limit` evaluations of f
    converged: float | None  # percent of the images; None with rtol = 0
    accuracy: Accuracy
    difference: float | None  # AP minus that of rtol = 0


@dataclass(frozen=True)
class Results:
    """Of one solver."""

    name: str
    solver: str  # with its numbers
    latency: Latency
    nonfinite: int  # images whose states became infinite or NaN; they keep the last finite one
    median_residuals: list[float | None]  # of every step, from the first on
    steps: list[StepsRow]
    tolerances: list[ToleranceRow]  # the first one is rtol = 0


def summarize(
    name: str,
    solver: str,
    paths: Sequence[ImagePath],
    *,
    plan: Plan,
    evaluate: Evaluate,
    cost: Cost,
    latency: Latency,
) -> Results:
    """All rows of a solver.

    Args:
        paths: walked with the same plan.
        evaluate: see accuracy.Evaluation.
        cost: of an image, for any number of steps.
    """
    residuals = torch.stack([path.residuals for path in paths], dim=1)  # (T, images)
    # A residual that is NaN is further from convergence than any number.
    medians = [_number(np.median(row)) for row in residuals.nan_to_num(nan=math.inf, posinf=math.inf).numpy()]
    rtols = (0.0, *plan.rtols)
    stops = [tuple(first_below(residuals[: plan.limit], rtol).tolist()) for rtol in rtols]
    accuracies = evaluate(paths, [(step,) * len(paths) for step in plan.steps] + stops)
    rows = [
        StepsRow(
            steps=step,
            multiply_adds=replace(cost, steps=step).total.linear,
            seconds=latency.of(step),
            residual=medians[step - 1],
            accuracy=accuracy,
        )
        for step, accuracy in zip(plan.steps, accuracies[: len(plan.steps)], strict=True)
    ]
    stopped = accuracies[len(plan.steps) :]
    tolerances = [
        _tolerance_row(rtol, stop, paths, accuracy, stopped[0], plan.limit)
        for rtol, stop, accuracy in zip(rtols, stops, stopped, strict=True)
    ]
    nonfinite = sum(not path.finite for path in paths)
    return Results(name, solver, latency, nonfinite, medians, rows, tolerances)


def _tolerance_row(
    rtol: float,
    stops: tuple[int, ...],
    paths: Sequence[ImagePath],
    accuracy: Accuracy,
    baseline: Accuracy,
    limit: int,
) -> ToleranceRow:
    # An image that became infinite leaves the batch then, but with rtol = 0 f is still applied to it.
    taken = [min(path.steps, stop) if rtol else stop for path, stop in zip(paths, stops, strict=True)]
    converged = [bool(path.residuals[stop - 1] < rtol) for path, stop in zip(paths, stops, strict=True)]
    known = accuracy.AP is not None and baseline.AP is not None
    return ToleranceRow(
        rtol=rtol,
        mean_steps=float(np.mean(taken)),
        median_steps=float(np.median(taken)),
        percentile_95_steps=float(np.percentile(taken, 95)),
        saved=100 * (1 - float(np.mean(taken)) / limit),
        converged=100 * float(np.mean(converged)) if rtol else None,
        accuracy=accuracy,
        difference=accuracy.AP - baseline.AP if known else None,
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
