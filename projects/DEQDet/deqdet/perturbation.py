"""Refinement-aware perturbation (RAP): noise on the solving path, Sec. 3.3 and Algorithm 1."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .boxes import decode_boxes, encode_boxes
from .structures import QueryState

# When noise enters (Table 4e): before every application of f and carried along; before the last application only;
# on the supervised state itself; never.
KINDS = ("multi-step", "one-step", "zero-step", "none")


@dataclass(frozen=True)
class Perturbation:
    """The sizes of the noise; calling it returns a perturbed copy of a state."""

    kind: str
    probability: float  # v, drawn once a batch for the content and once for the position
    content_size: float  # sigma_q, relative to the norm of each query's content
    position_size: float  # sigma_p, pixels per corner coordinate

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of perturbation {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of a perturbation must lie in [0, 1], got {self.probability}")

    def __call__(self, state: QueryState, generator: Generator | None = None) -> QueryState:
        """Perturb content and position, each with the given probability.

        The draws stay on the state's device: nothing waits for it.

        Args:
            generator: of the state's device; None is torch's own of that device.
        """
        device = state.content.device
        draws = torch.rand(2, device=device, generator=generator) < self.probability
        content = perturb_content(state.content, self.content_size, generator)
        position = perturb_position(state.position, self.position_size, generator)
        return QueryState(
            position=torch.where(draws[0], position, state.position),
            content=torch.where(draws[1], content, state.content),
        )


def perturb_content(content: Tensor, size: float, generator: Generator | None = None) -> Tensor:
    """(B, N, C): (1 - size) q + size ||q||_2 n, n ~ N(0, I) (Eq. 16)."""
    noise = torch.empty_like(content).normal_(generator=generator)
    norm = torch.linalg.vector_norm(content, dim=2, keepdim=True)
    return (1 - size) * content + size * norm * noise


def perturb_position(position: Tensor, size: float, generator: Generator | None = None) -> Tensor:
    """(B, N, 4) cx, cy, z, r: N(0, size^2) pixels on each corner coordinate, corners re-ordered where they flip."""
    boxes = decode_boxes(position)
    boxes = boxes + size * torch.empty_like(boxes).normal_(generator=generator)
    low, high = boxes[..., :2], boxes[..., 2:]
    return encode_boxes(torch.cat([torch.minimum(low, high), torch.maximum(low, high)], dim=-1))
