"""Trace the queries of one image from the initial boxes to the equilibrium, and plot the residuals."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..boxes import decode_boxes
from ..decoders.trajectory import ResidualParts
from ..detector import BatchTrajectory
from ..structures import QueryState


@dataclass(frozen=True)
class Refinement:
    """Boxes, scores and residuals of one image by step. T: steps taken; N: queries; K: classes.

    All tensors are on the CPU; boxes are xyxy, in pixels of the original image. Step 0 is the output of the
    initialization layer g. A residual of step t is that of the iterate to which the step applied f.
    """

    image_size: tuple[int, int]  # height, width of the original image
    initial_boxes: Tensor  # (N, 4)
    boxes: Tensor  # (1 + T, N, 4)  not clipped
    scores: Tensor  # (1 + T, N, K)
    detected: Tensor  # (M, 2)  int64, query and class of the detections after step T, best first, one for each query
    residuals: Tensor  # (T,)  relative, of the whole packed state: what rtol is compared with
    shown: Tensor  # (T,)  of the state that boxes and scores come from; an earlier step's if its state was kept
    parts: ResidualParts  # (T,) each: residuals of content and of position
    shifts: Tensor  # (T, N)  by how much each box changes, clipped: root mean square over x0, y0, x1, y1; pixels

    @property
    def steps(self) -> int:
        """T."""
        return len(self.residuals)


@torch.no_grad()
def trace_refinement(walk: BatchTrajectory, threshold: float) -> Refinement:
    """Read boxes, scores and residuals of every step off the walk of one image.

    Args:
        walk: with record_iterates, and with every step recorded.
        threshold: minimum score of a detection.
    """
    path, (height, width), size = walk.trajectory, walk.images.image_sizes[0], walk.original_sizes[0]
    solution, steps = path.solution, int(path.solution.steps[0])
    scale = path.start.position.new_tensor([size[1] / width, size[0] / height]).repeat(2)
    predictions = [path.predict(step) for step in range(steps + 1)]
    parts = [path.residual_parts(step) for step in range(1, steps + 1)]
    scores = torch.cat([x.logits.float().sigmoid() for x in predictions]).cpu()
    residuals = solution.residuals[:steps, 0].float().cpu()
    shown = residuals.clone()
    for t in range(1, steps):  # a step that is infinite, or worse than the best so far, keeps the state
        if not torch.equal(solution.recorded[t + 1], solution.outputs[t + 1]):
            shown[t] = shown[t - 1]
    return Refinement(
        image_size=size,
        initial_boxes=(scale * decode_boxes(path.initial.position[0])).cpu(),
        boxes=torch.cat([scale * x.boxes for x in predictions]).cpu(),
        scores=scores,
        detected=_detect(scores[-1], threshold, walk.max_detections),
        residuals=residuals,
        shown=shown,
        parts=ResidualParts(
            content=torch.cat([x.content for x in parts]).cpu(),
            position=torch.cat([x.position for x in parts]).cpu(),
            content_norm=torch.cat([x.content_norm for x in parts]).cpu(),
        ),
        shifts=torch.cat([_shift(*path.application(step), scale, size) for step in range(1, steps + 1)]).cpu(),
    )


def _detect(scores: Tensor, threshold: float, most: int) -> Tensor:
    """Select detections from scores (N, K) -> (M, 2), see Refinement.detected."""
    best, order = scores.flatten().topk(min(most, scores.numel()))
    pairs = torch.stack([order // scores.shape[1], order % scores.shape[1]], dim=1)[best >= threshold]
    seen: dict[int, int] = {}
    for query, label in pairs.tolist():
        seen.setdefault(query, label)
    return torch.tensor(list(seen.items()), dtype=torch.int64).reshape(-1, 2)


def _shift(iterate: QueryState, output: QueryState, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute (1, N), see Refinement.shifts. Both boxes are clipped to the image, as detections are."""
    limits = scale.new_tensor([size[1], size[0]]).repeat(2)
    before, after = (torch.minimum((scale * decode_boxes(x.position)).clamp(min=0), limits) for x in (iterate, output))
    return (after - before).square().mean(dim=2).sqrt()


def plot_convergence(refinement: Refinement, title: str, rtol: float) -> Figure:
    """Plot the residuals of content and position against the step, absolute on the left, relative on the right.

    Args:
        rtol: drawn as a line in the relative plot if it is positive.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")  # not by pyplot, which would choose a backend
    axes_absolute, axes_relative = figure.subplots(1, 2)
    parts, every = refinement.parts, refinement.shifts
    found = every[:, refinement.detected[:, 0]]
    absolute = [
        (parts.content_norm, "C0-o", "content: ‖f(q) − q‖"),
        (_rms(every), "C1-o", "corners of all boxes: RMS, px"),
    ]
    if found.shape[1]:
        absolute.append((_rms(found), "C1--s", "corners of the detections: RMS, px"))
    relative = [
        (parts.content, "C0-o", "content"),
        (parts.position, "C1-o", "position (packing units)"),
        (refinement.residuals, "k:", "both together, compared with rtol"),
    ]
    for axes, kind, lines in ((axes_absolute, "absolute", absolute), (axes_relative, "relative", relative)):
        for values, style, label in lines:
            # A logarithmic axis has a gap where a value is 0 or not finite.
            shown = torch.where(values.isfinite() & (values > 0), values, torch.nan).numpy()
            axes.plot(np.arange(1, len(shown) + 1), shown, style, label=label, markersize=3, linewidth=1.2)
        axes.set(xlabel="step", ylabel=f"{kind} residual", yscale="log")
    if rtol > 0:
        axes_relative.axhline(rtol, color="gray", linestyle="--", linewidth=1, label=f"rtol = {rtol:g}")
    for axes in (axes_absolute, axes_relative):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.suptitle(title, parse_math=False)
    return figure


def _rms(shifts: Tensor) -> Tensor:
    return shifts.square().mean(dim=1).sqrt()
