"""Boxes in the chart (cx, cy, z, r) of Eq. 3 and as corners xyxy: pure functions, all lengths in pixels.

Every real vector of the chart is a valid box, so a solver may combine states affinely; corners could come out
inverted.
"""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(100000 / 16)  # of one refinement by deltas, as in R-CNN


def decode_boxes(position: Tensor) -> Tensor:
    """(..., 4) cx, cy, z, r -> (..., 4) xyxy, the inverse of Eq. 3."""
    center = position[..., :2]
    half = 0.5 * box_sizes(position)
    return torch.cat([center - half, center + half], dim=-1)


def box_sizes(position: Tensor) -> Tensor:
    """(..., 4) cx, cy, z, r -> (..., 2) width, height."""
    z, r = position[..., 2:].unbind(-1)
    return torch.stack([z - 0.5 * r, z + 0.5 * r], dim=-1).exp2()


def encode_boxes(boxes: Tensor, min_size: float = 1e-3) -> Tensor:
    """(..., 4) xyxy -> (..., 4) cx, cy, z, r (Eq. 3).

    Args:
        min_size: sides below this many pixels count as this long, so that an empty box has a finite code.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    width, height = (high - low).clamp(min=min_size).log2().unbind(-1)
    scale = torch.stack([0.5 * (width + height), height - width], dim=-1)
    return torch.cat([0.5 * (low + high), scale], dim=-1)


def refine_position(position: Tensor, delta: Tensor) -> Tensor:
    """Move boxes by (d_x, d_y, d_z, d_r): d_x, d_y in units of 2^z, the box's own scale (AdaMixer, Sec. 3.4).

    Args:
        position: (..., 4) cx, cy, z, r.
        delta: (..., 4).
    """
    scale = position[..., 2:3].exp2()
    return torch.cat([position[..., :2] + delta[..., :2] * scale, position[..., 2:] + delta[..., 2:]], dim=-1)


def refine_position_by_deltas(position: Tensor, deltas: Tensor) -> Tensor:
    """Move boxes by R-CNN's deltas (dx, dy, dw, dh), with Sparse R-CNN's weights (2, 2, 1, 1).

    dx, dy are in halves of the box's width and height; the sides are multiplied by e^dw, e^dh, at most 6,250.

    Args:
        position: (..., 4) cx, cy, z, r.
        deltas: (..., 4).
    """
    shift, log_scale = deltas.split(2, dim=-1)
    width, height = log_scale.clamp(max=MAX_LOG_SCALE).unbind(-1)
    center = position[..., :2] + 0.5 * shift * box_sizes(position)
    change = torch.stack([0.5 * (width + height), height - width], dim=-1) / math.log(2)
    return torch.cat([center, position[..., 2:] + change], dim=-1)


def pairwise_iof(boxes: Tensor, min_area: float = 1e-6) -> Tensor:
    """(B, N, 4) xyxy -> (B, N, N): how much of box i lies within box j, |b_i & b_j| / |b_i|.

    Args:
        min_area: the floor of |b_i|, square pixels.
    """
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)  # (B, N, N)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)  # (B, N)
    return overlap / area.clamp(min=min_area)[:, :, None]


def embed_position(position: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """(B, N, 4) cx, cy, z, r -> (B, N, dim): sine embedding, dim / 4 features for each coordinate.

    cx and cy are divided by 1000; z and r are taken as they are. Feature i of a coordinate v is
    sin (i even) or cos (i odd) of v / temperature^(2 floor(i / 2) / (dim / 4)).
    """
    coordinates = torch.cat([position[..., :2] / 1000.0, position[..., 2:]], dim=-1)
    features = torch.arange(dim // 4, device=position.device)
    frequency = temperature ** (-2.0 * (features // 2).to(position.dtype) / (dim // 4))
    angles = coordinates[..., None] * frequency  # (B, N, 4, dim / 4)
    return torch.where(features % 2 == 0, angles.sin(), angles.cos()).flatten(2)
