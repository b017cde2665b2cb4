"""The kinds of checkpoints that can be converted. `register_kind` adds one, for a layer of the user's own."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from .files import COUNTER
from .implied import BODY, Config, Given, ImplyLayers, Shapes, has_swin, imply_detector, imply_resnet, imply_swin, vote

# A name in the file and ours. Each * stands for a number, the same in both names. A rule that ends with a dot renames
# every name that begins so; any other rule renames one parameter.
Rule = tuple[str, str]


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules of a module, for the module whose names begin with `theirs` in the file and with `ours` here."""
    return [(theirs + their_part, ours + our_part) for their_part, our_part in rules]


def _unchanged(name: str, value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: how to recognise it, how its names become ours, and what its shapes do not show."""

    name: str
    sign: str  # a shell pattern that one of its keys matches
    rules: Callable[[Collection[str]], list[Rule]]  # for a file with these keys
    imply_layers: ImplyLayers | None = None  # the refinement layer's keys; None: its files hold a backbone alone
    dead: tuple[str, ...] = ()  # shell patterns of keys that nothing uses
    may_lack: tuple[str, ...] = ()  # shell patterns of our names: weights that start anew if the file lacks them
    config: Mapping[str, object] = field(default_factory=dict)  # what the kind implies, whatever its shapes
    resnet_config: Mapping[str, object] = field(default_factory=dict)  # the same, if its backbone is a ResNet
    convert: Callable[[str, Tensor], Tensor] = _unchanged  # our name and the file's value -> our value
    notes: tuple[str, ...] = ()  # what a user should know

    @property
    def backbone_only(self) -> bool:
        return self.imply_layers is None

    def imply_config(self, tensors: Mapping[str, Given]) -> Config:
        """The config of the detector, or of the backbone alone, that has these tensors, which are given by our names.

        Every key that the file decides is in it, even one whose value is the default.

        Raises:
            CheckpointError: they are no detector's; says why.
        """
        look = Shapes(tensors)
        body = imply_swin(look) if has_swin(look) else imply_resnet(look) | dict(self.resnet_config)
        if self.imply_layers is None:
            return dict(self.config) | body
        detector = {"MODEL.META_ARCHITECTURE": "DEQDet", "MODEL.MASK_ON": False}
        return detector | dict(self.config) | body | imply_detector(look, self.imply_layers)


KINDS: dict[str, Kind] = {}


def register_kind(kind: Kind) -> Kind:
    """Make a kind known to `convert` and to tools/convert_checkpoint.py.

    A file's kind is guessed by the signs of the kinds, the last registered first, so that a new kind may have a sign
    that is a special case of an older one's.

    Raises:
        ValueError: another kind has its name.
    """
    if kind.name in KINDS:
        raise ValueError(f"a kind {kind.name!r} already exists: use another name")
    KINDS[kind.name] = kind
    return kind


# torchvision's ResNets, as state dicts and under the detectors whose backbones keep these names.

# torchvision's ImageNet weights were trained on such images, and they stride in their 3x3 convolutions.
IMAGES = {
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}
STRIDE = {"MODEL.RESNETS.STRIDE_IN_1X1": False}


def resnet_rules(prefix: str) -> list[Rule]:
    """For a ResNet of bottlenecks whose keys begin with `prefix`."""
    rules = [("conv1.", "stem.conv1."), ("bn1.", "stem.conv1.norm.")]
    block = [("downsample.0.", "shortcut."), ("downsample.1.", "shortcut.norm.")]
    for i in (1, 2, 3):
        block += [(f"conv{i}.", f"conv{i}."), (f"bn{i}.", f"conv{i}.norm.")]
    for stage in (1, 2, 3, 4):
        rules += under(f"layer{stage}.*.", f"res{stage + 1}.*.", block)
    return under(prefix, BODY, rules)


TORCHVISION = Kind(
    name="torchvision",
    sign="layer1.0.*",
    rules=lambda names: resnet_rules(""),
    # The classifier, and BatchNorm's counters of batches, which nothing reads and FrozenBatchNorm would not take.
    dead=("fc.*", f"*{COUNTER}"),
    config=IMAGES,
    resnet_config=STRIDE,
)

# Swin Transformers: the authors' ImageNet checkpoints, whose names detectron2 has kept, and mmdetection's names and
# layout.

OUTPUT_NORMS = [(f"norm{level}.", f"{BODY}norm{level}.") for level in range(4)]


def mmdet_swin_rules(prefix: str) -> list[Rule]:
    """For mmdetection's Swin whose keys begin with `prefix`."""
    block = [
        ("norm1.", "norm1."),
        ("attn.w_msa.", "attn."),
        ("norm2.", "norm2."),
        ("ffn.layers.0.0.", "mlp.fc1."),
        ("ffn.layers.1.", "mlp.fc2."),
    ]
    rules = [
        ("patch_embed.projection.", "patch_embed.proj."),
        ("patch_embed.norm.", "patch_embed.norm."),
        *under("stages.*.blocks.*.", "layers.*.blocks.*.", block),
        ("stages.*.downsample.", "layers.*.downsample."),
    ]
    return under(prefix, BODY, rules) + under(prefix, "", OUTPUT_NORMS)


def reorder_patch_merging(name: str, value: Tensor) -> Tensor:
    """Bring the 4 C channels that patch merging reads from mmdetection's order into that of Swin's authors.

    mmdetection unfolds the image: its order is channel by channel, and within a channel the pixels (row, column) of a
    2x2 patch row by row. The authors concatenate pixels: their order is pixel by pixel, column by column, and within a
    pixel the channels. The norm (4 C,) and the reduction (2 C, 4 C) both read these channels along their last axis;
    all other weights are returned unchanged.
    """
    if not name.startswith(f"{BODY}layers.") or ".downsample." not in name:
        return value
    by_pixel = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return by_pixel.movedim(-3, -1).transpose(-3, -2).flatten(-3)  # (..., column, row, C)


SWIN = Kind(
    name="swin",
    sign="layers.0.blocks.*",
    rules=lambda names: [(part, BODY + part) for part in ("patch_embed.", "layers.")] + OUTPUT_NORMS,
    # The classifier with the norm before it, and masks that detectron2 computes for each image.
    dead=("head.*", "norm.*", "*.attn_mask"),
    may_lack=(f"{BODY}norm?.*",),
    config=IMAGES,
)

# The Sparse R-CNN authors' checkpoints. Theirs is a detectron2 project too, so the backbone has our names already.

SPARSE_RCNN_LAYER: list[Rule] = [
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


def _sparse_rcnn_rules(names: Collection[str]) -> list[Rule]:
    classifier, deltas = (_tower_length(names, tower) for tower in ("cls_module", "reg_module"))
    last = [("class_logits.", f"class_branch.{classifier}."), ("bboxes_delta.", f"box_branch.{deltas}.")]
    return [
        ("backbone.", "backbone."),
        ("init_proposal_boxes.weight", "queries.boxes"),
        ("init_proposal_features.", "queries.content."),
        *under("head.head_series.*.", "decoder.layers.*.", [*SPARSE_RCNN_LAYER, *last]),
    ]


def _tower_length(names: Collection[str], tower: str) -> int:
    """The number of modules in a tower, whose layers are Linear, LayerNorm and ReLU.

    It is also the number, in our sequence, of the Linear that follows.
    """
    pattern = re.compile(rf"head\.head_series\.\d+\.{tower}\.(\d+)\..+")
    places = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    return 3 * (1 + max(places) // 3) if places else 0


def _imply_sparse_rcnn(look: Shapes, layers: list[str], dim: int) -> Config:
    class_layers, box_layers = (
        max(look.count(f"{layer}{tower}.") - 1 for layer in layers) // 3 for tower in ("class_branch", "box_branch")
    )
    cells = look.size("decoder.*.dynamic_conv.out.weight", axis=1) // dim  # of RoIAlign's square
    return {
        "MODEL.DEQDET.NUM_CLASSES": look.size(f"decoder.*.class_branch.{3 * class_layers}.*"),
        "MODEL.DEQDET.SPARSE_RCNN.POOLER_RESOLUTION": math.isqrt(cells),
        "MODEL.DEQDET.SPARSE_RCNN.DYNAMIC_DIM": look.size("decoder.*.dynamic_conv.hidden_norm.*"),
        "MODEL.DEQDET.SPARSE_RCNN.NUM_CLASS_LAYERS": class_layers,
        "MODEL.DEQDET.SPARSE_RCNN.NUM_BOX_LAYERS": box_layers,
        "MODEL.DEQDET.SPARSE_RCNN.FEEDFORWARD_DIM": look.size("decoder.*.feedforward.0.*"),
    }


SPARSE_RCNN = Kind(
    name="sparse_rcnn",
    sign="head.head_series.*",
    rules=_sparse_rcnn_rules,
    imply_layers=_imply_sparse_rcnn,
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

# The DEQDet authors' releases (mmdetection 3) and AdaMixer's (mmdetection 2), whose layers have the same names.
#
# DEQDet's names are those of the golden file of the tests. AdaMixer's are the names that its layers have there; that of
# its neck, which is not among them, could not be compared with a released file: `neck.convs.*.conv` and
# `neck.lateral_convs.*.conv` with the norm `neck.gn_out` are taken, anything else is refused by name.

ADAMIXER_LAYER: list[Rule] = [
    ("iof_tau", "attention.iof_scale"),
    ("attention.attn.", "attention.attention."),
    ("attention_norm.", "attention_norm."),
    ("sampling_n_mixing.sampling_offset_generator.0.", "points.offsets."),
    ("sampling_n_mixing.adaptive_mixing.parameter_generator.0.", "mixing.generator."),
    ("sampling_n_mixing.adaptive_mixing.out_proj.", "mixing.out."),
    ("sampling_n_mixing.norm.", "mixing_norm."),
    ("ffn.layers.0.0.", "feedforward.0."),
    ("ffn.layers.1.", "feedforward.2."),
    ("ffn_norm.", "feedforward_norm."),
    ("cls_fcs.", "class_branch."),
    ("fc_cls.", "class_branch.3."),
    ("reg_fcs.", "box_branch."),
    ("fc_reg.", "box_branch.3."),
]
MMDET: list[Rule] = [
    *resnet_rules("backbone."),
    *mmdet_swin_rules("backbone."),
    ("neck.convs.*.conv.", "backbone.convs.*."),
    ("neck.gn_out.", "backbone.norm."),
    ("rpn_head.init_proposal_bboxes.weight", "queries.boxes"),
    ("rpn_head.init_proposal_features.", "queries.content."),
]
MMDET_CONFIG = IMAGES | {
    "MODEL.DEQDET.REFINEMENT_LAYER": "AdaMixerLayer",
    "MODEL.DEQDET.QUERIES.NORM_CONTENT": True,
    "MODEL.DEQDET.QUERIES.LEARN_BOXES": False,
}


def _imply_adamixer(look: Shapes, layers: list[str], dim: int) -> Config:
    """C: hidden dimension, G: groups, P: points, P_out: mixed points. A layer generates 3 G P numbers of offsets and
    G ((C / G)^2 + P_out P) of mixing.
    """
    out_points = max(1, look.size("decoder.*.mixing.out.weight", axis=1) // dim)
    groups = _count_groups(look, dim, out_points)

    def count_points(layer: str) -> int:
        offsets = [rows // (3 * groups) for rows, _ in look.find(f"{layer}points.offsets.*")]
        mixed = [rows // groups - (dim // groups) ** 2 for rows, _ in look.find(f"{layer}mixing.generator.*")]
        return vote(offsets + [rows // out_points for rows in mixed], f"{layer}points.offsets")

    return {
        "MODEL.DEQDET.NUM_CLASSES": look.size("decoder.*.class_branch.3.*"),
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT": count_points(layers[0]),
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE": count_points(layers[-1]),
        "MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS": out_points,
        "MODEL.DEQDET.ADAMIXER.NUM_GROUPS": groups,
        "MODEL.DEQDET.ADAMIXER.NUM_HEADS": look.size("decoder.*.attention.iof_scale"),
        "MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM": look.size("decoder.*.feedforward.0.*"),
    }


def _count_groups(look: Shapes, dim: int, out_points: int) -> int:
    """G = C^2 / (rows of mixing - P_out * rows of offsets / 3), in which P cancels."""
    candidates = []
    for leaf in ("weight", "bias"):
        offsets = look.find(f"decoder.*.points.offsets.{leaf}")
        mixed = look.find(f"decoder.*.mixing.generator.{leaf}")
        for (rows, _), (mixed_rows, _) in zip(offsets, mixed, strict=False):  # both in the order of the layers
            rest = mixed_rows - out_points * rows // 3
            if rest > 0 and dim**2 % rest == 0:
                candidates.append(dim**2 // rest)
    return vote(candidates, "mixing.generator and points.offsets")


DEQDET = Kind(
    name="deqdet",
    sign="roi_head.bbox_head.*",
    rules=lambda names: [
        *MMDET,
        *under("roi_head.bbox_head.0.", "decoder.initialization.", ADAMIXER_LAYER),
        *under("roi_head.bbox_head.1.", "decoder.refinement.", ADAMIXER_LAYER),
    ],
    imply_layers=_imply_adamixer,
    dead=("roi_head.bbox_head.*.instance_interactive_conv*",),  # of a base class whose forward is overridden
    config=MMDET_CONFIG | {"MODEL.DEQDET.DECODER": "EquilibriumDecoder"},
    resnet_config=STRIDE | {"MODEL.RESNETS.NORM": "BN", "MODEL.DEQDET.FIX_BN_STATISTICS": True},
    convert=reorder_patch_merging,
    notes=("the released code takes 21 steps of refinement at test time: MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 21",),
)

ADAMIXER = replace(
    DEQDET,
    name="adamixer",
    sign="roi_head.bbox_head.2.*",  # DEQDet's has two layers only
    rules=lambda names: [
        *MMDET,
        ("neck.lateral_convs.*.conv.", "backbone.convs.*."),
        *under("roi_head.bbox_head.*.", "decoder.layers.*.", ADAMIXER_LAYER),
    ],
    config=MMDET_CONFIG | {"MODEL.DEQDET.DECODER": "StackedDecoder"},
    notes=(),
)

for _kind in (TORCHVISION, SWIN, SPARSE_RCNN, DEQDET, ADAMIXER):
    register_kind(_kind)
