"""detectron2's FPN, the neck of Sparse R-CNN, on backbones that detectron2 does not put under it."""

from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN


def build_fpn(cfg: CfgNode, bottom_up: Backbone, in_features: list[str]) -> FPN:
    """An FPN as MODEL.FPN describes it, on these levels of a backbone, finest first.

    The level of stride 2^n becomes "p<n>". There is no further level on top, which nothing here would read.
    """
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
