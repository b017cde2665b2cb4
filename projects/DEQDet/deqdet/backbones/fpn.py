"""detectron2's FPN, the neck of Sparse R-CNN, for backbones with which detectron2 itself does not combine it."""

from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN


def build_fpn(cfg: CfgNode, bottom_up: Backbone, in_features: list[str]) -> FPN:
    """Build the FPN that MODEL.FPN describes on the given levels of a backbone, finest first.

    The output level of stride 2^n has the name "p<n>". detectron2 usually adds one more level on top (p6). This FPN has
    none, because no refinement layer would read it.
    """
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
