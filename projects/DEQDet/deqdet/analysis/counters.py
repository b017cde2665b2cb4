"""fvcore's counters of multiply-adds, with what they lack.

Two ways of counting:

- "linear", the paper's: convolutions and linear layers, without what runs inside nn.MultiheadAttention, whose
  projections a counter that hooks modules does not see.
- "all": every operator that fvcore has a count for, and the two that it lacks. So besides "linear": attention's
  projections and its two products; the other matrix products; 4 for each value that grid_sample returns, and 4
  for each bilinear sample of RoIAlign; normalization, 5 per value (4 without an affine part; BatchNorm 2); 1 per
  value of the FPN's upsampling. Elementwise functions, softmax, pooling and reductions count nothing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn


@dataclass(frozen=True)
class MultiplyAdds:
    """One part's multiply-adds, counted in both ways."""

    linear: int
    all: int

    def __add__(self, other: "MultiplyAdds") -> "MultiplyAdds":
        return MultiplyAdds(self.linear + other.linear, self.all + other.all)

    def __sub__(self, other: "MultiplyAdds") -> "MultiplyAdds":
        return MultiplyAdds(self.linear - other.linear, self.all - other.all)

    def __mul__(self, times: int) -> "MultiplyAdds":
        return MultiplyAdds(self.linear * times, self.all * times)


@torch.no_grad()
def trace(module: nn.Module, *inputs: Tensor) -> dict[str, MultiplyAdds]:
    """Run a module once and count by submodule; "" is the module itself.

    Args:
        inputs: on the CPU or a GPU; the tracer does not go through meta tensors.

    Raises:
        ValueError: an RoIAlign has no fixed number of samples.
    """
    analysis = FlopCountAnalysis(module, inputs).tracer_warnings("none")
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _count_attention)
    analysis.set_op_handle("torchvision::roi_align", _count_roi_align)
    with _unfused_attention():
        operators = analysis.by_module_and_operator()
    linear = {name: counts["conv"] + counts["linear"] for name, counts in operators.items()}
    hidden = [name for name, child in module.named_modules() if isinstance(child, nn.MultiheadAttention)]
    return {
        name: MultiplyAdds(
            linear=linear[name] - sum(linear[child] for child in hidden if _contains(name, child)),
            all=int(sum(counts.values())),
        )
        for name, counts in operators.items()
    }


def _contains(parent: str, child: str) -> bool:
    return not parent or f"{child}.".startswith(f"{parent}.")


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """nn.MultiheadAttention in several operators; without gradient it would be one, which hides its projections."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _count_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Q K^T and its product with V, for Q (B, heads, N, E), K (B, heads, M, E) and V (B, heads, M, F)."""
    query, (keys, value_dim) = get_shape(inputs[0]), get_shape(inputs[2])[2:]
    return math.prod(query[:3]) * keys * (query[3] + value_dim)


def _count_roi_align(inputs: list[Any], outputs: list[Any]) -> int:
    """4 for each of the ratio x ratio bilinear samples of an output value; inputs[5] is the ratio."""
    if (ratio := inputs[5].toIValue()) < 1:
        raise ValueError(
            f"RoIAlign with sampling ratio {ratio} takes the more samples the larger a box is: "
            "set MODEL.DEQDET.SPARSE_RCNN.POOLER_SAMPLING_RATIO to at least 1"
        )
    return math.prod(get_shape(outputs[0])) * ratio**2 * 4
