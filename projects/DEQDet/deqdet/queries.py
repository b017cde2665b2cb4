"""The initial queries y_0-: learned content, and boxes that start as the whole image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from .boxes import encode_boxes
from .structures import QueryState


class InitialQueries(nn.Module):
    """N learned queries, the same for every image but for the size of their boxes."""

    @configurable
    def __init__(self, *, num_queries: int, hidden_dim: int, norm_content: bool, learn_boxes: bool):
        """
        Args:
            norm_content: pass the content through a LayerNorm without affine part (AdaMixer).
            learn_boxes: train the boxes (Sparse R-CNN) instead of keeping them at the whole image.
        """
        super().__init__()
        self.norm_content = norm_content
        self.content = nn.Embedding(num_queries, hidden_dim)  # N(0, 1)
        boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(num_queries, 1)  # cx, cy, w, h relative to the image
        if learn_boxes:
            self.boxes = nn.Parameter(boxes)
        else:
            self.register_buffer("boxes", boxes)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        deqdet = cfg.MODEL.DEQDET
        return {
            "num_queries": deqdet.NUM_QUERIES,
            "hidden_dim": deqdet.HIDDEN_DIM,
            "norm_content": deqdet.QUERIES.NORM_CONTENT,
            "learn_boxes": deqdet.QUERIES.LEARN_BOXES,
        }

    def forward(self, image_sizes: Tensor) -> QueryState:
        """
        Args:
            image_sizes: (B, 2) width, height before padding, pixels.
        """
        content = self.content.weight
        if self.norm_content:
            content = F.layer_norm(content, content.shape[-1:])
        center, size = self.boxes.split(2, dim=-1)
        relative = torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)  # (N, 4) xyxy
        boxes = relative * image_sizes.repeat(1, 2)[:, None]  # (B, N, 4) pixels
        return QueryState(encode_boxes(boxes), content.expand(len(boxes), -1, -1))
