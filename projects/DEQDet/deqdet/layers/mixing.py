"""Adaptive mixing of sampled features (AdaMixer, CVPR 2022, Sec. 3.3).

B: rows of the state, N: queries, G: groups of channels, P: sampled points, P_out: points after mixing, C: channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .table import kernels


class AdaptiveMixing(nn.Module):
    """Mixes the samples of each query with matrices that are made from the query's content.

    For each group, one matrix M (C / G, C / G) mixes the channels of every point, X <- ReLU(LN(X M)); then another
    matrix S (P_out, P) mixes the points of every channel, X <- ReLU(LN(S X)). So each query decides for itself which
    features it extracts from the samples, and from which points.
    """

    def __init__(self, *, dim: int, num_groups: int, num_points: int, num_out_points: int):
        super().__init__()
        self.num_groups = num_groups
        self.group_dim = dim // num_groups
        self.channel_shape = (self.group_dim, self.group_dim)  # M
        self.point_shape = (num_out_points, num_points)  # S
        per_group = self.group_dim**2 + num_out_points * num_points
        self.generator = nn.Linear(dim, num_groups * per_group)
        self.out = nn.Linear(dim * num_out_points, dim)
        # With weight 0, all queries start with the same matrices, given by the bias. The bias keeps its random values
        # from nn.Linear: with a bias of 0 the matrices, and so all gradients, would be 0.
        nn.init.zeros_(self.generator.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, content: Tensor, samples: Tensor, use_kernels: bool = False) -> Tensor:
        """Mix the samples of each query.

        Args:
            content: (B, N, C).
            samples: (B, N, G, P, C / G).
            use_kernels: compute the norms with kernels.py where it supports the shapes. This needs a GPU, and no
                gradient may be recorded.

        Returns:
            (B, N, C), to be added to the content.
        """
        generated = self.generator(content).unflatten(2, (self.num_groups, -1))
        channel, point = generated.split([self.group_dim**2, generated.shape[3] - self.group_dim**2], dim=3)
        norm_relu = kernels.norm_relu if use_kernels and self._fits_kernel else _norm_relu
        mixed = norm_relu(samples @ channel.unflatten(3, self.channel_shape))  # (B, N, G, P, C / G)
        mixed = norm_relu(point.unflatten(3, self.point_shape) @ mixed)  # (B, N, G, P_out, C / G)
        return self.out(mixed.flatten(2))

    @property
    def _fits_kernel(self) -> bool:
        return max(self.point_shape) * self.group_dim <= kernels.LONGEST_ROW


def _norm_relu(x: Tensor) -> Tensor:
    """Apply a LayerNorm without affine part over the last two dimensions, points and channels of a group, then ReLU."""
    return F.layer_norm(x, x.shape[-2:]).relu_()
