"""Sparse R-CNN's dynamic convolution (CVPR 2021, Sec. 3.1).

B: rows, N: queries, C: channels, D: dynamic channels, M: cells of a region.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class DynamicConvolution(nn.Module):
    """Each query makes the two 1x1 convolutions that filter its own region."""

    def __init__(self, *, dim: int, dynamic_dim: int, num_cells: int):
        """
        Args:
            dim: C.
            dynamic_dim: D, channels between the convolutions.
            num_cells: M.
        """
        super().__init__()
        self.shapes = ((dim, dynamic_dim), (dynamic_dim, dim))
        self.generator = nn.Linear(dim, 2 * dim * dynamic_dim)
        self.hidden_norm = nn.LayerNorm(dynamic_dim)
        self.channel_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(num_cells * dim, dim)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, content: Tensor, regions: Tensor) -> Tensor:
        """
        Args:
            content: (B, N, C).
            regions: (B, N, M, C).

        Returns:
            (B, N, C), to be added to the content.
        """
        first, second = self.generator(content).chunk(2, dim=2)
        x = F.relu(self.hidden_norm(regions @ first.unflatten(2, self.shapes[0])))  # (B, N, M, D)
        x = F.relu(self.channel_norm(x @ second.unflatten(2, self.shapes[1])))  # (B, N, M, C)
        return F.relu(self.out_norm(self.out(x.flatten(2))))
