"""Self-attention among queries that know where their boxes are.

B: rows of the state, N: queries, C: channels.
"""

import torch
from torch import Tensor, nn

from ..boxes import decode_boxes, embed_position, pairwise_iof


class PositionalAttention(nn.Module):
    """Self-attention with a position embedding and a bias by the overlap of boxes (AdaMixer, Sec. 3.4).

    The content carries a sine embedding of the position, and the attention logits of head h get the bias
    tau_h log IoF(b_i, b_j). Inside the softmax this multiplies the weight that query i gives to query j by IoF^tau_h:
    with a large tau_h a query attends only to boxes around its own, and so may learn that it duplicates another; with
    tau_h = 0 the head ignores the boxes.
    """

    def __init__(self, *, dim: int, num_heads: int, embed: bool = True, overlap: bool = True):
        """
        Args:
            embed: add the embedding of the position to the content.
            overlap: bias the attention by the overlap of boxes.
        """
        super().__init__()
        self.embed = embed
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.iof_scale = None
        if overlap:
            self.iof_scale = nn.Parameter(torch.empty(num_heads))  # (heads,)  tau
            nn.init.uniform_(self.iof_scale, 0, 4)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        """
        Args:
            content: (B, N, C).
            position: (B, N, 4) cx, cy, z, r.

        Returns:
            (B, N, C): content + embedded position + the result of the attention.
        """
        embedded = content + embed_position(position, content.shape[2]) if self.embed else content
        bias = None if self.iof_scale is None else self._overlap_bias(position).to(embedded.dtype)
        attended, _ = self.attention(embedded, embedded, embedded, attn_mask=bias, need_weights=False)
        return embedded + attended

    def _overlap_bias(self, position: Tensor) -> Tensor:
        """(B * heads, N, N), as nn.MultiheadAttention takes it."""
        # 1e-7 gives boxes that do not meet a finite bias: an infinite one could leave a query with no box to attend to.
        overlap = (pairwise_iof(decode_boxes(position)) + 1e-7).log()  # (B, N, N)
        return (self.iof_scale[:, None, None] * overlap[:, None]).flatten(0, 1)
