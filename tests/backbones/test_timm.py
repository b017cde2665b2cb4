"""Models of timm as backbones: levels, freezing, mistakes. Which parameters a level depends on is asked of autograd."""

import re
import sys

import pytest
import torch
from torch import nn

from detectron2.modeling import build_backbone, build_model

from deqdet import UserError
from deqdet.backbones import create_net
from deqdet.extras import how_to_install

from helpers.batches import strip, total

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

MAPPER = "MODEL.BACKBONE.NAME", "build_timm_channel_mapper_backbone", "MODEL.FPN.IN_FEATURES", []
FPN = "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FPN.IN_FEATURES", []
SMALL = "test_efficientnet"
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
# The channels of the levels of strides 4 to 32, from timm's model pages and the papers.
CHANNELS = {
    "test_efficientnet": (24, 32, 48, 64),
    "test_convnext": (24, 32, 48, 64),
    "resnet18": (64, 128, 256, 512),
    "mobilenetv2_100": (24, 32, 96, 320),
    "tf_efficientnet_lite0": (24, 40, 112, 320),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),  # (B, H, W, C), and of one image size unless told otherwise
    "mambaout_femto": (48, 96, 192, 288),  # (B, H, W, C) too, without an attribute that says so
    "twins_pcpvt_small": (64, 128, 320, 512),  # by timm's other way of extracting, which wraps the whole model
}


@pytest.fixture
def make(small_cfg):
    def build(name, *overrides, neck=MAPPER):
        torch.manual_seed(0)
        return build_backbone(small_cfg(*neck, "MODEL.TIMM.NAME", name, *overrides))

    return build


def dependencies(backbone, levels):
    """The names of the parameters of the net on which the values of some levels depend."""
    net = backbone.bottom_up.net
    parameters = {name: parameter for name, parameter in net.named_parameters()}
    asked = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    outputs = backbone.bottom_up.eval()(IMAGES)
    gradients = torch.autograd.grad(
        sum(outputs[level].sum() for level in levels), list(parameters.values()), allow_unused=True
    )
    for name, parameter in parameters.items():
        parameter.requires_grad_(asked[name])
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


@pytest.mark.parametrize("name", CHANNELS)
def test_levels(make, name):
    backbone = make(name)
    levels = backbone.bottom_up(IMAGES)
    strides = (4, 8, 16, 32)
    expected = {
        f"res{i}": (2, channels, 64 // stride, 96 // stride)
        for i, channels, stride in zip((2, 3, 4, 5), CHANNELS[name], strides, strict=True)
    }
    assert {key: tuple(level.shape) for key, level in levels.items()} == expected
    shapes = backbone.bottom_up.output_shape()
    assert [(s.channels, s.stride) for s in shapes.values()] == list(zip(CHANNELS[name], strides, strict=True))
    assert {key: s.stride for key, s in backbone.output_shape().items()} == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    assert backbone.size_divisibility == 32
    # No parameter waits for a gradient that never comes, as DistributedDataParallel would.
    assert dependencies(backbone, levels) == {key for key, _ in backbone.bottom_up.net.named_parameters()}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mambaout_femto"])
def test_channels_last_levels_are_turned(make, name):
    """Against timm's own values, of which each position is compared."""
    body = make(name).bottom_up.eval()
    with torch.no_grad():
        turned, own = body(IMAGES), body.net(IMAGES)
    for level, reference in zip(turned.values(), own, strict=True):
        for row in range(level.shape[2]):
            for column in range(level.shape[3]):
                assert torch.equal(level[:, :, row, column], reference[:, row, column])


@pytest.mark.parametrize("height, width", [(32, 32), (64, 160), (224, 96)])
def test_swin_takes_images_of_any_size(make, height, width):
    levels = make("swin_tiny_patch4_window7_224").bottom_up.eval()(torch.zeros(1, 3, height, width))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [
        (height // stride, width // stride) for stride in (4, 8, 16, 32)
    ]


@pytest.mark.parametrize("name, freeze_at", [
    *((SMALL, freeze_at) for freeze_at in range(6)),
    ("test_resnet", 1), ("test_resnet", 2), ("test_convnext", 1), ("test_convnext", 3), ("mobilenetv2_100", 2),
    ("twins_pcpvt_small", 2), ("swin_tiny_patch4_window7_224", 3), ("regnety_002", 4),
])  # fmt: skip
def test_freezing(make, name, freeze_at):
    """1 freezes the stem, k + 1 also all on which the k-th level depends."""
    backbone = make(name, "MODEL.BACKBONE.FREEZE_AT", freeze_at).train()
    net = backbone.bottom_up.net
    frozen = {key for key, parameter in net.named_parameters() if not parameter.requires_grad}
    first = dependencies(backbone, ["res2"])
    backbone.train()
    if freeze_at == 0:
        assert not frozen
    elif freeze_at == 1:
        assert frozen and frozen < first
        assert all(re.match(r"conv_stem|bn1|blocks\.0|conv1|stem|model\.patch_embeds\.0", key) for key in frozen)
    else:
        assert frozen == dependencies(backbone, [f"res{i}" for i in range(2, freeze_at + 1)])
    backbone.train()
    for key, module in net.named_modules():
        own = {f"{key}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
        if own:
            assert module.training == (not own <= frozen), key
    assert all(p.requires_grad for p in [*backbone.convs.parameters(), *backbone.norm.parameters()])


@pytest.mark.parametrize("neck", [MAPPER, FPN], ids=["channel mapper", "fpn"])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_frozen_statistics_stay_and_the_rest_trains(make, stir, neck, freeze_at):
    backbone = make(SMALL, "MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.FPN.OUT_CHANNELS", 32, neck=neck).train()
    stir(backbone)
    before = {key: value.clone() for key, value in backbone.named_buffers() if "running" in key}
    sum(level.square().sum() for level in backbone(IMAGES).values()).backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    changed = {key for key, value in before.items() if not torch.equal(value, backbone.get_buffer(key))}
    frozen = {key for key in before if freeze_at and re.match(r"bottom_up\.net\.(bn1|blocks\.[01]\.)", key)}
    assert changed == set(before) - frozen and bool(frozen) == (freeze_at > 0)


def test_the_fpn(make):
    backbone = make(SMALL, "MODEL.FPN.OUT_CHANNELS", 32, neck=FPN)
    assert {key: tuple(level.shape) for key, level in backbone(IMAGES).items()} == {
        "p2": (2, 32, 16, 24), "p3": (2, 32, 8, 12), "p4": (2, 32, 4, 6), "p5": (2, 32, 2, 3),
    }  # fmt: skip
    levels = ["res2", "res3", "res4", "res5"]
    assert make(SMALL, "MODEL.FPN.IN_FEATURES", levels, neck=FPN).in_features == tuple(levels)


def test_names_of_parameters(make):
    """They are timm's, behind a prefix, so that checkpoints stay readable."""
    names = set(make(SMALL).state_dict())
    own = set(timm.create_model(SMALL).state_dict())
    body = {name.removeprefix("bottom_up.net.") for name in names if name.startswith("bottom_up.")}
    assert body < own and {name for name in names if not name.startswith("bottom_up.")} == {
        *(f"convs.{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")), "norm.weight", "norm.bias",
    }  # fmt: skip


def test_chosen_levels(make):
    """What is behind the last level that is chosen is not built, or does not wait for a gradient."""
    backbone = make(SMALL, "MODEL.TIMM.OUT_INDICES", [2, 3])
    assert {key: s.stride for key, s in backbone.output_shape().items()} == {"p3": 8, "p4": 16}
    net = backbone.bottom_up.net
    assert {key for key, parameter in net.named_parameters() if parameter.requires_grad} == {
        key for key, _ in make(SMALL).bottom_up.net.named_parameters() if not key.startswith("blocks.4.")
    }


def test_drop_path(make):
    """Only in training, and only where it is asked for."""
    body = make("test_convnext", "MODEL.TIMM.DROP_PATH_RATE", 0.9).bottom_up
    still = body.eval()(IMAGES)
    dropped = body.train()(IMAGES)
    assert not torch.equal(dropped["res5"], still["res5"])
    body = make("test_convnext").bottom_up
    assert torch.equal(body.train()(IMAGES)["res5"], body.eval()(IMAGES)["res5"])


def test_a_detector_trains_and_detects(small_cfg, make_inputs):
    torch.manual_seed(0)
    fixed = "MODEL.DEQDET.FIX_BN_STATISTICS", True
    model = build_model(small_cfg(*MAPPER, *fixed, "MODEL.TIMM.NAME", SMALL)).train()
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    inputs = make_inputs(2, 1)
    total(model(inputs)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    results = model.eval()(strip(inputs))
    assert len(results) == 2 and all(len(result["instances"]) == 6 for result in results)


@pytest.mark.parametrize("overrides, message", [
    (["MODEL.TIMM.NAME", "resnet5"], r"MODEL.TIMM.NAME is 'resnet5', which timm .* did you mean resnet5\w"),
    (["MODEL.TIMM.NAME", "####"], r"MODEL.TIMM.NAME is '####', .*timm.list_models\(\) lists them"),
    (["MODEL.TIMM.NAME", f"{SMALL}.no_such_tag"], r"MODEL.TIMM.NAME test_efficientnet.no_such_tag cannot be created"),
    (["MODEL.TIMM.NAME", "test_vit"], r"test_vit has no level of stride 4 or 8 or 32, only of 16"),
    (["MODEL.TIMM.NAME", "test_mambaout_no"], r"which timm"),
    (["MODEL.TIMM.NAME", "levit_128s"], r"levit_128s has no level of stride 4 or 8, only of 16, 32, 64"),
    (["MODEL.TIMM.NAME", "maxvit_pico_rw_256"], r"maxvit_pico_rw_256 does not take images of every size"),
    (["MODEL.TIMM.NAME", "edgenext_xx_small", "MODEL.BACKBONE.FREEZE_AT", 6], "FREEZE_AT is 6: .* from 0 to 5"),
    (["MODEL.TIMM.NAME", "hrnet_w18_small", "MODEL.BACKBONE.FREEZE_AT", 1], "FREEZE_AT must be 0 for MODEL.TIMM.NAME"),
    (["MODEL.TIMM.NAME", SMALL, "MODEL.TIMM.OUT_INDICES", [0, 9]], r"with the levels \[0, 9\] of MODEL.TIMM"),
    (["MODEL.TIMM.NAME", "test_vit", "MODEL.TIMM.OUT_INDICES", [0, 1]], r"are \[16, 16\], but they must be different"),
])  # fmt: skip
def test_mistakes_are_one_line(make, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        make(*overrides[1:])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key, value", [("MODEL.FPN.IN_FEATURES", ["res3"]), ("MODEL.TIMM.OUT_INDICES", [1, 3])])
def test_mistakes_with_an_fpn(make, key, value):
    with pytest.raises(UserError, match=f"^{key} is "):
        make(SMALL, key, value, neck=FPN)


def test_a_model_that_cannot_give_features(make):
    names = timm.list_models(module="mlp_mixer")
    with pytest.raises(UserError, match=f"MODEL.TIMM.NAME {names[0]} "):
        make(names[0])


def test_without_timm(make, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(UserError, match=re.escape(f"): {how_to_install('timm')}")):
        make(SMALL)


def test_no_weights_are_loaded_as_a_model_is_built(make, monkeypatch):
    """A trained detector must be built without a network and without the file that its training started from."""
    monkeypatch.setattr(timm.models._builder, "load_pretrained", None)  # whoever calls it fails
    make(SMALL, "MODEL.TIMM.PRETRAINED", True)
    make(SMALL, "MODEL.TIMM.WEIGHTS", "gone.safetensors")
    with pytest.raises(UserError):
        create_net(SMALL, pretrained=True)
