"""The neck of AdaMixer: every level of a backbone mapped to the same number of channels."""

from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import build_resnet_backbone

NORM_GROUPS = 32


class ChannelMapper(Backbone):
    """Convolution, ReLU and one GroupNorm shared by all levels: outputs "p2".."p5" of a bottom-up backbone."""

    def __init__(self, *, bottom_up: Backbone, in_features: list[str], out_channels: int, kernel_size: int):
        """
        Args:
            in_features: levels of the bottom-up backbone, finest first; the one of stride 2^n becomes "p<n>".
            kernel_size: k, odd.

        Raises:
            ValueError: kernel_size is even, or out_channels not a multiple of 32.
        """
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"MODEL.DEQDET.NECK.KERNEL_SIZE must be odd, got {kernel_size}")
        if out_channels % NORM_GROUPS:
            raise ValueError(f"MODEL.DEQDET.HIDDEN_DIM must be a multiple of {NORM_GROUPS}, got {out_channels}")
        shapes = bottom_up.output_shape()
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        self.convs = nn.ModuleList(
            nn.Conv2d(shapes[name].channels, out_channels, kernel_size, padding=kernel_size // 2)
            for name in in_features
        )
        self.norm = nn.GroupNorm(NORM_GROUPS, out_channels)
        self._shapes = {
            f"p{shapes[name].stride.bit_length() - 1}": ShapeSpec(channels=out_channels, stride=shapes[name].stride)
            for name in in_features
        }
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    @classmethod
    def from_bottom_up(cls, bottom_up: Backbone, cfg: CfgNode) -> "ChannelMapper":
        """The neck that the config describes, on all levels that a backbone puts out."""
        return cls(
            bottom_up=bottom_up,
            in_features=list(bottom_up.output_shape()),
            out_channels=cfg.MODEL.DEQDET.HIDDEN_DIM,
            kernel_size=cfg.MODEL.DEQDET.NECK.KERNEL_SIZE,
        )

    @property
    def size_divisibility(self) -> int:
        """The input is padded to a multiple of the coarsest stride."""
        return max(shape.stride for shape in self._shapes.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output level."""
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> per level (B, C, H / s_l, W / s_l)."""
        levels = self.bottom_up(images)
        mapped = [self.norm(conv(levels[name]).relu()) for conv, name in zip(self.convs, self.in_features, strict=True)]
        return dict(zip(self._shapes, mapped, strict=True))


@BACKBONE_REGISTRY.register()
def build_resnet_channel_mapper_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ChannelMapper:
    """detectron2's ResNet (MODEL.RESNETS.*) under a channel mapper on MODEL.RESNETS.OUT_FEATURES."""
    return ChannelMapper.from_bottom_up(build_resnet_backbone(cfg, input_shape), cfg)
