"""detectron2's SwinTransformer (Swin Transformer, ICCV 2021), built from config keys, with either neck."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, SwinTransformer

from ..extras import how_to_install
from .channel_mapper import ChannelMapper
from .fpn import build_fpn


class FreezableSwin(SwinTransformer):
    """detectron2's SwinTransformer whose frozen stages stay in evaluation mode, so they never drop a path."""

    def train(self, mode: bool = True) -> "FreezableSwin":
        """Set the mode of all stages but the frozen ones; SwinTransformer would change their mode too."""
        super().train(mode)
        self._freeze_stages()
        return self


def build_swin(cfg: CfgNode, input_shape: ShapeSpec) -> FreezableSwin:
    """Build the transformer that MODEL.SWIN describes, with the levels "p0", "p1", ... of strides 4, 8, ...

    With MODEL.BACKBONE.FREEZE_AT = 0 nothing is frozen, with 1 the patch embedding, with k > 1 the first k - 1 stages
    as well. The norms at the outputs are never frozen.

    Raises:
        ValueError: FREEZE_AT is negative or larger than the number of stages + 1, or DROP_PATH_RATE is above 0 and timm
            is not installed.
    """
    swin, freeze_at = cfg.MODEL.SWIN, cfg.MODEL.BACKBONE.FREEZE_AT
    most = len(swin.DEPTHS) + 1
    if not 0 <= freeze_at <= most:
        raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to {most} for this Swin, got {freeze_at}")
    try:
        return FreezableSwin(
            in_chans=input_shape.channels,
            embed_dim=swin.EMBED_DIM,
            depths=swin.DEPTHS,
            num_heads=swin.NUM_HEADS,
            window_size=swin.WINDOW_SIZE,
            drop_path_rate=swin.DROP_PATH_RATE,
            out_indices=tuple(range(len(swin.DEPTHS))),
            frozen_stages=freeze_at if freeze_at else -1,
        )
    except ImportError as error:
        raise ValueError(
            f"MODEL.SWIN.DROP_PATH_RATE is {swin.DROP_PATH_RATE}: above 0 it needs the package timm, which cannot be "
            f"imported ({error}): {how_to_install('swin')}, or set the rate to 0"
        ) from error


@BACKBONE_REGISTRY.register()
def build_swin_channel_mapper_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ChannelMapper:
    """Build Swin with a channel mapper on all its levels."""
    return ChannelMapper.from_bottom_up(build_swin(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Swin with detectron2's FPN on all its levels.

    Raises:
        ValueError: MODEL.FPN.IN_FEATURES is neither empty nor the list of all levels. A level that is left out would
            have parameters without a gradient, with which DistributedDataParallel fails.
    """
    bottom_up = build_swin(cfg, input_shape)
    levels = list(bottom_up.output_shape())
    if cfg.MODEL.FPN.IN_FEATURES not in ([], levels):
        raise ValueError(f"MODEL.FPN.IN_FEATURES must be {levels} (or []) for Swin, got {cfg.MODEL.FPN.IN_FEATURES}")
    return build_fpn(cfg, bottom_up, levels)
