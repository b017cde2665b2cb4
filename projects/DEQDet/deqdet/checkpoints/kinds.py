"""The kinds of checkpoints that can be converted. `register_kind` adds one, as for a user's own layer."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from .files import COUNTER
from .implied import BODY, Config, Given, ImplyLayers, Shapes, has_swin, imply_detector, imply_resnet, imply_swin, vote

# A name in the file and our name for it. Each * matches a number, the same in both names. A rule that ends with a dot
# renames every name with that prefix; any other rule renames one parameter.
Rule = tuple[str, str]


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """Prefix the rules of a submodule with its name in the file, `theirs`, and with our name for it, `ours`."""
    return [(theirs + their_part, ours + our_part) for their_part, our_part in rules]


def _unchanged(name: str, value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: how to recognise it, how to rename its weights, and the config that shapes do not show."""

    name: str
    sign: str  # a shell pattern; a file with a matching key is taken to be of this kind
    rules: Callable[[Collection[str]], list[Rule]]  # the renaming rules for a file with the given keys
    imply_layers: ImplyLayers | None = None  # derives the refinement layer's config keys; None: only a backbone
    dead: tuple[str, ...] = ()  # shell patterns of the file's keys that nothing uses
    may_lack: tuple[str, ...] = ()  # shell patterns of our names: weights that the file may lack
    config: Mapping[str, object] = field(default_factory=dict)  # implied by the kind, regardless of shapes
    resnet_config: Mapping[str, object] = field(default_factory=dict)  # the same, if the backbone is a ResNet
    convert: Callable[[str, Tensor], Tensor] = _unchanged  # (our name, the file's value) -> our value
    notes: tuple[str, ...] = ()  # for the user

    @property
    def backbone_only(self) -> bool:
        return self.imply_layers is None

    def imply_config(self, tensors: Mapping[str, Given]) -> Config:
        """Derive the config of the detector, or of the backbone alone, that has these tensors.

        It contains every key that the file determines, even if the value is the default.

        Args:
            tensors: the file's tensors by our names.

        Raises:
            CheckpointError: the shapes are not those of a detector; says why.
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

    To guess a file's kind, the signs are tried from the last registered kind to the first, so the sign of a new kind
    may be a special case of an older one.

    Raises:
        ValueError: another kind has this name.
    """
    if kind.name in KINDS:
        raise ValueError(f"a kind {kind.name!r} already exists: use another name")
    KINDS[kind.name] = kind
    return kind


# torchvision's ResNets, alone or as the backbone of a detector that keeps these names.

# The image format of torchvision's ImageNet weights, whose stride is in the 3x3 convolutions.
IMAGES = {
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}
STRIDE = {"MODEL.RESNETS.STRIDE_IN_1X1": False}


def resnet_rules(prefix: str) -> list[Rule]:
    """Return the rules for a ResNet with bottlenecks whose keys begin with `prefix`."""
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
    # The classifier, and BatchNorm's batch counters, which nothing reads and FrozenBatchNorm does not accept.
    dead=("fc.*", f"*{COUNTER}"),
    config=IMAGES,
    resnet_config=STRIDE,
)

# Swin Transformers: the authors' ImageNet checkpoints, whose names detectron2 kept, and mmdetection's names and layout.

OUTPUT_NORMS = [(f"norm{level}.", f"{BODY}norm{level}.") for level in range(4)]


def mmdet_swin_rules(prefix: str) -> list[Rule]:
    """Return the rules for mmdetection's Swin whose keys begin with `prefix`."""
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
    """Reorder the 4 C channels that patch merging reads, from mmdetection's order to that of Swin's authors.

    mmdetection unfolds the image, which gives the order (channel, row, column) within a 2x2 patch. The authors
    concatenate pixels, which gives (column, row, channel). The norm (4 C,) and the reduction (2 C, 4 C) both read these
    channels along their last axis; all other weights are returned unchanged.
    """
    if not name.startswith(f"{BODY}layers.") or ".downsample." not in name:
        return value
    by_pixel = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return by_pixel.movedim(-3, -1).transpose(-3, -2).flatten(-3)  # (..., column, row, C)


SWIN = Kind(
    name="swin",
    sign="layers.0.blocks.*",
    rules=lambda names: [(part, BODY + part) for part in ("patch_embed.", "layers.")] + OUTPUT_NORMS,
    # The classifier with the norm before it, and the attention masks, which detectron2 computes for each image.
    dead=("head.*", "norm.*", "*.attn_mask"),
    may_lack=(f"{BODY}norm?.*",),
    config=IMAGES,
)

# The Sparse R-CNN authors' checkpoints. Their code is a detectron2 project too, so the backbone already has our names.

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
    """Return the number of modules in a tower, each of whose layers is a Linear, a LayerNorm and a ReLU.

    In our nn.Sequential, this is also the index of the Linear that follows the tower.
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
# DEQDet's names, and those of AdaMixer's layers, are from the golden file of the tests. The names in AdaMixer's neck
# are not in it, and could not be compared with a released file: we accept `neck.convs.*.conv` and
# `neck.lateral_convs.*.conv` with the norm `neck.gn_out`, and report any other name as unknown.

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
    """Derive the keys of AdaMixer's layers.

    With C the hidden dimension, G groups, P points and P_out mixed points, a layer generates 3 G P numbers for the
    offsets and G ((C / G)^2 + P_out P) for the mixing.
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
    """Compute G = C^2 / (rows of mixing - P_out * rows of offsets / 3), in which P cancels."""
    candidates = []
    for leaf in ("weight", "bias"):
        offsets = look.find(f"decoder.*.points.offsets.{leaf}")
        mixed = look.find(f"decoder.*.mixing.generator.{leaf}")
        for (rows, _), (mixed_rows, _) in zip(offsets, mixed, strict=False):  # both are in layer order
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
