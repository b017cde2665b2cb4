"""Refinement-aware perturbation (RAP): noise on the solving path in training (Sec. 3.3, Eq. 13 to 16, Algorithm 1).

With it, the layer learns to refine states that are worse than those it produces itself.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .boxes import decode_boxes, encode_boxes
from .structures import QueryState

# Where the equilibrium decoder adds the noise (Table 4e): before every application of f, so that it travels along the
# path (Eq. 15); only before the last application (Eq. 14); to the supervised state itself (Eq. 13); nowhere.
KINDS = ("multi-step", "one-step", "zero-step", "none")


@dataclass(frozen=True)
class Perturbation:
    """The kind and size of the noise. Calling a Perturbation returns a perturbed copy of a state."""

    kind: str
    probability: float  # v, for content and position each; the whole batch is perturbed or none of it
    content_size: float  # sigma_q, relative to the norm of the content of each query
    position_size: float  # sigma_p, the standard deviation of each corner coordinate in pixels

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of perturbation {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of a perturbation must lie in [0, 1], got {self.probability}")

    def __call__(self, state: QueryState, generator: Generator | None = None) -> QueryState:
        """Perturb content and position, each with the given probability.

        Both perturbations are always computed, and torch.where selects: a Python condition on the random draw would
        make the host wait for the device.

        Args:
            state: position (B, N, 4), content (B, N, C).
            generator: draws the noise, on the device of the state; None takes torch's global generator.
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
    """Return (1 - size) q + size ||q||_2 n with n ~ N(0, I), for the content q of each query (Eq. 16). (B, N, C)."""
    noise = torch.empty_like(content).normal_(generator=generator)
    norm = torch.linalg.vector_norm(content, dim=2, keepdim=True)
    return torch.addcmul((1 - size) * content, norm, noise, value=size)


def perturb_position(position: Tensor, size: float, generator: Generator | None = None) -> Tensor:
    """Add noise N(0, size^2) in pixels to the corners of each box (Sec. 3.3), and swap corners that become inverted.

    Args:
        position: (B, N, 4) cx, cy, z, r.
        size: sigma_p, pixels.
        generator: see Perturbation.__call__.

    Returns:
        (B, N, 4) cx, cy, z, r.
    """
    if size == 0:
        return position  # encode_boxes would enlarge sides below 0.001 pixels
    boxes = decode_boxes(position)
    boxes = torch.add(boxes, torch.empty_like(boxes).normal_(generator=generator), alpha=size)
    return encode_boxes(boxes, flipped=True)
