"""The AdaMixer layer (AdaMixer, CVPR 2022; Sec. 3.1 and Fig. 2 of the paper).

B: rows of the state, N: queries, C: channels.
"""

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

from ..boxes import BoxGeometry, decode_boxes, geometry_exponents, refine_position
from ..structures import Features, Prediction, QueryState
from .attention import PositionalAttention
from .base import REFINEMENT_LAYER_REGISTRY, RefinementLayer, set_class_prior
from .mixing import AdaptiveMixing
from .sampling import SamplingPoints, sample_pyramid, sample_table
from .table import PyramidTable, build_table, table_dtype


@REFINEMENT_LAYER_REGISTRY.register()
class AdaMixerLayer(RefinementLayer):
    """Refines queries by self-attention, and by adaptive mixing of features sampled in and around their boxes."""

    accepts_segments = True
    accepts_nonfinite = True

    @configurable
    def __init__(
        self,
        *,
        strides: list[int],
        dim: int,
        num_classes: int,
        num_points: int,
        num_out_points: int,
        num_groups: int,
        num_heads: int,
        feedforward_dim: int,
    ):
        """
        Args:
            strides: the strides of the pyramid's levels in pixels, finest first.
            dim: C, the channels of the content and of every level.
            num_classes: K.
            num_points: P, the number of sampled points of each group.
            num_out_points: P_out, the number of points after the mixing.
            num_groups: G, the groups of channels, each of which is sampled at its own points.
            num_heads: the number of attention heads.
            feedforward_dim: the hidden channels of the feed-forward network.

        Raises:
            ValueError: dim is not a multiple of num_groups, num_heads and 8 (a sine and a cosine for each of the four
                coordinates).
        """
        super().__init__()
        for name, divisor in [("groups", num_groups), ("heads", num_heads), ("sine embedding's features", 8)]:
            if dim % divisor:
                raise ValueError(f"the hidden dimension {dim} is not a multiple of the {divisor} {name}")
        self.strides = list(strides)
        self.register_buffer("exponents", geometry_exponents(), persistent=False)
        self.attention = PositionalAttention(dim=dim, num_heads=num_heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.points = SamplingPoints(dim=dim, num_groups=num_groups, num_points=num_points)
        self.mixing = AdaptiveMixing(
            dim=dim, num_groups=num_groups, num_points=num_points, num_out_points=num_out_points
        )
        self.mixing_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, feedforward_dim), nn.ReLU(), nn.Linear(feedforward_dim, dim))
        self.feedforward_norm = nn.LayerNorm(dim)
        self.box_branch = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, 4))
        self.class_branch = nn.Sequential(
            nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, num_classes)
        )
        self._init_weights()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec], initialization: bool) -> dict:
        deqdet, adamixer = cfg.MODEL.DEQDET, cfg.MODEL.DEQDET.ADAMIXER
        return {
            "strides": [shape.stride for shape in input_shapes],
            "dim": deqdet.HIDDEN_DIM,
            "num_classes": deqdet.NUM_CLASSES,
            "num_points": adamixer.NUM_POINTS_INIT if initialization else adamixer.NUM_POINTS_REFINE,
            "num_out_points": adamixer.NUM_OUT_POINTS,
            "num_groups": adamixer.NUM_GROUPS,
            "num_heads": adamixer.NUM_HEADS,
            "feedforward_dim": adamixer.FEEDFORWARD_DIM,
        }

    def _init_weights(self) -> None:
        for branch in (self.feedforward, self.box_branch, self.class_branch):
            for module in branch:
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
        # An untrained layer leaves the boxes unchanged.
        nn.init.zeros_(self.box_branch[-1].weight)
        nn.init.zeros_(self.box_branch[-1].bias)
        set_class_prior(self.class_branch[-1])

    @torch.no_grad()
    def prepare(self, features: Features) -> PyramidTable:
        """Build the table from which every step without a gradient samples."""
        return build_table(features, self.strides, table_dtype(features), self.points.num_groups)

    def forward(self, state: QueryState, features: Features) -> QueryState:
        """See RefinementLayer.forward. It is faster with prepared features and without a gradient."""
        position = state.position.detach()  # only the last line passes gradient to the given position
        geometry = BoxGeometry.of(position, self.exponents)
        content = self.attention(state.content, position, geometry.corners, geometry.area)
        content = self.attention_norm(content)
        samples = self._sample(features, self.points(content, position, geometry.point_scale))
        table = features if isinstance(features, PyramidTable) else None
        content = self.mixing_norm(content + self.mixing(content, samples, table))
        content = self.feedforward_norm(content + self.feedforward(content))
        # Learned initial boxes also get a gradient through the size of their shift; the detached geometry has none.
        scale = None if state.position.requires_grad else geometry.delta_scale
        return QueryState(refine_position(state.position, self.box_branch(content), scale), content)

    def _sample(self, features: Features, points: Tensor) -> Tensor:
        # The gather's backward pass sorts the rows of all bags, which is slower than grid_sample's backward pass.
        if isinstance(features, PyramidTable) and not torch.is_grad_enabled():
            return sample_table(features, points)
        # But on a GPU only the gather's is deterministic. The prepared table has no gradient, so build another one.
        if torch.are_deterministic_algorithms_enabled():
            levels = list(features)
            dtype = torch.promote_types(levels[0].dtype, torch.float32)
            return sample_table(build_table(levels, self.strides, dtype, self.points.num_groups), points)
        return sample_pyramid(list(features), self.strides, points)

    def predict(self, state: QueryState) -> Prediction:
        """See RefinementLayer.predict."""
        return Prediction(self.class_branch(state.content), decode_boxes(state.position))
