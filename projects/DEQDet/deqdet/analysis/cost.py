"""Multiply-adds of a detector's parts on one image, at test time."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..decoders import EquilibriumDecoder, RecurrentDecoder, StackedDecoder
from ..detector import DEQDet
from ..layers import RefinementLayer
from ..structures import QueryState
from .counters import MultiplyAdds, trace


@dataclass(frozen=True)
class Execution:
    """The layers that run at test time: `initialization` once, if there is one, then `refinement` `steps` times."""

    initialization: RefinementLayer | None
    refinement: RefinementLayer  # of untied layers the last one: they differ in their weights only
    steps: int


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a detector on one image."""

    image_size: tuple[int, int]  # height, width, pixels
    padded_size: tuple[int, int]  # the same as the backbone gets it
    steps: int
    backbone: MultiplyAdds
    neck: MultiplyAdds
    initialization: MultiplyAdds  # with its read-out; 0 where there is no such layer
    per_step: MultiplyAdds  # with its read-out, as in the paper's figures; our decoders read out the last step only
    read_out: MultiplyAdds  # of one step

    @property
    def total(self) -> MultiplyAdds:
        """Backbone, neck, initialization layer and all steps; the initial queries cost next to nothing."""
        return self.backbone + self.neck + self.initialization + self.per_step * self.steps

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the way of counting first, then the part."""
        parts = ("backbone", "neck", "initialization", "per_step", "read_out", "total")
        counts = {part: asdict(getattr(self, part)) for part in parts}
        ways = {way: {part: counts[part][way] for part in parts} for way in ("linear", "all")}
        return {"image_size": self.image_size, "padded_size": self.padded_size, "steps": self.steps, **ways}


def plan_execution(decoder: nn.Module, steps: int | None = None) -> Execution:
    """How often which layer runs at test time.

    Args:
        steps: refinement layers after the initialization layer (or the first); None for the decoder's own number.
            Only an EquilibriumDecoder takes another.

    Raises:
        ValueError: the decoder does not take that many steps, or is none of the known ones.
    """
    if isinstance(decoder, EquilibriumDecoder):
        steps = decoder.test_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"the number of steps must be at least 1, got {steps}")
        return Execution(decoder.initialization, decoder.refinement, steps)
    if isinstance(decoder, RecurrentDecoder):
        execution = Execution(decoder.initialization, decoder.refinement, decoder.num_layers - 1)
    elif isinstance(decoder, StackedDecoder):
        execution = Execution(decoder.layers[0], decoder.layers[-1], len(decoder.layers) - 1)
    else:
        raise ValueError(f"{type(decoder).__name__}: it is not known how often this decoder applies its layers")
    if steps not in (None, execution.steps):
        raise ValueError(
            f"a {type(decoder).__name__} of {execution.steps + 1} layers takes {execution.steps} steps after the "
            f"first layer, not {steps}: leave the number of steps out, or change MODEL.DEQDET.NUM_LAYERS"
        )
    return execution


@torch.no_grad()
def count_multiply_adds(model: DEQDet, *, steps: int | None = None, height: int = 800, width: int = 1333) -> Cost:
    """Run each part once on an empty image and count.

    Args:
        model: its training mode is restored afterwards.
        steps: see plan_execution.
        height, width: of the image, pixels; it is padded as the model pads it.

    Raises:
        ValueError: as plan_execution and trace.
    """
    execution = plan_execution(model.decoder, steps)
    training = model.training
    model.eval()
    images = model.preprocess([{"image": torch.zeros(3, height, width, device=model.device)}]).tensor
    backbone = trace(model.backbone, images)
    body = backbone.get("bottom_up", backbone[""])  # all of it, where there is no neck
    initial = model.queries(torch.tensor([[width, height]], dtype=torch.float32, device=model.device))
    features = _empty_features(model, images)
    refinement, read_out = _count_layer(execution.refinement, initial, features)
    initialization = MultiplyAdds(0, 0)
    if execution.initialization is not None:
        initialization = sum(_count_layer(execution.initialization, initial, features), start=initialization)
    model.train(training)
    return Cost(
        image_size=(height, width),
        padded_size=tuple(images.shape[2:]),
        steps=execution.steps,
        backbone=body,
        neck=backbone[""] - body,
        initialization=initialization,
        per_step=refinement + read_out,
        read_out=read_out,
    )


def _empty_features(model: DEQDet, images: Tensor) -> list[Tensor]:
    """Zeros in the shapes of the pyramid, which spares a second run of the backbone."""
    shapes = [model.backbone.output_shape()[name] for name in model.in_features]
    sizes = [[-(-side // shape.stride) for side in images.shape[2:]] for shape in shapes]
    return [images.new_zeros(1, shape.channels, *size) for shape, size in zip(shapes, sizes, strict=True)]


def _count_layer(
    layer: RefinementLayer, state: QueryState, features: list[Tensor]
) -> tuple[MultiplyAdds, MultiplyAdds]:
    """One refinement, and one read-out."""
    refinement = trace(_Refinement(layer), state.position, state.content, *features)
    read_out = trace(_ReadOut(layer), state.position, state.content)
    return refinement[""], read_out[""]


class _Refinement(nn.Module):
    """A layer's forward on tensors alone, as the tracer wants it."""

    def __init__(self, layer: RefinementLayer):
        super().__init__()
        self.layer = layer

    def forward(self, position: Tensor, content: Tensor, *features: Tensor) -> tuple[Tensor, Tensor]:
        state = self.layer(QueryState(position, content), list(features))
        return state.position, state.content


class _ReadOut(_Refinement):
    """A layer's predict, likewise."""

    def forward(self, position: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.layer.predict(QueryState(position, content))
        return prediction.logits, prediction.boxes
