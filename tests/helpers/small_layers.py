"""Small refinement layers, and states and features for them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deqdet.layers import AdaMixerLayer, RefinementLayer, SparseRCNNLayer
from deqdet.structures import QueryState

STRIDES = [4, 8, 16]
DIM, HEADS, CLASSES = 16, 2, 3
GROUPS, POINTS, OUT_POINTS = 4, 3, 5  # AdaMixer's
SIDE, DYNAMIC_DIM = 3, 6  # Sparse R-CNN's


def make_adamixer(**changed) -> AdaMixerLayer:
    torch.manual_seed(0)
    numbers = {
        "strides": STRIDES,
        "dim": DIM,
        "num_classes": CLASSES,
        "num_points": POINTS,
        "num_out_points": OUT_POINTS,
        "num_groups": GROUPS,
        "num_heads": HEADS,
        "feedforward_dim": 24,
    }
    return AdaMixerLayer(**(numbers | changed))


def make_sparse_rcnn(**changed) -> SparseRCNNLayer:
    torch.manual_seed(0)
    numbers = {
        "strides": STRIDES,
        "dim": DIM,
        "num_classes": CLASSES,
        "pooler_resolution": SIDE,
        "pooler_sampling_ratio": 2,
        "dynamic_dim": DYNAMIC_DIM,
        "num_class_layers": 1,
        "num_box_layers": 3,
        "num_heads": HEADS,
        "feedforward_dim": 24,
    }
    return SparseRCNNLayer(**(numbers | changed))


@dataclass(frozen=True)
class LayerCase:
    """A layer and the size of the images that suit it."""

    make: Callable[..., RefinementLayer]
    scale: int  # of images and boxes
    octaves: float  # how much boxes differ in scale

    def features(self, images: int = 2) -> list[Tensor]:
        """Of 32 x 48 pixels, times the scale."""
        generator = torch.Generator().manual_seed(1)
        sizes = [(self.scale * 32 // stride, self.scale * 48 // stride) for stride in STRIDES]
        return [torch.randn(images, DIM, h, w, generator=generator) for h, w in sizes]

    def state(self, rows: int = 2, queries: int = 4) -> QueryState:
        """Boxes of 5 pixels or more, times the scale, overlapping, some beyond the image's edge."""
        generator = torch.Generator().manual_seed(2)
        ranges = torch.tensor([48.0 * self.scale, 32.0 * self.scale, self.octaves, 3.0])
        lowest = torch.tensor([0.0, 0.0, 2.5 + math.log2(self.scale), -1.5])
        position = torch.rand(rows, queries, 4, generator=generator) * ranges + lowest
        return QueryState(position, torch.randn(rows, queries, DIM, generator=generator))


ADAMIXER = LayerCase(make_adamixer, scale=1, octaves=2.0)  # boxes of some 5 to 30 pixels
SPARSE_RCNN = LayerCase(make_sparse_rcnn, scale=4, octaves=4.0)  # 23 to 360 pixels: all of RoIAlign's levels
CASES = {"AdaMixerLayer": ADAMIXER, "SparseRCNNLayer": SPARSE_RCNN}  # by the name in the config


def other_than_xavier(module: nn.Module, fans: dict[str, tuple[int, int]]) -> list[str]:
    """Of weights by their fan-in and fan-out, the names of those that are not U(-b, b), b = sqrt(6 / (in + out))."""
    others = []
    for name, pair in fans.items():
        bound = math.sqrt(6 / sum(pair))
        weight = module.get_parameter(name).detach()
        reach, spread = weight.abs().max() / bound, weight.std() * math.sqrt(3) / bound
        if not (0.95 < reach <= 1 + 1e-6 and 0.9 < spread < 1.1):
            others.append(f"{name}: up to {reach:.2f} of the bound, {spread:.2f} of the deviation")
    return others


def norm_weights(module: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)}
