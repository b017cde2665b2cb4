"""Adaptive 3D sampling of a feature pyramid (AdaMixer, CVPR 2022, Sec. 3.2).

B: images, S: segments, N: queries, G: groups, P: points, C: channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..boxes import box_sizes


class SamplingPoints(nn.Module):
    """Queries -> P points (x, y, depth) for each group, around and above each box."""

    def __init__(self, *, dim: int, num_groups: int, num_points: int):
        super().__init__()
        self.num_groups = num_groups
        self.num_points = num_points
        self.offsets = nn.Linear(dim, num_groups * num_points * 3)
        self._init_weights()

    def _init_weights(self) -> None:
        """No dependence on the query at first: a grid over the box, one level finer than the box's own."""
        nn.init.zeros_(self.offsets.weight)
        bias = self.offsets.bias.data.view(self.num_groups, self.num_points, 3)
        bias[..., 2] = -1.0
        side = math.isqrt(self.num_points)
        if side * side == self.num_points:
            centers = (torch.arange(side) + 0.5) / side - 0.5
            bias[..., :2] = torch.cartesian_prod(centers, centers).flip(-1)
        else:
            nn.init.uniform_(bias[..., :2], -0.5, 0.5)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        """
        Args:
            content: (B, N, C).
            position: (B, N, 4) cx, cy, z, r.

        Returns:
            (B, N, G, P, 3): x, y in pixels, depth in octaves (log2 of pixels).
        """
        offsets = self.offsets(content).unflatten(2, (self.num_groups, self.num_points, 3))
        center, depth = position[:, :, None, None, :2], position[:, :, None, None, 2:3]
        size = box_sizes(position)[:, :, None, None]  # (B, N, 1, 1, 2)
        return torch.cat([center + offsets[..., :2] * size, depth + offsets[..., 2:]], dim=-1)


def sample_pyramid(features: list[Tensor], strides: list[int], points: Tensor) -> Tensor:
    """Bilinear within the levels, Gaussian across them: softmax over l of -(depth - log2 s_l)^2 / 2.

    Group g reads channels g * C/G to (g + 1) * C/G. Outside the padded input everything is zero.

    Args:
        features: per level (B, C, H_l, W_l).
        strides: s_l, pixels per cell.
        points: (S * B, N, G, P, 3), segment-major; x, y in pixels of the padded input, depth in octaves.

    Returns:
        (S * B, N, G, P, C / G).
    """
    images, (rows, queries, groups) = len(features[0]), points.shape[:3]
    # One grid an image: (S * B, N, G, P, 3) -> (B * G, S * N, P, 3)
    points = points.unflatten(0, (rows // images, images)).permute(1, 3, 0, 2, 4, 5).flatten(0, 1).flatten(1, 2)
    x, y, depth = points.unbind(-1)  # (B * G, S * N, P) each
    # Levels first, so that each level's weights are contiguous: (L, B * G, 1, S * N, P).
    distances = torch.stack([depth - math.log2(stride) for stride in strides])
    weights = (-0.5 * distances.square()).softmax(dim=0)[:, :, None]
    sampled = 0
    for feature, stride, weight in zip(features, strides, weights, strict=True):
        height, width = feature.shape[2:]
        grid = torch.stack([x * (2 / (width * stride)) - 1, y * (2 / (height * stride)) - 1], dim=-1)
        per_group = feature.unflatten(1, (groups, -1)).flatten(0, 1)  # (B * G, C / G, H, W)
        values = F.grid_sample(per_group, grid, align_corners=False)  # (B * G, C / G, S * N, P)
        sampled = sampled + values * weight
    sampled = sampled.unflatten(2, (-1, queries)).unflatten(0, (images, groups))  # (B, G, C / G, S, N, P)
    return sampled.permute(3, 0, 4, 1, 5, 2).flatten(0, 1)
