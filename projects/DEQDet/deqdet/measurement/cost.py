"""Parameters of a detector, and multiply-adds of its parts on one image at test time, with fvcore's counters.

Multiply-adds are counted in two ways:

- "linear", the paper's: convolutions and linear layers. The projections inside nn.MultiheadAttention are left out,
  because the paper's counter hooks modules and does not see them.
- "all": every operator that fvcore can count, and three that it cannot (attention, RoIAlign, embedding_bag). Beyond
  "linear", these are attention's projections and its two products; the other matrix products; 4 for each value that
  grid_sample returns, and 4 for each bilinear sample of RoIAlign; normalization, 5 per value (4 without an affine part;
  BatchNorm 2); 1 per value of the FPN's upsampling. Elementwise functions, softmax, pooling and reductions count as 0.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from detectron2.evaluation import inference_context

from ..decoders import Decoder, Execution
from ..detector import DEQDet
from ..errors import UserError
from ..layers import RefinementLayer
from ..structures import QueryState


@dataclass(frozen=True)
class Parameters:
    """The parameter counts of a model, including frozen parameters."""

    total: int
    modules: dict[str, int]  # by name; modules without parameters are left out


def count_parameters(model: nn.Module) -> Parameters:
    """Count parameters, including frozen ones; shared ones count once. FrozenBatchNorm2d only has buffers."""
    counts = parameter_count(model)
    modules = {name: counts[name] for name, _ in model.named_modules() if name and name in counts}
    return Parameters(counts[""], modules)


def format_parameters(parameters: Parameters, depth: int = 3) -> str:
    """Format a table of parameters in millions, for modules down to `depth`, each indented below its parent."""
    rows = {name: count for name, count in parameters.modules.items() if name.count(".") < depth}
    labels = ["  " * name.count(".") + name.rpartition(".")[2] for name in rows]
    width = max(map(len, ["Parameters", *labels]))
    lines = [f"{label:{width}}  {count / 1e6:10.3f} M" for label, count in zip(labels, rows.values(), strict=True)]
    return "\n".join(["Parameters", *lines, f"{'total':{width}}  {parameters.total / 1e6:10.3f} M"])


@dataclass(frozen=True)
class MultiplyAdds:
    """The multiply-adds of one part, counted in both ways."""

    linear: int
    all: int

    def __add__(self, other: "MultiplyAdds") -> "MultiplyAdds":
        return MultiplyAdds(self.linear + other.linear, self.all + other.all)

    def __sub__(self, other: "MultiplyAdds") -> "MultiplyAdds":
        return MultiplyAdds(self.linear - other.linear, self.all - other.all)

    def __mul__(self, times: int) -> "MultiplyAdds":
        return MultiplyAdds(self.linear * times, self.all * times)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a detector on one image."""

    image_size: tuple[int, int]  # height, width, pixels
    padded_size: tuple[int, int]  # the size that the backbone gets
    steps: int
    backbone: MultiplyAdds
    neck: MultiplyAdds
    initialization: MultiplyAdds  # with its read-out; 0 without such a layer
    per_step: MultiplyAdds  # with its read-out, as in the paper's figures; our decoders read out the last step only
    read_out: MultiplyAdds  # of one step

    @property
    def total(self) -> MultiplyAdds:
        """Backbone, neck, initialization layer and all steps; the initial queries cost next to nothing."""
        return self.backbone + self.neck + self.initialization + self.per_step * self.steps

    def to_dict(self) -> dict[str, Any]:
        """Return the same for JSON, first by counting method and then by part."""
        parts = ("backbone", "neck", "initialization", "per_step", "read_out", "total")
        counts = {part: asdict(getattr(self, part)) for part in parts}
        ways = {way: {part: counts[part][way] for part in parts} for way in ("linear", "all")}
        return {"image_size": self.image_size, "padded_size": self.padded_size, "steps": self.steps, **ways}


def format_cost(cost: Cost) -> str:
    """Format a table of the parts, in billions of multiply-adds (the paper's GFLOPS)."""
    rows = {
        "backbone": cost.backbone,
        "neck": cost.neck,
        "initialization layer": cost.initialization,
        "one step": cost.per_step,
        f"{cost.steps} steps": cost.per_step * cost.steps,
        "total": cost.total,
    }
    (height, width), (padded_height, padded_width) = cost.image_size, cost.padded_size
    title = f"Multiply-adds at {height} x {width} pixels, padded to {padded_height} x {padded_width}"
    head = f"{'':20}  {'linear':>10}    {'all':>10}"
    lines = [f"{name:20}  {row.linear / 1e9:10.3f} G  {row.all / 1e9:10.3f} G" for name, row in rows.items()]
    return "\n".join([title, head, *lines])


@torch.no_grad()
def count_multiply_adds(model: DEQDet, *, steps: int | None = None, height: int = 800, width: int = 1333) -> Cost:
    """Run each part once on an empty image, and count its multiply-adds.

    Args:
        model: its training mode is restored afterwards.
        steps: see plan_execution.
        height, width: size of the image in pixels, before the model pads it.

    Raises:
        UserError: see plan_execution and trace.
    """
    execution = plan_execution(model.decoder, steps)
    with inference_context(model):
        images = model.preprocess([{"image": torch.zeros(3, height, width, device=model.device)}]).tensor
        backbone = trace(model.backbone, images)
        initial = model.queries(torch.tensor([[width, height]], dtype=torch.float32, device=model.device))
        features = _empty_features(model, images)
        refinement, read_out = _count_layer(execution.refinement, initial, features)
        initialization = MultiplyAdds(0, 0)
        if execution.initialization is not None:
            initialization = sum(_count_layer(execution.initialization, initial, features), start=initialization)
    body = backbone.get("bottom_up", backbone[""])  # the whole backbone if it has no neck
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


def plan_execution(decoder: Decoder, steps: int | None = None) -> Execution:
    """Determine which layers run at test time, and how often.

    Args:
        steps: number of refinement layers after the initialization layer (or the first layer); None: the decoder's own
            number. Only a decoder with an equilibrium accepts a different number.

    Raises:
        UserError: the decoder does not accept this number of steps.
    """
    execution = decoder.execution()
    if steps is None or steps == execution.steps:
        return execution
    if not decoder.has_equilibrium:
        raise UserError(
            f"a {type(decoder).__name__} of {execution.steps + 1} layers takes {execution.steps} steps after the "
            f"first layer, not {steps}: leave the number of steps out, or change MODEL.DEQDET.NUM_LAYERS"
        )
    if steps < 1:
        raise UserError(f"the number of steps must be at least 1, got {steps}")
    return replace(execution, steps=steps)


@torch.no_grad()
def trace(module: nn.Module, *inputs: Tensor) -> dict[str, MultiplyAdds]:
    """Run a module once, and count the multiply-adds of its submodules by name; "" is the module itself.

    Args:
        inputs: tensors on the CPU or a GPU; fvcore's tracer does not accept meta tensors.

    Raises:
        UserError: the number of samples of an RoIAlign is not fixed.
    """
    analysis = FlopCountAnalysis(module, inputs).tracer_warnings("none")
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _count_attention)
    analysis.set_op_handle("torchvision::roi_align", _count_roi_align)
    analysis.set_op_handle("aten::embedding_bag", _count_bags)
    with _unfused_attention():
        operators = analysis.by_module_and_operator()
    linear = {name: counts["conv"] + counts["linear"] for name, counts in operators.items()}
    for hidden, child in module.named_modules():
        if isinstance(child, nn.MultiheadAttention):
            parents = [name for name in linear if not name or f"{hidden}.".startswith(f"{name}.")]
            linear |= {name: linear[name] - operators[hidden]["linear"] for name in parents}
    return {name: MultiplyAdds(linear[name], int(sum(counts.values()))) for name, counts in operators.items()}


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Disable the fast path of nn.MultiheadAttention, a single operator that would hide the projections."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _count_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count Q K^T and its product with V, for Q (B, heads, N, E), K (B, heads, M, E) and V (B, heads, M, F)."""
    query, (keys, value_dim) = get_shape(inputs[0]), get_shape(inputs[2])[2:]
    return math.prod(query[:3]) * keys * (query[3] + value_dim)


def _count_roi_align(inputs: list[Any], outputs: list[Any]) -> int:
    """Count 4 for each of the ratio x ratio bilinear samples of an output value; inputs[5] is the ratio."""
    if (ratio := inputs[5].toIValue()) < 1:
        raise UserError(
            f"RoIAlign with sampling ratio {ratio} takes more samples for larger boxes: "
            "set MODEL.DEQDET.SPARSE_RCNN.POOLER_SAMPLING_RATIO to at least 1"
        )
    return math.prod(get_shape(outputs[0])) * ratio**2 * 4


def _count_bags(inputs: list[Any], outputs: list[Any]) -> int:
    """Count 1 for each value of a row in a bag, which gives the count of grid_sample or RoIAlign for these samples."""
    table, index = get_shape(inputs[0]), get_shape(inputs[1])
    return math.prod(index) * table[1]


def _empty_features(model: DEQDet, images: Tensor) -> list[Tensor]:
    """Make a pyramid of zeros, which saves a second run of the backbone."""
    shapes = [model.backbone.output_shape()[name] for name in model.in_features]
    sizes = [[-(-side // shape.stride) for side in images.shape[2:]] for shape in shapes]
    return [images.new_zeros(1, shape.channels, *size) for shape, size in zip(shapes, sizes, strict=True)]


def _count_layer(layer: RefinementLayer, state: QueryState, features: list[Tensor]) -> list[MultiplyAdds]:
    """Count the multiply-adds of one refinement and of one read-out."""
    inputs = (state.position, state.content)
    return [trace(_OnTensors(layer), *inputs, *features)[""], trace(_OnTensors(layer), *inputs)[""]]


class _OnTensors(nn.Module):
    """A layer with tensors as inputs and outputs, for the tracer: its forward, or without features its predict."""

    def __init__(self, layer: RefinementLayer):
        super().__init__()
        self.layer = layer

    def forward(self, position: Tensor, content: Tensor, *features: Tensor) -> tuple[Tensor, Tensor]:
        state = QueryState(position, content)
        if not features:
            prediction = self.layer.predict(state)
            return prediction.logits, prediction.boxes
        state = self.layer(state, list(features))
        return state.position, state.content
