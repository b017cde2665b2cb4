"""A narrow ResNet of basic blocks for small images and CPUs. detectron2 builds such a ResNet at full width only."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from .channel_mapper import ChannelMapper
from .fpn import build_fpn


def build_basic_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build detectron2's ResNet; MODEL.RESNETS.BASIC_BLOCKS lists the numbers of basic blocks in res2, res3, ...

    The first stage has MODEL.RESNETS.RES2_OUT_CHANNELS channels, and each further stage twice as many as the one
    before.
    """
    resnets = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    stages, channels = [], resnets.STEM_OUT_CHANNELS
    for index, blocks in enumerate(resnets.BASIC_BLOCKS):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                in_channels=channels,
                out_channels=resnets.RES2_OUT_CHANNELS * 2**index,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                norm=resnets.NORM,
            )
        )
        channels = resnets.RES2_OUT_CHANNELS * 2**index
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_basic_resnet_channel_mapper_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ChannelMapper:
    """Build the narrow ResNet with a channel mapper on the levels MODEL.RESNETS.OUT_FEATURES."""
    return ChannelMapper.from_bottom_up(build_basic_resnet(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the narrow ResNet with detectron2's FPN on the levels MODEL.FPN.IN_FEATURES."""
    return build_fpn(cfg, build_basic_resnet(cfg, input_shape), cfg.MODEL.FPN.IN_FEATURES)
