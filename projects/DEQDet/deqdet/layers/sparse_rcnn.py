"""The Sparse R-CNN layer (Sparse R-CNN, CVPR 2021, Sec. 3.1; Appendix F of the paper).

B: images, S: states of each image (see sampling.py), N: queries, C: channels, M: cells of a pooled region.
"""

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from ..boxes import box_sizes, decode_boxes, refine_position_by_deltas
from ..structures import Features, Prediction, QueryState
from .attention import PositionalAttention, SelfAttention
from .base import REFINEMENT_LAYER_REGISTRY, RefinementLayer, set_class_prior
from .dynamic_conv import DynamicConvolution
from .regions import pool_regions
from .table import PyramidTable, build_table, table_dtype

# Boxes are clipped to this distance from the origin, in pixels, before pooling: RoIAlign of an infinite box would read
# outside its input.
FARTHEST = 1e6
# Values of MODEL.DEQDET.SPARSE_RCNN.ATTENTION: (add a position embedding, bias the attention by the overlap of boxes).
ATTENTIONS = {
    "plain": (False, False),
    "embedding": (True, False),
    "overlap": (False, True),
    "positional": (True, True),
}


@REFINEMENT_LAYER_REGISTRY.register()
class SparseRCNNLayer(RefinementLayer):
    """Refines queries by self-attention, and by the features pooled in their boxes, which each query filters."""

    accepts_segments = True

    @configurable
    def __init__(
        self,
        *,
        strides: list[int],
        dim: int,
        num_classes: int,
        pooler_resolution: int,
        pooler_sampling_ratio: int,
        dynamic_dim: int,
        num_class_layers: int,
        num_box_layers: int,
        num_heads: int,
        feedforward_dim: int,
        attention: str = "plain",
        zero_init_deltas: bool = False,
    ):
        """
        Args:
            strides: the strides of the pyramid's levels in pixels, finest first. They are powers of two, each twice
                the one before it.
            dim: C, the channels of the content and of every level.
            num_classes: K.
            pooler_resolution: the number of cells along a side of a pooled region.
            pooler_sampling_ratio: the number of RoIAlign's sampling points along a side of a cell.
            dynamic_dim: the channels between the two dynamic convolutions.
            num_class_layers, num_box_layers: the hidden layers of the class branch and of the box branch.
            num_heads: heads of the attention.
            feedforward_dim: the hidden channels of the feed-forward network.
            attention: "plain" is Sparse R-CNN's own, in which queries do not see each other's boxes. "positional" is
                AdaMixer's, "embedding" and "overlap" have only one of its two parts.
            zero_init_deltas: start the box branch's last layer at 0, as AdaMixer does, so that an untrained layer
                leaves every box unchanged. False is Sparse R-CNN's random initialization.

        Raises:
            ValueError: dim is not a multiple of num_heads, or with an embedding not of 8; or the attention is unknown.
        """
        super().__init__()
        self.strides = list(strides)
        if dim % num_heads:
            raise ValueError(f"the hidden dimension {dim} is not a multiple of the {num_heads} heads")
        if attention not in ATTENTIONS:
            known = ", ".join(ATTENTIONS)
            raise ValueError(f"MODEL.DEQDET.SPARSE_RCNN.ATTENTION is {attention!r}: it must be one of {known}")
        embed, overlap = ATTENTIONS[attention]
        if embed and dim % 8:
            raise ValueError(f"the hidden dimension {dim} is not a multiple of the 8 sine embedding's features")
        self.side, self.sampling_ratio = pooler_resolution, pooler_sampling_ratio
        # With 0, RoIAlign takes a number of points that grows with the cell, and fails for an infinite box.
        self.accepts_nonfinite = pooler_sampling_ratio > 0
        self.pooler = ROIPooler(
            output_size=pooler_resolution,
            scales=[1 / stride for stride in strides],
            sampling_ratio=pooler_sampling_ratio,
            pooler_type="ROIAlignV2",
        )
        self.is_positional = embed or overlap
        if self.is_positional:
            self.attention = PositionalAttention(dim=dim, num_heads=num_heads, embed=embed, overlap=overlap)
        else:  # not wrapped in another module, so that the parameters have the names of older checkpoints
            self.attention = SelfAttention(dim, num_heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.dynamic_conv = DynamicConvolution(dim=dim, dynamic_dim=dynamic_dim, num_cells=pooler_resolution**2)
        self.dynamic_conv_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, feedforward_dim), nn.ReLU(), nn.Linear(feedforward_dim, dim))
        self.feedforward_norm = nn.LayerNorm(dim)
        self.class_branch = _tower(dim, num_class_layers, num_classes)
        self.box_branch = _tower(dim, num_box_layers, 4)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        set_class_prior(self.class_branch[-1])
        if zero_init_deltas:
            nn.init.zeros_(self.box_branch[-1].weight)
            nn.init.zeros_(self.box_branch[-1].bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec], initialization: bool) -> dict:
        """Read MODEL.DEQDET.SPARSE_RCNN; an initialization layer is built like a refinement layer."""
        deqdet, sparse = cfg.MODEL.DEQDET, cfg.MODEL.DEQDET.SPARSE_RCNN
        return {
            "strides": [shape.stride for shape in input_shapes],
            "dim": deqdet.HIDDEN_DIM,
            "num_classes": deqdet.NUM_CLASSES,
            "pooler_resolution": sparse.POOLER_RESOLUTION,
            "pooler_sampling_ratio": sparse.POOLER_SAMPLING_RATIO,
            "dynamic_dim": sparse.DYNAMIC_DIM,
            "num_class_layers": sparse.NUM_CLASS_LAYERS,
            "num_box_layers": sparse.NUM_BOX_LAYERS,
            "num_heads": sparse.NUM_HEADS,
            "feedforward_dim": sparse.FEEDFORWARD_DIM,
            "attention": sparse.ATTENTION,
            "zero_init_deltas": sparse.ZERO_INIT_DELTAS,
        }

    def prepare(self, features: Features) -> Features:
        """Build the table from which every step pools.

        With a sampling ratio of 0 the number of samples depends on the box. ROIPooler does that, from the levels.
        With a gradient the table is in float32 or better, because the gradient of a cell is a sum over all boxes.
        """
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        if self.sampling_ratio < 1:
            return [level.to(dtype) for level in features]
        return build_table(features, self.strides, dtype if torch.is_grad_enabled() else table_dtype(features))

    def forward(self, state: QueryState, features: Features) -> QueryState:
        """See RefinementLayer.forward. Features that were not prepared are pooled by detectron2's ROIPooler."""
        position = state.position.detach()
        boxes = decode_boxes(position)
        regions = self._pool(features, boxes)
        content = self.attention_norm(self._attend(state.content, position, boxes))
        content = self.dynamic_conv_norm(content + self.dynamic_conv(content, regions))
        content = self.feedforward_norm(content + self.feedforward(content))
        return QueryState(refine_position_by_deltas(state.position, self.box_branch(content)), content)

    def _attend(self, content: Tensor, position: Tensor, boxes: Tensor) -> Tensor:
        """Add the result of self-attention to the content, (B, N, C)."""
        if self.is_positional:
            return self.attention(content, position, boxes, box_sizes(position).prod(-1))
        return content + self.attention(content)

    def predict(self, state: QueryState) -> Prediction:
        """See RefinementLayer.predict."""
        return Prediction(self.class_branch(state.content), decode_boxes(state.position))

    def _pool(self, features: Features, boxes: Tensor) -> Tensor:
        """Pool the features in each box by RoIAlign.

        Args:
            features: for each level (B, C, H_l, W_l); or their table.
            boxes: (S * B, N, 4) xyxy, pixels; rows state by state (see sampling.py), so row r belongs to image r % B.

        Returns:
            (S * B, N, M, C), the cells of a region row by row.
        """
        # float16 would round coordinates beyond 1,024 to whole pixels, and make those beyond 65,504 infinite.
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).nan_to_num().clamp(-FARTHEST, FARTHEST)
        if isinstance(features, PyramidTable):
            return pool_regions(features, boxes, self.side, self.sampling_ratio)
        features = [level.to(boxes.dtype) for level in features]
        images, queries = len(features[0]), boxes.shape[1]
        # The pooler takes a list with the boxes of each image, here of all its states.
        by_image = boxes.unflatten(0, (-1, images)).transpose(0, 1).flatten(1, 2)  # (B, S * N, 4)
        regions = self.pooler(features, [Boxes(x) for x in by_image])  # (B * S * N, C, side, side)
        regions = regions.flatten(2).transpose(1, 2)  # (B * S * N, M, C)
        return regions.unflatten(0, (images, -1, queries)).transpose(0, 1).flatten(0, 1)


def _tower(dim: int, num_layers: int, num_outputs: int) -> nn.Sequential:
    """Build a branch of num_layers hidden layers (linear, LayerNorm, ReLU) and a linear output layer."""
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(dim, num_outputs))
