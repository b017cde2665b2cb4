"""The neck of AdaMixer, which maps every level of a backbone to the same number of channels."""

from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import build_resnet_backbone

from ..contract import check_levels, read_shapes

NORM_GROUPS = 32


class ChannelMapper(Backbone):
    """Maps each level by its own convolution, a ReLU, and one GroupNorm that all levels share.

    The output level of stride 2^n has the name "p<n>": "p2" to "p5" for strides 4 to 32.
    """

    def __init__(self, *, bottom_up: Backbone, in_features: list[str], out_channels: int, kernel_size: int):
        """
        Args:
            bottom_up: the backbone under the neck.
            in_features: the names of the backbone's levels to map, finest first.
            out_channels: C, the channels of every output level.
            kernel_size: k, the side of the convolutions' kernels, odd.

        Raises:
            ValueError: kernel_size is even, or out_channels is not a multiple of 32.
            UserError: the backbone's `output_shape` is no dict of channels and strides.
        """
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"MODEL.DEQDET.NECK.KERNEL_SIZE must be odd, got {kernel_size}")
        if out_channels % NORM_GROUPS:
            raise ValueError(f"MODEL.DEQDET.HIDDEN_DIM must be a multiple of {NORM_GROUPS}, got {out_channels}")
        shapes = read_shapes(bottom_up, in_features)
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
        """Build the neck that the config describes, on all output levels of a backbone."""
        return cls(
            bottom_up=bottom_up,
            in_features=list(read_shapes(bottom_up)),
            out_channels=cfg.MODEL.DEQDET.HIDDEN_DIM,
            kernel_size=cfg.MODEL.DEQDET.NECK.KERNEL_SIZE,
        )

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride in pixels: the sides of the padded input are multiples of it."""
        return max(shape.stride for shape in self._shapes.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and the stride of each output level."""
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the levels (B, C, H / s_l, W / s_l), of strides s_l, from images (B, 3, H, W)."""
        levels = self.bottom_up(images)
        check_levels(self.bottom_up, levels, self.in_features, images)
        mapped = [self.norm(conv(levels[name]).relu()) for conv, name in zip(self.convs, self.in_features, strict=True)]
        return dict(zip(self._shapes, mapped, strict=True))


@BACKBONE_REGISTRY.register()
def build_resnet_channel_mapper_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ChannelMapper:
    """Build detectron2's ResNet (MODEL.RESNETS) with a channel mapper on the levels MODEL.RESNETS.OUT_FEATURES."""
    return ChannelMapper.from_bottom_up(build_resnet_backbone(cfg, input_shape), cfg)
