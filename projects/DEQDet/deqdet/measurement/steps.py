"""AP and residual of an equilibrium detector against steps, solver and tolerance (the paper's Tables 7 to 9).

Each image is solved once with each solver. Its state after any number of steps, and the step at which it would stop
with any tolerance, are read off that one path.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.structures import Instances

from ..decoders import build_solver
from ..detector import DEQDet
from ..equilibrium import Solver, Status, first_below
from ..errors import UserError
from .accuracy import Accuracy
from .cost import Cost
from .duplicates import Duplicates, content_distances
from .json_numbers import finite_or_none
from .timing import Latency


def build_solvers(cfg: CfgNode, specs: Sequence[str]) -> dict[str, Solver]:
    """Build solvers from short names ("plain", "anderson4"). Equal solvers are built once, under their first name.

    Raises:
        UserError: a name is unknown, or a number out of range.
    """
    solvers: dict[str, Solver] = {}
    for spec in specs:
        try:
            solver = build_solver(cfg, spec)
        except ValueError as error:
            raise UserError(str(error)) from error
        if solver not in solvers.values():
            solvers[spec] = solver
    return solvers


@dataclass(frozen=True)
class Plan:
    """The states to read off every path."""

    steps: tuple[int, ...]  # numbers of steps, the same for all images
    rtols: tuple[float, ...]  # relative residuals at which an image stops
    limit: int  # maximum number of steps with an rtol, and the reference without one

    def __post_init__(self) -> None:
        if wrong := [step for step in (*self.steps, self.limit) if step < 1]:
            raise ValueError(f"a number of steps must be at least 1, got {wrong[0]}")
        if wrong := [rtol for rtol in self.rtols if not 0 < rtol < math.inf]:
            raise ValueError(f"an rtol must be a number above 0, got {wrong[0]}")

    @property
    def fixed(self) -> set[int]:
        """Steps after which every image is read out."""
        return {*self.steps, self.limit}

    @property
    def record(self) -> set[int]:
        """Steps after which some image may be read out."""
        return self.fixed.union(range(1, self.limit + 1)) if self.rtols else self.fixed


@dataclass(frozen=True)
class ImagePath:
    """One image along T steps of one solver."""

    image_id: int
    steps: int  # applications of f: T, or fewer if the state became infinite or NaN
    finite: bool
    residuals: Tensor  # (T,)  relative residual of each step's iterate
    detections: dict[int, Instances]  # step -> detections in the pixels of the original image, on the CPU
    distances: dict[int, Tensor]  # step -> (D, D) of the confident detections, see duplicates.content_distances


@torch.no_grad()
def walk_paths(model: DEQDet, batches: Iterable[list[dict]], *, solver: Solver, plan: Plan) -> Iterator[ImagePath]:
    """Walk each batch once, and read out the states that the plan asks for.

    Args:
        model: in evaluation mode.
        batches: detectron2's inputs, as from a test loader.

    Yields:
        The path of each image, in order. T is the largest number of steps in the plan.

    Raises:
        UserError: the decoder has no equilibrium.
    """
    fixed = plan.fixed
    for batch in batches:
        walk = model.walk(batch, steps=max(fixed), rtol=0.0, solver=solver, record=plan.record)
        solution = walk.trajectory.solution
        stops = [first_below(solution.residuals[: plan.limit], rtol).tolist() for rtol in plan.rtols]
        detections = {step: walk.detections(step) for step in sorted(fixed.union(*stops))}
        contents = {step: walk.trajectory.state(step).content for step in plan.steps}
        taken, residuals = solution.steps.tolist(), solution.residuals.cpu()
        for index, inputs in enumerate(batch):
            kept = fixed.union(stop[index] for stop in stops)
            yield ImagePath(
                image_id=inputs["image_id"],
                steps=taken[index],
                finite=bool(solution.status[index] != Status.NONFINITE),
                residuals=residuals[:, index].clone(),
                detections={step: detections[step][index].to("cpu") for step in sorted(kept)},
                distances={
                    step: content_distances(detections[step][index], content[index]).cpu()
                    for step, content in contents.items()
                },
            )


@dataclass(frozen=True)
class StepsRow:
    """All images after a fixed number of steps: a row of Tables 7 to 9, with residual and latency."""

    steps: int
    multiply_adds: int  # of convolutions and linear layers; a solver's own arithmetic is not counted
    seconds: float  # per image
    residual: float | None  # of the last step's iterate, median over the images; None if it is infinite
    accuracy: Accuracy
    duplicates: Duplicates


@dataclass(frozen=True)
class ToleranceRow:
    """All images, each stopped when its relative residual is below rtol, or after `limit` steps."""

    rtol: float  # 0: all images take all steps
    mean_steps: float
    median_steps: float
    percentile_95_steps: float
    saved: float  # percent of the `limit` evaluations of f
    converged: float | None  # percent of the images; None with rtol = 0
    accuracy: Accuracy
    difference: float | None  # AP minus that of rtol = 0
    AP_fixed: float | None  # if all images take mean_steps steps, interpolated; None outside the steps rows


@dataclass(frozen=True)
class Results:
    """All rows of one solver."""

    name: str
    solver: str  # with its options
    latency: Latency
    nonfinite: int  # images whose states became infinite or NaN; they keep the last finite one
    median_residuals: list[float | None]  # of every step, beginning with the first
    steps: list[StepsRow]
    tolerances: list[ToleranceRow]  # the first one is rtol = 0


def summarize(
    name: str,
    solver: str,
    paths: Sequence[ImagePath],
    *,
    plan: Plan,
    evaluate: Callable[[Sequence[ImagePath], Sequence[tuple[int, ...]]], list[Accuracy]],
    count_duplicates: Callable[[Sequence[ImagePath], int], Duplicates],
    cost: Cost,
    latency: Latency,
) -> Results:
    """Compute all rows of a solver from the paths of all images.

    Args:
        paths: walked with the same plan.
        evaluate: see accuracy.Evaluation.
        count_duplicates: see duplicates.DuplicateCounter.
        cost: the cost of an image, with any number of steps.
    """
    residuals = torch.stack([path.residuals for path in paths], dim=1)  # (T, images)
    # NaN counts as infinite, that is, as not converged.
    medians = np.median(residuals.nan_to_num(nan=math.inf, posinf=math.inf).numpy(), axis=1).tolist()
    medians = [finite_or_none(value) for value in medians]
    rtols = (0.0, *plan.rtols)
    stops = [first_below(residuals[: plan.limit], rtol) for rtol in rtols]
    same = [(step,) * len(paths) for step in plan.steps]
    accuracies = evaluate(paths, same + [tuple(stop.tolist()) for stop in stops])
    rows = [
        StepsRow(
            steps=step,
            multiply_adds=replace(cost, steps=step).total.linear,
            seconds=latency.of(step),
            residual=medians[step - 1],
            accuracy=accuracy,
            duplicates=count_duplicates(paths, step),
        )
        for step, accuracy in zip(plan.steps, accuracies, strict=False)
    ]
    tolerances, accuracies = [], accuracies[len(plan.steps) :]
    fixed = {row.steps: row.accuracy.AP for row in rows} | {plan.limit: accuracies[0].AP}
    for rtol, stop, accuracy in zip(rtols, stops, accuracies, strict=True):
        # With an rtol, an image whose state is infinite leaves the batch; with rtol = 0, f is still applied to it.
        taken = np.minimum([path.steps for path in paths] if rtol else plan.limit, stop.numpy())
        converged = residuals.gather(0, stop[None] - 1) < rtol
        known = accuracy.AP is not None and accuracies[0].AP is not None
        tolerances.append(
            ToleranceRow(
                rtol=rtol,
                mean_steps=float(np.mean(taken)),
                median_steps=float(np.median(taken)),
                percentile_95_steps=float(np.percentile(taken, 95)),
                saved=100 * (1 - float(np.mean(taken)) / plan.limit),
                converged=100 * float(converged.double().mean()) if rtol else None,
                accuracy=accuracy,
                difference=accuracy.AP - accuracies[0].AP if known else None,
                AP_fixed=_interpolate(fixed, float(np.mean(taken))),
            )
        )
    nonfinite = sum(not path.finite for path in paths)
    return Results(name, solver, latency, nonfinite, medians, rows, tolerances)


def _interpolate(fixed: dict[int, float | None], steps: float) -> float | None:
    """Interpolate AP linearly between the two nearest fixed numbers of steps; None outside their range."""
    known = {step: value for step, value in sorted(fixed.items()) if value is not None}
    if not known or not min(known) <= steps <= max(known):
        return None
    return float(np.interp(steps, list(known), list(known.values())))
