"""The initial queries y_0- (Eq. 7): learned content, and boxes that start as the whole image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from .boxes import encode_boxes
from .structures import QueryState


class InitialQueries(nn.Module):
    """N learned queries, the same for all images, except that the boxes are scaled to the image."""

    @configurable
    def __init__(self, *, num_queries: int, hidden_dim: int, norm_content: bool, learn_boxes: bool):
        """
        Args:
            num_queries: N.
            hidden_dim: C.
            norm_content: whether the content passes through a LayerNorm without affine part (as in AdaMixer).
            learn_boxes: whether the boxes are parameters (as in Sparse R-CNN). Otherwise they stay the whole image.
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
        """Return the initial state of each image.

        Args:
            image_sizes: (B, 2) width and height before padding, in pixels.

        Returns:
            A state of B images: position (B, N, 4), content (B, N, C).
        """
        content = self.content.weight
        if self.norm_content:
            content = F.layer_norm(content, content.shape[-1:])
        center, size = self.boxes.split(2, dim=-1)
        relative = torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)  # (N, 4) xyxy
        boxes = relative * image_sizes.repeat(1, 2)[:, None]  # (B, N, 4) pixels
        return QueryState(encode_boxes(boxes), content.expand(len(boxes), -1, -1))
