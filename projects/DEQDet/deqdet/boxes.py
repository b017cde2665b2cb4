"""Boxes as positions (cx, cy, z, r) (Eq. 3) and as corners xyxy: pure functions, with all lengths in pixels.

A position has the centre (cx, cy), the scale z = log2 sqrt(w h) and the aspect ratio r = log2(h / w). Any four real
numbers make a valid box, as long as its area is finite in the floating-point type (in float32, |z| < 64). A solver may
therefore add and extrapolate positions. Corners treated in this way could come out inverted, with x2 < x1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The natural logarithm of 6,250, the largest factor by which one refinement by deltas enlarges a side (as in R-CNN).
MAX_LOG_SCALE = math.log(100000 / 16)


@dataclass(frozen=True)
class BoxGeometry:
    """All functions of the boxes that the parts of a refinement layer need, computed once in a step."""

    corners: Tensor  # (..., 4)  xyxy, pixels
    area: Tensor  # (...)  w h, square pixels
    point_scale: Tensor  # (..., 3)  w, h, 1: the units of a sampling point's offset
    delta_scale: Tensor  # (..., 4)  2^z, 2^z, 1, 1: the units of a refinement, see refine_position

    @classmethod
    def of(cls, position: Tensor, exponents: Tensor) -> "BoxGeometry":
        """Compute the geometry of positions (..., 4) cx, cy, z, r; `exponents` is the result of geometry_exponents."""
        z, r = position[..., 2:].split(1, dim=-1)
        of_z, of_r = exponents
        # Every number, including 1 = 2^0, is 2^(a z + b r) for some a and b, so that one exponential computes them all.
        powers = torch.addcmul(z * of_z, r, of_r).exp2()  # (..., 8)
        point_scale, delta_scale, area = powers.split([3, 4, 1], dim=-1)
        center, sizes = position[..., None, :2], powers[..., None, :2]
        corners = torch.addcmul(center, sizes, of_r[:2, None])  # of_r begins with -1/2, 1/2
        return cls(corners.flatten(-2), area.squeeze(-1), point_scale, delta_scale)


def geometry_exponents() -> Tensor:
    """Return the factors (2, 8) of z and r in the exponents of BoxGeometry's numbers; a layer keeps them in a buffer.

    By Eq. 3, w = 2^(z - r / 2), h = 2^(z + r / 2) and w h = 2^(2 z).
    """
    return torch.tensor([[1.0, 1, 0, 1, 1, 0, 0, 2], [-0.5, 0.5, 0, 0, 0, 0, 0, 0]])


def decode_boxes(position: Tensor) -> Tensor:
    """Convert positions (..., 4) cx, cy, z, r to corners (..., 4) xyxy, by the inverse of Eq. 3."""
    halves = _halves(position)
    center, sizes = position[..., None, :2], _sizes(position, halves)[..., None, :]
    return torch.addcmul(center, sizes, halves[:, None]).flatten(-2)  # (..., 2 corners, 2) -> (..., 4)


def box_sizes(position: Tensor) -> Tensor:
    """Compute the sides (..., 2), width and height, of positions (..., 4) cx, cy, z, r."""
    return _sizes(position, _halves(position))


def _sizes(position: Tensor, halves: Tensor) -> Tensor:
    z, r = position[..., 2:].split(1, dim=-1)
    # Eq. 3 says 2^z = sqrt(w h) and 2^r = h / w, so that w = 2^(z - r / 2) and h = 2^(z + r / 2).
    return torch.addcmul(z, r, halves).exp2()


def _halves(position: Tensor) -> Tensor:
    """Return -1/2 and 1/2, (2,), computed on the device of the position, so that nothing is copied to it."""
    return torch.linspace(-0.5, 0.5, 2, dtype=position.dtype, device=position.device)


def encode_boxes(boxes: Tensor, min_size: float = 1e-3, flipped: bool = False) -> Tensor:
    """Convert corners (..., 4) xyxy to positions (..., 4) cx, cy, z, r (Eq. 3).

    Args:
        min_size: the smallest side, in pixels. Shorter sides are set to it, so that an empty box has finite logarithms.
        flipped: whether corners may come in either order. If not, a box with x2 < x1 counts as empty.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    sides = (high - low).abs() if flipped else high - low
    width, height = sides.clamp(min=min_size).log2().split(1, dim=-1)
    return torch.cat([torch.lerp(low, high, 0.5), torch.lerp(width, height, 0.5), height - width], dim=-1)


def refine_position(position: Tensor, delta: Tensor, scale: Tensor | None = None) -> Tensor:
    """Move boxes as AdaMixer does (Sec. 3.4): cx += d_x 2^z, cy += d_y 2^z, z += d_z, r += d_r.

    Since 2^z = sqrt(w h), the shift is relative to the size of the box.

    Args:
        position: (..., 4) cx, cy, z, r.
        delta: (..., 4) d_x, d_y, d_z, d_r, perhaps in a lower precision.
        scale: (..., 4) 2^z, 2^z, 1, 1, if the caller has computed it. Only without it does a gradient reach z through
            the shift.

    Returns:
        (..., 4) cx, cy, z, r.
    """
    delta = delta.to(position.dtype)
    if scale is not None:
        return torch.addcmul(position, delta, scale)
    scale = position[..., 2:3].exp2()
    center = torch.addcmul(position[..., :2], delta[..., :2], scale)
    return torch.cat([center, position[..., 2:] + delta[..., 2:]], dim=-1)


def refine_position_by_deltas(position: Tensor, deltas: Tensor) -> Tensor:
    """Move boxes as R-CNN does, with the weights (2, 2, 1, 1) by which Sparse R-CNN divides the deltas.

    In terms of the sides, cx += w dx / 2, cy += h dy / 2, w *= exp(dw) and h *= exp(dh), where both factors are limited
    to 6,250. With z = log2 sqrt(w h) and r = log2(h / w), the last two become z += (dw + dh) / (2 ln 2) and
    r += (dh - dw) / ln 2.

    Args:
        position: (..., 4) cx, cy, z, r.
        deltas: (..., 4) dx, dy, dw, dh, perhaps in a lower precision.

    Returns:
        (..., 4) cx, cy, z, r.
    """
    shift, log_scale = deltas.to(position.dtype).split(2, dim=-1)
    width, height = log_scale.clamp(max=MAX_LOG_SCALE).unbind(-1)
    center = position[..., :2] + 0.5 * shift * box_sizes(position)
    change = torch.stack([0.5 * (width + height), height - width], dim=-1) / math.log(2)
    return torch.cat([center, position[..., 2:] + change], dim=-1)


def pairwise_intersection(boxes: Tensor) -> Tensor:
    """Compute the intersection areas (B, N, N), in square pixels, of all pairs of boxes (B, N, 4) xyxy."""
    # (2 corners, 2 axes, B, N): with the boxes last, the arithmetic runs over contiguous memory.
    corners = boxes.unflatten(-1, (2, 2)).movedim((-2, -1), (0, 1))
    # On each axis the overlap begins and ends at the corners of box i, clamped into box j. Exchanging i and j would
    # give the same values in a tensor that is not contiguous, which fast attention kernels do not accept as a bias.
    start, end = corners[..., None].clamp(corners[0, ..., None, :], corners[1, ..., None, :])  # (2, B, N_i, N_j) each
    width, height = end - start
    return width * height


def embed_position(
    position: Tensor, dim: int, temperature: float = 10000.0, waves: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Embed positions by sines and cosines of many wavelengths, like the positional encoding of the Transformer.

    Each of the four coordinates v gets d = dim / 4 features. Feature i is the sine (i even) or cosine (i odd) of
    v / temperature^(2 floor(i / 2) / d): short wavelengths distinguish close positions, long ones order distant
    positions. cx and cy are first divided by 1000, which brings pixels to about the range of z and r.

    Args:
        position: (B, N, 4) cx, cy, z, r.
        dim: the number of features, a multiple of 8.
        temperature: approximately the ratio of the longest to the shortest wavelength.
        waves: the result of `embedding_waves` for this dim and temperature, if the caller has kept it.

    Returns:
        (B, N, dim), the features of cx first, then those of cy, z and r.
    """
    if waves is None:
        waves = embedding_waves(dim, temperature, dtype=position.dtype, device=position.device)
    frequency, phase = waves
    return torch.addcmul(phase, position[..., None], frequency).sin().flatten(2)  # (B, N, 4, d) -> (B, N, dim)


def embedding_waves(
    dim: int, temperature: float = 10000.0, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return the frequencies (4, d) and phases (d,) of `embed_position`. A cosine is a sine with phase pi / 2."""
    features = torch.arange(dim // 4, device=device)
    exponents = (features // 2).to(dtype or torch.get_default_dtype()) * (-2.0 / (dim // 4))
    frequency = temperature**exponents
    phase = (features % 2).to(frequency.dtype) * (math.pi / 2)
    return torch.stack([frequency / 1000.0, frequency / 1000.0, frequency, frequency]), phase
