"""Self-attention among queries, with or without knowledge of their boxes.

B: rows of the state, N: queries, C: channels.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..boxes import embed_position, embedding_waves, pairwise_intersection

# Added to the IoF, so that boxes without overlap get a finite bias. With a bias of -inf, a query could be left with no
# box to attend to.
SMALLEST_OVERLAP = 1e-7
SMALLEST_AREA = 1e-6  # the smallest area to divide by, square pixels


class SelfAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention for self-attention, with the same parameters and a faster forward.

    nn.MultiheadAttention transposes the batch and query dimensions and checks its arguments in every call.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (B, N, C).
            bias: (B, heads, N, N), added to the logits of the attention.

        Returns:
            (B, N, C).
        """
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(2, (3, self.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, heads, N, C / heads) each
        bias = None if bias is None else bias.to(query.dtype)
        with _attention_kernel(query):
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def _attention_kernel(query: Tensor) -> AbstractContextManager:
    """Return a context that selects the fastest attention kernel where torch would choose another one.

    This concerns one image (1, heads, N, C / heads) in compiled code for a GPU, in float32 and without a gradient.
    torch would choose the memory-efficient kernel, which then occupies only a third of an H100. For 300 queries with a
    bias it takes 39 us; two matrix products and a softmax take 23 us.
    """
    compiled = torch.compiler.is_compiling() and query.is_cuda and not torch.is_grad_enabled()
    alone = compiled and query.dtype == torch.float32 and query.shape[0] == 1
    return sdpa_kernel(SDPBackend.MATH) if alone else nullcontext()


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
        if embed:  # the waves are computed once, not in every step
            frequency, phase = embedding_waves(dim)
            self.register_buffer("frequency", frequency, persistent=False)
            self.register_buffer("phase", phase, persistent=False)
        self.attention = SelfAttention(dim, num_heads)
        self.iof_scale = None
        if overlap:
            self.iof_scale = nn.Parameter(torch.empty(num_heads))  # (heads,)  tau
            nn.init.uniform_(self.iof_scale, 0, 4)
            self.register_buffer("smallest_overlap", torch.tensor(SMALLEST_OVERLAP), persistent=False)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(self, content: Tensor, position: Tensor, boxes: Tensor, area: Tensor) -> Tensor:
        """
        Args:
            content: (B, N, C).
            position: (B, N, 4) cx, cy, z, r.
            boxes: (B, N, 4) the same boxes as xyxy, pixels.
            area: (B, N) their areas, square pixels.

        Returns:
            (B, N, C): content + embedded position + the result of the attention.
        """
        embedded = content
        if self.embed:
            embedded = content + embed_position(position, content.shape[2], waves=(self.frequency, self.phase))
        bias = None if self.iof_scale is None else self._overlap_bias(boxes, area)
        return embedded + self.attention(embedded, bias)

    def _overlap_bias(self, boxes: Tensor, area: Tensor) -> Tensor:
        """tau_h log(IoF + 1e-7), (B, heads, N, N)."""
        area = area.clamp(min=SMALLEST_AREA)[:, :, None]
        overlap = torch.addcdiv(self.smallest_overlap, pairwise_intersection(boxes), area).log()  # (B, N, N)
        return self.iof_scale[:, None, None] * overlap[:, None]
