"""A refinement layer that can be followed by hand."""

import torch
from torch import Tensor, nn

from deqdet.layers import RefinementLayer
from deqdet.structures import Prediction, QueryState


class ToyLayer(RefinementLayer):
    """q <- a q + b + c cx + x, cx <- cx + d; contents of one channel; x, a number an image, is the feature.

    Unlike a real layer it reads the position as it is given, so that it shows what the decoder detaches.
    """

    accepts_segments = True

    def __init__(self, a: float, b: float, c: float, d: float):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([a, b, c, d], dtype=torch.float64))
        self.calls: list[bool] = []  # of each: are gradients recorded?

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        self.calls.append(torch.is_grad_enabled())
        a, b, c, d = self.numbers
        x = features[0].repeat(len(state.content) // len(features[0]), 1, 1)  # state by state
        content = a * state.content + b + c * state.position[..., :1] + x
        cx, rest = state.position.split([1, 3], dim=2)
        return QueryState(torch.cat([cx + d, rest], dim=2), content)

    def predict(self, state: QueryState) -> Prediction:
        """The state itself."""
        return Prediction(state.content, state.position)


INITIAL = QueryState(
    torch.tensor([10.0, 20.0, 5.0, 0.0], dtype=torch.float64).expand(2, 1, 4),
    torch.zeros(2, 1, 1, dtype=torch.float64),
)
FEATURES = [torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1)]  # x of the two images


def read(prediction: Prediction, image: int = 0) -> tuple[float, float]:
    """(q, cx)"""
    return prediction.logits[image].item(), prediction.boxes[image, 0, 0].item()


def gradients(value: Tensor, *inputs: Tensor) -> list[list[float] | None]:
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return [None if x is None else x.flatten().tolist() for x in found]
