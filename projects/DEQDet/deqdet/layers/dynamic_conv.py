"""The dynamic convolution of Sparse R-CNN (CVPR 2021, Sec. 3.1).

B: rows of the state, N: queries, C: channels, D: channels between the two convolutions, M: cells of a pooled region.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class DynamicConvolution(nn.Module):
    """Filters the pooled region of each query with two 1x1 convolutions that are made from the query's content.

    X <- ReLU(LN(X P1)) and X <- ReLU(LN(X P2)), with P1 (C, D) and P2 (D, C) of each query; a linear layer over all
    cells and channels then makes one vector of the region.
    """

    def __init__(self, *, dim: int, dynamic_dim: int, num_cells: int):
        """
        Args:
            dim: C.
            dynamic_dim: D.
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
        """Filter the region of each query.

        Args:
            content: (B, N, C).
            regions: (B, N, M, C).

        Returns:
            (B, N, C), to be added to the content.
        """
        first, second = self.generator(content).chunk(2, dim=2)  # P1 and P2, flat
        x = F.relu(self.hidden_norm(regions @ first.unflatten(2, self.shapes[0])))  # (B, N, M, D)
        x = F.relu(self.channel_norm(x @ second.unflatten(2, self.shapes[1])))  # (B, N, M, C)
        return F.relu(self.out_norm(self.out(x.flatten(2))))
