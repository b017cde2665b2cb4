"""Backbones with a neck, by name in detectron2's BACKBONE_REGISTRY."""

from .channel_mapper import ChannelMapper, build_resnet_channel_mapper_backbone

__all__ = ["ChannelMapper", "build_resnet_channel_mapper_backbone"]
