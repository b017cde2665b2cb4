"""The DEQDet authors' releases (mmdetection 3) and AdaMixer's (mmdetection 2), whose layers have the same names.

DEQDet's names are those of the golden file of the tests. AdaMixer's are the names that its layers have there; that of
its neck, which is not among them, could not be compared with a released file: `neck.convs.*.conv` and
`neck.lateral_convs.*.conv` with the norm `neck.gn_out` are taken, anything else is refused by name.
"""

from ..renaming import Rule, under
from .base import Kind
from .swin import mmdet_swin_rules, reorder_patch_merging
from .torchvision import IMAGES, STRIDE, resnet_rules

LAYER: list[Rule] = [
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
SHARED: list[Rule] = [
    *resnet_rules("backbone."),
    *mmdet_swin_rules("backbone."),
    ("neck.convs.*.conv.", "backbone.convs.*."),
    ("neck.gn_out.", "backbone.norm."),
    ("rpn_head.init_proposal_bboxes.weight", "queries.boxes"),
    ("rpn_head.init_proposal_features.", "queries.content."),
]
# Parts of a base class whose forward is overridden.
DEAD = ("roi_head.bbox_head.*.instance_interactive_conv*",)
CONFIG = IMAGES | {
    "MODEL.DEQDET.REFINEMENT_LAYER": "AdaMixerLayer",
    "MODEL.DEQDET.QUERIES.NORM_CONTENT": True,
    "MODEL.DEQDET.QUERIES.LEARN_BOXES": False,
}
RESNET_CONFIG = STRIDE | {"MODEL.RESNETS.NORM": "BN", "MODEL.DEQDET.FIX_BN_STATISTICS": True}

DEQDET = Kind(
    name="deqdet",
    sign="roi_head.bbox_head.*",
    rules=lambda names: [
        *SHARED,
        *under("roi_head.bbox_head.0.", "decoder.initialization.", LAYER),
        *under("roi_head.bbox_head.1.", "decoder.refinement.", LAYER),
    ],
    dead=DEAD,
    config=CONFIG | {"MODEL.DEQDET.DECODER": "EquilibriumDecoder"},
    resnet_config=RESNET_CONFIG,
    convert=reorder_patch_merging,
    notes=("the released code takes 21 steps of refinement at test time: MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 21",),
)

ADAMIXER = Kind(
    name="adamixer",
    sign="roi_head.bbox_head.2.*",
    rules=lambda names: [
        *SHARED,
        ("neck.lateral_convs.*.conv.", "backbone.convs.*."),
        *under("roi_head.bbox_head.*.", "decoder.layers.*.", LAYER),
    ],
    dead=DEAD,
    config=CONFIG | {"MODEL.DEQDET.DECODER": "StackedDecoder"},
    resnet_config=RESNET_CONFIG,
    convert=reorder_patch_merging,
)
