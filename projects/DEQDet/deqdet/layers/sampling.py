"""Adaptive 3D sampling of a feature pyramid (AdaMixer, CVPR 2022, Sec. 3.2).

The pyramid is treated as a three-dimensional space: x and y in the image, and a depth, the binary logarithm of a
length in pixels. The level with stride s lies at depth log2 s, and a box at its own z = log2 sqrt(w h). Each query
samples at points of this space around its box.

A layer may refine S states of each of the B images at once, such as the supervised states of a solving path. Their
S * B rows are ordered state by state, with the images in the order of the features. For B = 2 images a, b and S = 3
states,

    row     0   1   2   3   4   5
    state   1   1   2   2   3   3
    image   a   b   a   b   a   b

so that row r reads the features of image r % B, of which there is only one copy.

N: queries, G: groups of channels, P: points, C: channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .table import PyramidTable, kernels


class SamplingPoints(nn.Module):
    """Places P points (x, y, depth) for each query and group, at learned offsets from its box's centre and depth."""

    def __init__(self, *, dim: int, num_groups: int, num_points: int):
        super().__init__()
        self.num_groups = num_groups
        self.num_points = num_points
        self.offsets = nn.Linear(dim, num_groups * num_points * 3)
        self._init_weights()

    def _init_weights(self) -> None:
        """Start with the same offsets for all queries: a regular grid over the box, one unit of depth below it.

        If P is not a square number, the points are drawn uniformly from the box instead.
        """
        nn.init.zeros_(self.offsets.weight)
        bias = self.offsets.bias.data.view(self.num_groups, self.num_points, 3)
        bias[..., 2] = -1.0
        side = math.isqrt(self.num_points)
        if side * side == self.num_points:
            centers = (torch.arange(side) + 0.5) / side - 0.5
            bias[..., :2] = torch.cartesian_prod(centers, centers).flip(-1)
        else:
            nn.init.uniform_(bias[..., :2], -0.5, 0.5)

    def forward(self, content: Tensor, position: Tensor, scale: Tensor) -> Tensor:
        """
        Args:
            content: (B, N, C).
            position: (B, N, 4) cx, cy, z, r.
            scale: (B, N, 3) w, h, 1: the learned offsets are relative to the size of the box.

        Returns:
            (B, N, G, P, 3): x, y in pixels, and the depth, log2 of pixels.
        """
        offsets = self.offsets(content).unflatten(2, (self.num_groups, self.num_points, 3))
        # (cx + dx w, cy + dy h, z + dz)
        return torch.addcmul(position[:, :, None, None, :3], offsets, scale[:, :, None, None])


def sample_table(table: PyramidTable, points: Tensor) -> Tensor:
    """Compute `sample_pyramid` by one gather from a table of all levels, or on a GPU, if possible, by one kernel.

    All levels are handled at once. The points are the last dimension, so that the arithmetic runs over contiguous
    memory.

    Args:
        table: the table of B images.
        points: (S * B, N, G, P, 3), as for `sample_pyramid`.

    Returns:
        (S * B, N, G, P, C / G), in the dtype of the table.
    """
    if table.uses_kernels and points.dtype == torch.float32:
        numbers = (table.scale, table.shift, table.last, table.line, table.corners[0, 0].contiguous())
        return kernels.sample(table.rows.flatten(0, 2), points.contiguous(), *numbers)
    shape = (len(points) // table.num_images, table.num_images, *points.shape[1:4])  # S, B, N, G, P
    points = points.reshape(-1, 3).t().contiguous()  # (3, K), K = S B N G P
    # The softmax over levels needs -(d - m)^2 / 2 = -d^2 / 2 + m d - m^2 / 2 for depth d and level m. The first term is
    # the same for all levels and cancels.
    numbers = torch.addcmul(table.shift[..., None], points[:, None], table.scale[..., None])  # (3, L, K)
    cells, levels = numbers[:2], numbers[2].softmax(dim=0)  # (2, L, K), (L, K)
    # The weights of the lower and of the upper cell of each axis, (2, 2 axes, L, K).
    weight = torch.addcmul(table.near[0], cells.frac(), table.near[1])
    # A point outside is clamped into the border, where it reads only zeros. Convert before clamping: NaN and infinity
    # become arbitrary integers, which the clamp moves into the table.
    column, line = cells.detach().to(torch.int32).clamp(table.first, table.last[..., None])  # (L, K) each
    index = torch.addcmul(column, line, table.line[:, None]).unflatten(1, shape)  # (L, S, B, N, G, P)
    index = index + table.corners[:, :, :, None, :, None, :, None]  # (2, 2, L, S, B, N, G, P)
    weight = weight[:, None, 1] * (weight[:, 0] * levels)  # (2, 2, L, K)
    bags = [x.view(4 * len(levels), -1).t().contiguous() for x in (index, weight)]  # (K, 4 L) each
    return table.gather(*bags).view(shape[0] * shape[1], *shape[2:], -1)


def sample_pyramid(features: list[Tensor], strides: list[int], points: Tensor) -> Tensor:
    """Interpolate the pyramid at points of its three-dimensional space.

    Each level is interpolated bilinearly at (x, y). The results of the levels l are summed with the weights
    softmax_l(-(depth - log2 s_l)^2 / 2), a Gaussian in the distance of the point to the level. Group g reads the
    channels g * C / G to (g + 1) * C / G. Outside the padded input all features count as 0.

    Args:
        features: for each level (B, C, H_l, W_l).
        strides: s_l, the side of a level's cell in pixels.
        points: (S * B, N, G, P, 3), rows in the order described above; x, y in pixels of the padded input, and the
            depth.

    Returns:
        (S * B, N, G, P, C / G), in the same order of rows.
    """
    images, (rows, queries, groups) = len(features[0]), points.shape[:3]
    # All states of an image in one grid, so that its features need not be repeated:
    # (S * B, N, G, P, 3) -> (B * G, S * N, P, 3)
    points = points.unflatten(0, (rows // images, images)).permute(1, 3, 0, 2, 4, 5).flatten(0, 1).flatten(1, 2)
    x, y, depth = points.unbind(-1)  # (B * G, S * N, P) each
    # Levels first, so that each level's weights are contiguous: (L, B * G, 1, S * N, P).
    distances = torch.stack([depth - math.log2(stride) for stride in strides])
    weights = (-0.5 * distances.square()).softmax(dim=0)[:, :, None]
    sampled = 0
    for feature, stride, weight in zip(features, strides, weights, strict=True):
        height, width = feature.shape[2:]
        # grid_sample wants coordinates from -1 to 1, the outer edges of the level, which covers (W_l s_l, H_l s_l)
        # pixels.
        grid = torch.stack([x * (2 / (width * stride)) - 1, y * (2 / (height * stride)) - 1], dim=-1)
        per_group = feature.unflatten(1, (groups, -1)).flatten(0, 1)  # (B * G, C / G, H, W)
        values = F.grid_sample(per_group, grid, align_corners=False)  # (B * G, C / G, S * N, P)
        sampled = sampled + values * weight
    sampled = sampled.unflatten(2, (-1, queries)).unflatten(0, (images, groups))  # (B, G, C / G, S, N, P)
    return sampled.permute(3, 0, 4, 1, 5, 2).flatten(0, 1)
