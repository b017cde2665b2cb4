import math

import pytest
import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone

from deqdet.backbones import ChannelMapper


class FixedLevels(Backbone):
    """A bottom-up backbone that ignores the images: levels of strides 4, 8, ... named res2, res3, ..."""

    def __init__(self, *levels: Tensor):
        super().__init__()
        self.levels = {f"res{i}": level for i, level in enumerate(levels, start=2)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=level.shape[1], stride=2 ** int(name[3:]))
            for name, level in self.levels.items()
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.levels


def make_neck(*levels: Tensor, kernel_size: int = 1, out_channels: int = 32, names: list[str] | None = None):
    bottom_up = FixedLevels(*levels)
    names = list(bottom_up.levels) if names is None else names
    return ChannelMapper(
        bottom_up=bottom_up, in_features=names, out_channels=out_channels, kernel_size=kernel_size
    )


def images_of(neck: ChannelMapper) -> Tensor:
    """Images of the size that the strides of FixedLevels tell."""
    count, _, height, width = neck.bottom_up.levels["res2"].shape
    return torch.zeros(count, 3, 4 * height, 4 * width)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_shapes_and_parameters(kernel_size):
    levels = [torch.randn(2, 5, 8, 12), torch.randn(2, 7, 4, 6), torch.randn(2, 9, 2, 3)]
    neck = make_neck(*levels, kernel_size=kernel_size, out_channels=64)
    outputs = neck(images_of(neck))
    assert {name: tuple(level.shape) for name, level in outputs.items()} == {
        "p2": (2, 64, 8, 12),
        "p3": (2, 64, 4, 6),
        "p4": (2, 64, 2, 3),
    }
    assert {name: (s.channels, s.stride) for name, s in neck.output_shape().items()} == {
        "p2": (64, 4),
        "p3": (64, 8),
        "p4": (64, 16),
    }
    assert list(outputs) == list(neck.output_shape())
    assert neck.size_divisibility == 16
    # Kernels and biases of three convolutions; weight and bias of one norm.
    assert sum(p.numel() for p in neck.parameters()) == 64 * (5 + 7 + 9) * kernel_size**2 + 3 * 64 + 2 * 64


def test_relu_comes_before_the_norm():
    """(-3, 0, 3) -> (0, 0, 3), of mean 1 and variance 2. With 32 channels each is a group of its own."""
    neck = make_neck(torch.tensor([-3.0, 0.0, 3.0]).view(1, 1, 1, 3))
    with torch.no_grad():
        neck.convs[0].weight.fill_(1.0)
        neck.convs[0].weight[1] = -2.0  # (6, 0, -6) -> (6, 0, 0)
        neck.convs[0].bias[2] = 1.0  # (-2, 1, 4) -> (0, 1, 4): mean 5 / 3, variance 26 / 9
        level = neck(images_of(neck))["p2"][0, :, 0]
    unit = 1 / math.sqrt(2)
    assert level[0].tolist() == pytest.approx([-unit, -unit, 2 * unit], rel=1e-4)
    assert level[1].tolist() == pytest.approx([2 * unit, -unit, -unit], rel=1e-4)
    assert level[2].tolist() == pytest.approx([x / math.sqrt(26) for x in (-5, -2, 7)], rel=1e-4)


def test_groups_of_neighbouring_channels_share_their_statistics():
    """64 channels, 2 to a group: (0, 2) and (4, 6) have mean 3 and variance 5."""
    neck = make_neck(torch.tensor([0.0, 2.0]).view(1, 1, 1, 2), out_channels=64)
    with torch.no_grad():
        neck.convs[0].weight.fill_(1.0)
        neck.convs[0].bias[1::2] = 4.0
        level = neck(images_of(neck))["p2"][0, :, 0]
    expected = [[x / math.sqrt(5) for x in pair] for pair in ([-3, -1], [1, 3])]
    for channel in range(64):
        assert level[channel].tolist() == pytest.approx(expected[channel % 2], rel=1e-4)


def test_a_3x3_kernel_pads_with_zeros():
    """On ones, sums of 3 x 3 are 4 at the corners, 6 at the edges and 9 inside."""
    neck = make_neck(torch.ones(1, 1, 3, 4), kernel_size=3)
    nn.init.ones_(neck.convs[0].weight)
    with torch.no_grad():
        level = neck(images_of(neck))["p2"]
    sums = torch.tensor([[4.0, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])
    expected = (sums - sums.mean()) / sums.std(correction=0)
    torch.testing.assert_close(level[0], expected.expand(32, 3, 4), rtol=0, atol=1e-4)


def test_one_norm_is_shared_by_all_levels():
    """All levels share the parameters of the norm, but each level has its own statistics."""
    neck = make_neck(torch.arange(16.0).view(1, 1, 4, 4), 1000 * torch.arange(4.0).view(1, 1, 2, 2))
    names = [name for name, _ in neck.named_parameters()]
    assert [name for name in names if not name.startswith("convs")] == ["norm.weight", "norm.bias"]
    with torch.no_grad():
        neck.norm.weight.fill_(2.0)
        neck.norm.bias.copy_(torch.arange(32.0))
        for conv in neck.convs:
            conv.weight.fill_(1.0)
        outputs = neck(images_of(neck))
    for level in outputs.values():
        torch.testing.assert_close(level.mean((0, 2, 3)), torch.arange(32.0), rtol=0, atol=1e-4)
        deviation = level.std((0, 2, 3), correction=0)
        torch.testing.assert_close(deviation, torch.full([32], 2.0), rtol=1e-3, atol=0)


def test_it_takes_only_the_levels_it_is_given():
    levels = [torch.randn(1, 3, 2**i, 2**i) for i in (4, 3, 2, 1)]
    neck = make_neck(*levels, names=["res3", "res5"])
    outputs = neck(images_of(neck))
    assert {name: tuple(level.shape) for name, level in outputs.items()} == {
        "p3": (1, 32, 8, 8),
        "p5": (1, 32, 2, 2),
    }
    assert neck.size_divisibility == 32


def test_convolutions_start_as_xavier_uniform_without_bias():
    neck = make_neck(torch.zeros(1, 16, 2, 2), kernel_size=3, out_channels=64)
    bound = math.sqrt(6 / (9 * (16 + 64)))
    assert 0.99 * bound < neck.convs[0].weight.abs().max().item() <= bound * (1 + 1e-6)
    assert neck.convs[0].bias.count_nonzero() == 0


@pytest.mark.parametrize(
    "changed, message", [({"kernel_size": 2}, "odd, got 2"), ({"out_channels": 48}, "got 48")]
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        make_neck(torch.zeros(1, 1, 2, 2), **changed)


def test_the_narrow_resnet(small_cfg):
    torch.manual_seed(0)
    backbone = build_backbone(small_cfg("MODEL.RESNETS.BASIC_BLOCKS", [1, 2, 1, 3])).eval()
    levels = backbone.bottom_up(torch.randn(1, 3, 64, 96))
    assert {name: tuple(level.shape[1:]) for name, level in levels.items()} == {
        "res2": (8, 16, 24),
        "res3": (16, 8, 12),
        "res4": (32, 4, 6),
        "res5": (64, 2, 3),
    }
    shapes = backbone.bottom_up.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        "res2": (8, 4),
        "res3": (16, 8),
        "res4": (32, 16),
        "res5": (64, 32),
    }
    blocks = [len(getattr(backbone.bottom_up, name)) for name in shapes]
    assert blocks == [1, 2, 1, 3]
    # 3x3 kernels two a block, 1x1 where the channels change, two BatchNorm numbers a channel and convolution.
    stem = 3 * 8 * 49 + 16
    res2 = 2 * 9 * 8 * 8 + 2 * 16
    res3 = 9 * (8 * 16 + 3 * 16 * 16) + 8 * 16 + 5 * 32
    res4 = 9 * (16 * 32 + 32 * 32) + 16 * 32 + 3 * 64
    res5 = 9 * (32 * 64 + 5 * 64 * 64) + 32 * 64 + 7 * 128
    assert sum(p.numel() for p in backbone.bottom_up.parameters()) == stem + res2 + res3 + res4 + res5
    mapped = [(name, s.channels, s.stride) for name, s in backbone.output_shape().items()]
    assert mapped == [("p2", 32, 4), ("p3", 32, 8), ("p4", 32, 16), ("p5", 32, 32)]


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 4])
def test_stages_of_the_narrow_resnet_freeze(small_cfg, freeze_at):
    backbone = build_backbone(small_cfg("MODEL.BACKBONE.FREEZE_AT", freeze_at))
    for index, name in enumerate(("stem", "res2", "res3", "res4", "res5")):
        stage = getattr(backbone.bottom_up, name)
        assert {p.requires_grad for p in stage.parameters()} <= {index >= freeze_at}
        assert any(isinstance(m, nn.BatchNorm2d) for m in stage.modules()) == (index >= freeze_at)
    assert all(p.requires_grad for p in [*backbone.convs.parameters(), *backbone.norm.parameters()])


def test_bottlenecks_under_the_same_neck(small_cfg):
    """The depth chooses detectron2's ResNet: 3 + 4 + 6 + 3 blocks."""
    name = "build_resnet_channel_mapper_backbone"
    backbone = build_backbone(small_cfg("MODEL.BACKBONE.NAME", name, "MODEL.RESNETS.WIDTH_PER_GROUP", 4))
    assert [len(stage) for stage in backbone.bottom_up.stages] == [3, 4, 6, 3]
    assert [conv.in_channels for conv in backbone.convs] == [8, 16, 32, 64]
    assert backbone.convs[0].kernel_size == (1, 1)


def test_the_config_sets_the_kernel(small_cfg):
    backbone = build_backbone(small_cfg("MODEL.DEQDET.NECK.KERNEL_SIZE", 3))
    assert [conv.kernel_size for conv in backbone.convs] == [(3, 3)] * 4


LEVELS = ["res2", "res3", "res4", "res5"]
FPN = ["MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", LEVELS]


def test_the_narrow_resnet_under_an_fpn(small_cfg):
    backbone = build_backbone(small_cfg(*FPN, "MODEL.FPN.OUT_CHANNELS", 16))
    outputs = backbone(torch.randn(2, 3, 64, 96))
    assert {name: tuple(level.shape) for name, level in outputs.items()} == {
        "p2": (2, 16, 16, 24),
        "p3": (2, 16, 8, 12),
        "p4": (2, 16, 4, 6),
        "p5": (2, 16, 2, 3),
    }
    assert {name: (s.channels, s.stride) for name, s in backbone.output_shape().items()} == {
        "p2": (16, 4),
        "p3": (16, 8),
        "p4": (16, 16),
        "p5": (16, 32),
    }
    assert backbone.size_divisibility == 32
    # As under a channel mapper but for the neck: 1x1 from 8, 16, 32 and 64 channels, and 3x3, with biases.
    body = build_backbone(small_cfg()).bottom_up
    assert list(backbone.bottom_up.state_dict()) == list(body.state_dict())
    neck = sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith("bottom_up."))
    assert neck == 16 * (8 + 16 + 32 + 64) + 4 * 16 + 4 * (9 * 16 * 16 + 16)


def test_keys_of_the_fpn(small_cfg):
    """Without norms and with biases of 0 the neck is linear: of the mean of two maps it makes half of the sum's."""
    images = torch.randn(1, 3, 64, 64)
    outputs = []
    for fuse_type in ("sum", "avg"):
        torch.manual_seed(0)
        outputs.append(build_backbone(small_cfg(*FPN, "MODEL.FPN.FUSE_TYPE", fuse_type)).eval()(images))
    torch.testing.assert_close(outputs[1]["p5"], outputs[0]["p5"])
    torch.testing.assert_close(outputs[1]["p4"], 0.5 * outputs[0]["p4"])
    normed = build_backbone(small_cfg(*FPN, "MODEL.FPN.NORM", "GN"))
    assert isinstance(normed.fpn_lateral2.norm, nn.GroupNorm) and isinstance(normed.fpn_output5.norm, nn.GroupNorm)


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("body", ["resnet", "basic_resnet"])
@pytest.mark.parametrize("neck", ["channel_mapper", "fpn"])
def test_every_trained_parameter_gets_a_gradient(small_cfg, stir, body, neck, freeze_at):
    name = ["MODEL.BACKBONE.NAME", f"build_{body}_{neck}_backbone", "MODEL.BACKBONE.FREEZE_AT", freeze_at]
    small = ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 16]
    backbone = build_backbone(small_cfg(*FPN, *name, *small))
    stir(backbone)
    levels = backbone(torch.randn(2, 3, 64, 64))
    sum(levels[name].square().sum() for name in ("p2", "p3", "p4", "p5")).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None and parameter.grad.count_nonzero() > 0) == parameter.requires_grad, name
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (freeze_at > 0) and all(name.startswith("bottom_up.") for name in frozen)
