"""What the decoders of the small config (conftest.py) are tried on, in float64."""

import torch
from torch import Tensor

from detectron2.layers import ShapeSpec

from deqdet.structures import Prediction, QueryState

SHAPES = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=32, stride=16)]


def make_problem(images: int = 2) -> tuple[QueryState, list[Tensor]]:
    """Initial queries and features that ask for gradients, of images of 64 x 96 pixels."""
    generator = torch.Generator().manual_seed(5)
    draw = {"generator": generator, "dtype": torch.float64}
    position = torch.rand(images, 6, 4, **draw) * torch.tensor([96.0, 64.0, 2.0, 2.0])
    initial = QueryState(
        (position + torch.tensor([0.0, 0.0, 3.0, -1.0])).requires_grad_(),
        torch.randn(images, 6, 32, **draw).requires_grad_(),
    )
    return initial, [torch.randn(images, 32, 64 // s, 96 // s, **draw).requires_grad_() for s in (8, 16)]


def loss(prediction: Prediction) -> Tensor:
    """Any smooth number of some size."""
    return prediction.logits.sigmoid().square().sum() + (prediction.boxes / 100).sin().sum()
