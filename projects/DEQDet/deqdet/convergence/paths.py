"""The way of each image to its fixed point, walked once: every number of steps and every rtol is read off it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from detectron2.modeling import detector_postprocess
from detectron2.structures import Instances

from ..detector import DEQDet
from ..equilibrium import Solver, Status, first_below
from ..inference import top_detections
from ..structures import QueryState


@dataclass(frozen=True)
class Plan:
    """Which states are read off every path."""

    steps: tuple[int, ...]  # numbers of steps, the same for all images
    rtols: tuple[float, ...]  # relative residuals at which each image stops on its own
    limit: int  # the most steps with an rtol, and the number that they are compared with

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
    """What one image came to along T steps of one solver."""

    image_id: int
    steps: int  # applications of f that it took part in: T, or fewer if its states became infinite or NaN
    finite: bool
    residuals: Tensor  # (T,)  relative residual of each step's input
    detections: dict[int, Instances]  # step -> in the pixels of the original image, on the CPU


@torch.no_grad()
def walk_paths(model: DEQDet, batches: Iterable[list[dict]], *, solver: Solver, plan: Plan) -> Iterator[ImagePath]:
    """Solve each batch once, and read out the states that the plan asks for.

    Args:
        model: with an EquilibriumDecoder, in eval mode.
        batches: of detectron2's inputs, as a test loader gives them.

    Yields:
        Each image, in order. T is the largest number of steps in the plan.
    """
    fixed = plan.fixed
    for batch in batches:
        images = model.preprocess(batch)
        features, initial = model.encode(images)
        start = model.decoder.initialize(initial, features)
        solution = model.decoder.solve(start, features, steps=max(fixed), record=plan.record, solver=solver)
        stops = [first_below(solution.residuals[: plan.limit], rtol).tolist() for rtol in plan.rtols]
        detections = {}
        for step in sorted(fixed.union(*stops)):
            state = QueryState.unpack(solution.recorded[step], initial.content.shape[1])
            prediction = model.decoder.refinement.predict(state)
            detections[step] = top_detections(prediction, images.image_sizes, model.max_detections)
        taken, residuals = solution.steps.tolist(), solution.residuals.cpu()
        for index, inputs in enumerate(batch):
            size = inputs["height"], inputs["width"]
            kept = fixed.union(stop[index] for stop in stops)
            yield ImagePath(
                image_id=inputs["image_id"],
                steps=taken[index],
                finite=bool(solution.status[index] != Status.NONFINITE),
                residuals=residuals[:, index].clone(),
                detections={t: detector_postprocess(detections[t][index], *size).to("cpu") for t in sorted(kept)},
            )
