"""How the queries of one image moved, from the initial boxes to the equilibrium."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..boxes import decode_boxes
from ..detector import DEQDet
from ..equilibrium import relative_residual
from ..structures import QueryState


@dataclass(frozen=True)
class Refinement:
    """T: steps taken; N: queries; K: classes. All on the CPU; boxes are xyxy, in pixels of the original image.

    Step 0 is the initialization layer g. A residual of step t is that of the state y that the step started from.
    """

    image_size: tuple[int, int]  # height, width of the original image
    initial_boxes: Tensor  # (N, 4)
    boxes: Tensor  # (1 + T, N, 4)  not clipped
    scores: Tensor  # (1 + T, N, K)
    detected: Tensor  # (M, 2)  int64, query and class of the detections after step T, best first, one a query
    residuals: Tensor  # (T,)  relative, of the whole packed state: what rtol is compared with
    shown: Tensor  # (T,)  the same, of the state that boxes and scores come from: the best one so far with RETURN_BEST
    content: Tensor  # (T, 2)  ||f(q) - q||, and relative
    position: Tensor  # (T,)  relative, packed
    shifts: Tensor  # (T, N)  by how much each box changes, clipped: root mean square over x0, y0, x1, y1; pixels

    @property
    def steps(self) -> int:
        """T."""
        return len(self.residuals)


@dataclass(frozen=True)
class _Application:
    """Of f to a state, both (1, N, ...)."""

    value: QueryState
    image: QueryState


@torch.no_grad()
def trace_refinement(model: DEQDet, inputs: dict, threshold: float) -> Refinement:
    """Solve one image's equilibrium as the model does at test time, and keep every state.

    Args:
        model: in eval mode, with an EquilibriumDecoder.
        inputs: of the model, with "height" and "width" of the original image.
        threshold: the lowest score of a detection.
    """
    decoder, most_steps = model.decoder, model.decoder.test_steps
    images = model.preprocess([inputs])
    features, initial = model.encode(images)
    start = decoder.initialize(initial, features)
    applied: list[_Application] = []
    # What a solver applies f to is not among the recorded states.
    hook = decoder.refinement.register_forward_hook(lambda _, args, image: applied.append(_Application(args[0], image)))
    try:
        solution = decoder.solve(start, features, steps=most_steps, rtol=decoder.rtol, record=range(most_steps + 1))
    finally:
        hook.remove()
    steps, num_queries = int(solution.steps[0]), initial.content.shape[1]
    applied = applied[:steps]  # with rtol = 0 even a state that became infinite goes on
    first = decoder.refinement if decoder.initialization is None else decoder.initialization
    states = [QueryState.unpack(solution.recorded[t], num_queries) for t in range(1, steps + 1)]
    predictions = [first.predict(start), *(decoder.refinement.predict(state) for state in states)]
    size, (height, width) = (inputs["height"], inputs["width"]), images.image_sizes[0]
    scale = start.position.new_tensor([size[1] / width, size[0] / height]).repeat(2)
    residuals = solution.residuals[:steps, 0].float().cpu()
    scores = torch.cat([x.logits.float().sigmoid() for x in predictions]).cpu()
    return Refinement(
        image_size=size,
        initial_boxes=(scale * decode_boxes(initial.position[0])).cpu(),
        boxes=torch.cat([scale * x.boxes for x in predictions]).cpu(),
        scores=scores,
        detected=_detect(scores[-1], threshold, model.max_detections),
        residuals=residuals,
        shown=_lowest_so_far(residuals) if decoder.return_best else residuals,
        content=torch.stack([_content_residual(x) for x in applied]).cpu(),
        position=torch.cat([_position_residual(x) for x in applied]).cpu(),
        shifts=torch.cat([_shift(x, scale, size) for x in applied]).cpu(),
    )


def _detect(scores: Tensor, threshold: float, most: int) -> Tensor:
    """(N, K) -> (M, 2), see Refinement.detected."""
    best, order = scores.flatten().topk(min(most, scores.numel()))
    pairs = torch.stack([order // scores.shape[1], order % scores.shape[1]], dim=1)[best >= threshold]
    seen: dict[int, int] = {}
    for query, label in pairs.tolist():
        seen.setdefault(query, label)
    return torch.tensor(list(seen.items()), dtype=torch.int64).reshape(-1, 2)


def _lowest_so_far(residuals: Tensor) -> Tensor:
    """(T,) -> (T,); NaN is higher than any."""
    return residuals.nan_to_num(nan=torch.inf, posinf=torch.inf).cummin(dim=0).values


def _content_residual(applied: _Application) -> Tensor:
    """(2,), see Refinement.content."""
    value, image = applied.value.content.flatten(1), applied.image.content.flatten(1)
    return torch.cat([torch.linalg.vector_norm(image - value, dim=1), relative_residual(value, image)])


def _position_residual(applied: _Application) -> Tensor:
    """(1,)"""
    value, image = (QueryState(x.position, x.content[..., :0]).pack() for x in (applied.value, applied.image))
    return relative_residual(value, image)


def _shift(applied: _Application, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, N), see Refinement.shifts: within the image, as detections are clipped to it."""
    limits = scale.new_tensor([size[1], size[0]]).repeat(2)
    boxes = [scale * decode_boxes(x.position) for x in (applied.value, applied.image)]
    value, image = (torch.minimum(x.clamp(min=0), limits) for x in boxes)
    return (image - value).square().mean(dim=2).sqrt()
