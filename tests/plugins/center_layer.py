"""A third refinement layer: it reads the features at the centre of each box, and nothing else of the image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import configurable

from deqdet.boxes import decode_boxes, embed_position, refine_position
from deqdet.checkpoints import Kind, register_kind, under
from deqdet.layers import REFINEMENT_LAYER_REGISTRY, RefinementLayer, set_class_prior
from deqdet.structures import Prediction, QueryState


@REFINEMENT_LAYER_REGISTRY.register()
class CenterLayer(RefinementLayer):
    """Attend to the other queries, add the features under the centre of the box, and refine content and box."""

    @configurable
    def __init__(self, *, strides: list[int], dim: int, num_classes: int):
        super().__init__()
        self.strides = strides
        self.attention = nn.MultiheadAttention(dim, num_heads=4, batch_first=True)
        self.read = nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.feedforward_norm = nn.LayerNorm(dim)
        self.move = nn.Linear(dim, 4)
        self.classify = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)
        set_class_prior(self.classify)

    @classmethod
    def from_config(cls, cfg, input_shapes, initialization):
        """The registry calls CenterLayer(cfg, input_shapes, initialization); this makes the arguments above of it."""
        return {
            "strides": [shape.stride for shape in input_shapes],
            "dim": cfg.MODEL.DEQDET.HIDDEN_DIM,
            "num_classes": cfg.MODEL.DEQDET.NUM_CLASSES,
        }

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        position = state.position.detach()  # as every layer: only the box refinement sees the position's gradient
        content = state.content + embed_position(position, state.content.shape[2])
        content = content + self.attention(content, content, content, need_weights=False)[0]
        content = content + self.read(self.sample_centers(features, position[..., :2]))
        content = self.feedforward_norm(content + self.feedforward(content))
        return QueryState(refine_position(state.position, self.move(content)), content)

    def predict(self, state: QueryState) -> Prediction:
        return Prediction(self.classify(state.content), decode_boxes(state.position))

    def sample_centers(self, features: list[Tensor], centers: Tensor) -> Tensor:
        """The features of all levels under (B, N, 2) points in pixels, averaged: (B, N, C)."""
        samples = []
        for level, stride in zip(features, self.strides, strict=True):
            size = centers.new_tensor([level.shape[3] * stride, level.shape[2] * stride])
            grid = (2 * centers / size - 1)[:, :, None]  # (B, N, 1, 2), -1 to 1
            samples.append(F.grid_sample(level, grid, align_corners=False)[..., 0].transpose(1, 2))
        return torch.stack(samples).mean(dim=0)


# Only for `deqdet-convert-checkpoint`: how another implementation of this detector calls its parameters.
LAYER = [("mha.", "attention."), ("read.", "read."), ("ffn.", "feedforward."), ("norm.", "feedforward_norm.")]
LAYER += [("box.", "move."), ("cls.", "classify.")]
register_kind(
    Kind(
        name="center",
        sign="center_head.*",
        rules=lambda names: [
            ("body.", "backbone."),
            ("query.weight", "queries.content.weight"),
            ("query.boxes", "queries.boxes"),
            *under("center_head.first.", "decoder.initialization.", LAYER),
            *under("center_head.shared.", "decoder.refinement.", LAYER),
        ],
        imply_layers=lambda shapes, layers, dim: {"MODEL.DEQDET.NUM_CLASSES": shapes.size("decoder.*.classify.*")},
        config={"MODEL.DEQDET.REFINEMENT_LAYER": "CenterLayer", "MODEL.DEQDET.DECODER": "EquilibriumDecoder"},
        resnet_config={"MODEL.RESNETS.NORM": "BN"},  # no shape shows whether a BatchNorm was frozen
    )
)
