"""Adaptive mixing of sampled features (AdaMixer, CVPR 2022, Sec. 3.3).

B: rows of the state, N: queries, G: groups of channels, P: sampled points, P_out: points after mixing, C: channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .table import PyramidTable, kernels


class AdaptiveMixing(nn.Module):
    """Mixes the samples of each query with matrices that are made from the query's content.

    For each group, one matrix M (C / G, C / G) mixes the channels of every point, X <- ReLU(LN(X M)); then another
    matrix S (P_out, P) mixes the points of every channel, X <- ReLU(LN(S X)). So each query decides for itself which
    features it extracts from the samples, and from which points.
    """

    def __init__(self, *, dim: int, num_groups: int, num_points: int, num_out_points: int):
        super().__init__()
        self.group_dim = dim // num_groups
        self.num_points = num_points
        self.num_out_points = num_out_points
        per_group = self.group_dim**2 + num_out_points * num_points  # the numbers in M and in S
        self.generator = nn.Linear(dim, num_groups * per_group)
        self.out = nn.Linear(dim * num_out_points, dim)
        # With weight 0, all queries start with the same matrices, given by the bias. The bias keeps its random values
        # from nn.Linear: with a bias of 0 the matrices, and so all gradients, would be 0.
        nn.init.zeros_(self.generator.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, content: Tensor, samples: Tensor, table: PyramidTable | None = None) -> Tensor:
        """Mix the samples of each query.

        Args:
            content: (B, N, C).
            samples: (B, N, G, P, C / G).
            table: the table from which they were read. With it, the kernels of kernels.py compute what they can, if it
                is on a GPU and no gradient is recorded.

        Returns:
            (B, N, C), to be added to the content.
        """
        matrices = self.generator(content)  # (B, N, G (C / G * C / G + P_out P))
        has_kernels = table is not None and table.uses_kernels
        if has_kernels and table.has_mixing and self._fits_mix and matrices.dtype == samples.dtype:
            mixed = kernels.mix(samples.contiguous(), matrices.contiguous(), self.num_out_points)
        else:
            norm_relu = kernels.norm_relu if has_kernels and self._fits_norm else _norm_relu
            channel, point = split_matrices(
                matrices, points=self.num_points, out_points=self.num_out_points, channels=self.group_dim
            )
            mixed = norm_relu(samples @ channel)  # (B, N, G, P, C / G)
            mixed = norm_relu(point @ mixed)  # (B, N, G, P_out, C / G)
        return self.out(mixed.flatten(2))

    @property
    def _fits_norm(self) -> bool:
        return max(self.num_points, self.num_out_points) * self.group_dim <= kernels.LONGEST_ROW

    @property
    def _fits_mix(self) -> bool:
        return kernels.fits_mix(self.num_points, self.num_out_points, self.group_dim)


def split_matrices(matrices: Tensor, *, points: int, out_points: int, channels: int) -> tuple[Tensor, Tensor]:
    """Split what AdaptiveMixing's generator returns into the two matrices of each query and group.

    Args:
        matrices: (B, N, G (C / G * C / G + P_out P)).
        points, out_points, channels: P, P_out, and C / G.

    Returns:
        M (B, N, G, C / G, C / G) and S (B, N, G, P_out, P), both views.
    """
    sizes = [channels**2, out_points * points]
    channel, point = matrices.unflatten(2, (-1, sum(sizes))).split(sizes, dim=3)
    return channel.unflatten(3, (channels, channels)), point.unflatten(3, (out_points, points))


def _norm_relu(x: Tensor) -> Tensor:
    """Apply a LayerNorm without affine part over the last two dimensions, points and channels of a group, then ReLU."""
    return F.layer_norm(x, x.shape[-2:]).relu_()
