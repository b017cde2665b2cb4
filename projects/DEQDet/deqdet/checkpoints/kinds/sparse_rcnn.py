"""The Sparse R-CNN authors' checkpoints, of a Detectron2 project: the backbone has detectron2's names already."""

import re
from collections.abc import Collection

from ..renaming import Rule, under
from .base import Kind
from .torchvision import IMAGES, STRIDE

LAYER: list[Rule] = [
    ("self_attn.", "attention."),
    ("norm1.", "attention_norm."),
    ("inst_interact.dynamic_layer.", "dynamic_conv.generator."),
    ("inst_interact.norm1.", "dynamic_conv.hidden_norm."),
    ("inst_interact.norm2.", "dynamic_conv.channel_norm."),
    ("inst_interact.out_layer.", "dynamic_conv.out."),
    ("inst_interact.norm3.", "dynamic_conv.out_norm."),
    ("norm2.", "dynamic_conv_norm."),
    ("linear1.", "feedforward.0."),
    ("linear2.", "feedforward.2."),
    ("norm3.", "feedforward_norm."),
    ("cls_module.", "class_branch."),
    ("reg_module.", "box_branch."),
]


def _rules(names: Collection[str]) -> list[Rule]:
    classifier, deltas = (_tower_length(names, tower) for tower in ("cls_module", "reg_module"))
    layer = [*LAYER, ("class_logits.", f"class_branch.{classifier}."), ("bboxes_delta.", f"box_branch.{deltas}.")]
    return [
        ("backbone.", "backbone."),
        ("init_proposal_boxes.weight", "queries.boxes"),
        ("init_proposal_features.", "queries.content."),
        *under("head.head_series.*.", "decoder.layers.*.", layer),
    ]


def _tower_length(names: Collection[str], tower: str) -> int:
    """Modules of a tower (Linear, LayerNorm and ReLU, three a layer), so the place of what follows in ours."""
    pattern = re.compile(rf"head\.head_series\.\d+\.{tower}\.(\d+)\..+")
    places = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    return 3 * (1 + max(places) // 3) if places else 0


SPARSE_RCNN = Kind(
    name="sparse_rcnn",
    sign="head.head_series.*",
    rules=_rules,
    config=IMAGES
    | {
        "MODEL.DEQDET.DECODER": "StackedDecoder",
        "MODEL.DEQDET.REFINEMENT_LAYER": "SparseRCNNLayer",
        "MODEL.DEQDET.QUERIES.NORM_CONTENT": False,
        "MODEL.DEQDET.QUERIES.LEARN_BOXES": True,
    },
    resnet_config=STRIDE | {"MODEL.RESNETS.NORM": "FrozenBN"},
    notes=("no shape shows the number of attention heads: MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS, 8 in the releases",),
)
