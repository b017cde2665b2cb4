"""A custom backbone: patches of 4, 8, 16 and 32 pixels, each level one convolution."""

from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from deqdet.backbones import ChannelMapper


class PatchBackbone(Backbone):
    """Four levels of `channels` channels."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        strides = (4, 2, 2, 2)  # of each convolution, so 4, 8, 16 and 32 in all
        inputs = (in_channels, channels, channels, channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, channels, stride, stride), nn.ReLU())
            for count, stride in zip(inputs, strides, strict=True)
        )
        self.channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels = {}
        for number, stage in enumerate(self.stages, start=2):
            images = stage(images)
            levels[f"res{number}"] = images
        return levels

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"res{n}": ShapeSpec(channels=self.channels, stride=2**n) for n in range(2, 6)}


@BACKBONE_REGISTRY.register()
def build_patch_channel_mapper_backbone(cfg, input_shape: ShapeSpec) -> ChannelMapper:
    """The patches under AdaMixer's neck; its levels p2 to p5 are what the decoder reads."""
    bottom_up = PatchBackbone(input_shape.channels, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS)
    return ChannelMapper.from_bottom_up(bottom_up, cfg)
