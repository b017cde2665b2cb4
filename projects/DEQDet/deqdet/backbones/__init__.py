"""Backbones with their necks; importing this package registers them in detectron2's BACKBONE_REGISTRY."""

from .basic_resnet import build_basic_resnet_channel_mapper_backbone, build_basic_resnet_fpn_backbone
from .channel_mapper import ChannelMapper, build_resnet_channel_mapper_backbone
from .swin import build_swin_channel_mapper_backbone, build_swin_fpn_backbone
from .timm_backbone import (
    TimmBackbone,
    build_timm_channel_mapper_backbone,
    build_timm_fpn_backbone,
    create_net,
    import_timm,
)

__all__ = [
    "ChannelMapper",
    "TimmBackbone",
    "build_basic_resnet_channel_mapper_backbone",
    "build_basic_resnet_fpn_backbone",
    "build_resnet_channel_mapper_backbone",
    "build_swin_channel_mapper_backbone",
    "build_swin_fpn_backbone",
    "build_timm_channel_mapper_backbone",
    "build_timm_fpn_backbone",
    "create_net",
    "import_timm",
]
