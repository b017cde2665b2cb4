"""Swin from config keys: its levels, freezing, drop path, and the need for timm."""

import re
import sys

import pytest
import torch
from torch import nn

from detectron2.modeling import build_backbone

from deqdet.extras import how_to_install

SMALL = """
MODEL.BACKBONE.NAME build_swin_channel_mapper_backbone MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [2,1,1,2]
MODEL.SWIN.NUM_HEADS [1,2,4,8] MODEL.SWIN.WINDOW_SIZE 4 MODEL.SWIN.DROP_PATH_RATE 0.0
MODEL.FPN.IN_FEATURES [] MODEL.FPN.OUT_CHANNELS 32
""".split()
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def make_swin(small_cfg):
    def build(*overrides):
        torch.manual_seed(0)
        return build_backbone(small_cfg(*SMALL, *overrides))

    return build


def linear(inputs, outputs):
    return (inputs + 1) * outputs


def test_levels_and_parameters(make_swin):
    backbone = make_swin()
    levels = backbone.bottom_up(IMAGES)
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        "p0": (2, 8, 16, 24),
        "p1": (2, 16, 8, 12),
        "p2": (2, 32, 4, 6),
        "p3": (2, 64, 2, 3),
    }
    patches = linear(3 * 4 * 4, 8) + 2 * 8
    stages = []
    for dim, blocks, heads in ((8, 2, 1), (16, 1, 2), (32, 1, 4), (64, 2, 8)):
        attention = linear(dim, 3 * dim) + linear(dim, dim) + heads * 7 * 7  # offsets of -3..3 in a 4 x 4 window
        perceptron = linear(dim, 4 * dim) + linear(4 * dim, dim)
        stages.append(blocks * (attention + perceptron + 2 * 2 * dim) + 2 * dim)
    merging = [2 * 4 * dim + 4 * dim * 2 * dim for dim in (8, 16, 32)]
    count = sum(p.numel() for p in backbone.bottom_up.parameters())
    assert count == patches + sum(stages) + sum(merging)


@pytest.mark.parametrize("neck", ["channel_mapper", "fpn"])
def test_levels_under_a_neck(make_swin, neck):
    backbone = make_swin("MODEL.BACKBONE.NAME", f"build_swin_{neck}_backbone")
    shapes = {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()}
    assert shapes == {"p2": (32, 4), "p3": (32, 8), "p4": (32, 16), "p5": (32, 32)}
    assert backbone.size_divisibility == 32
    levels = backbone(IMAGES)
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        name: (2, channels, 64 // stride, 96 // stride) for name, (channels, stride) in shapes.items()
    }


@pytest.mark.parametrize("window", [2, 4])
def test_attention_stays_in_its_window(make_swin, window):
    """One block, so no shift: a changed pixel reaches the window x window patches of 4 pixels around it."""
    swin = make_swin("MODEL.SWIN.WINDOW_SIZE", window, "MODEL.SWIN.DEPTHS", [1, 1, 1, 1]).bottom_up.eval()
    changed = IMAGES.clone()
    changed[0, :, 21, 38] += 1.0
    with torch.no_grad():
        moved = (swin(changed)["p0"] != swin(IMAGES)["p0"]).any(dim=1)  # (B, H, W)
    rows, columns = moved[0].nonzero(as_tuple=True)
    top, left = 21 // 4 // window * window, 38 // 4 // window * window
    assert not moved[1].any()
    assert (rows.min(), rows.max()) == (top, top + window - 1)
    assert (columns.min(), columns.max()) == (left, left + window - 1)


@pytest.mark.parametrize("neck", ["channel_mapper", "fpn"])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_every_trained_parameter_gets_a_gradient(make_swin, stir, neck, freeze_at):
    backbone = make_swin("MODEL.BACKBONE.NAME", f"build_swin_{neck}_backbone", "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    stir(backbone)
    sum(level.square().sum() for level in backbone(IMAGES).values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None and parameter.grad.count_nonzero() > 0) == parameter.requires_grad, name


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing(make_swin, freeze_at):
    """The patch embedding at 1, a stage with its merging more at each further number; never the output norms."""
    swin = make_swin("MODEL.BACKBONE.FREEZE_AT", freeze_at).bottom_up.train()
    for index, part in enumerate([swin.patch_embed, *swin.layers], start=1):
        assert {p.requires_grad for p in part.parameters()} == {index > freeze_at}
        assert {module.training for module in part.modules()} == {index > freeze_at}
    for index in range(4):
        assert getattr(swin, f"norm{index}").weight.requires_grad


def test_drop_path_acts_in_training_on_stages_that_train(make_swin):
    swin = make_swin("MODEL.SWIN.DROP_PATH_RATE", 0.6, "MODEL.BACKBONE.FREEZE_AT", 3).bottom_up
    rates = [getattr(block.drop_path, "drop_prob", 0) for layer in swin.layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.12, 0.24, 0.36, 0.48, 0.6])
    still = swin.eval()(IMAGES)
    torch.manual_seed(0)
    dropped = swin.train()(IMAGES)
    assert [torch.equal(dropped[name], still[name]) for name in still] == [True, True, False, False]
    again = swin.eval()(IMAGES)
    assert all(torch.equal(again[name], still[name]) for name in still)


def test_without_drop_path_training_is_evaluation(make_swin):
    swin = make_swin().bottom_up
    assert all(isinstance(block.drop_path, nn.Identity) for layer in swin.layers for block in layer.blocks)
    still, trained = swin.eval()(IMAGES), swin.train()(IMAGES)
    assert all(torch.equal(trained[name], still[name]) for name in still)


def test_timm_is_needed_for_drop_path_only(make_swin, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    make_swin()
    needed = f"DROP_PATH_RATE is 0.1: above 0 it needs the package timm.*: {re.escape(how_to_install('swin'))}"
    with pytest.raises(ValueError, match=f"{needed}, or set the rate to 0$"):
        make_swin("MODEL.SWIN.DROP_PATH_RATE", 0.1)


@pytest.mark.parametrize("freeze_at", [-1, 6])
def test_freezing_what_is_not_there(make_swin, freeze_at):
    with pytest.raises(ValueError, match=f"FREEZE_AT must be 0 to 5 for this Swin, got {freeze_at}"):
        make_swin("MODEL.BACKBONE.FREEZE_AT", freeze_at)


def test_the_fpn_takes_all_levels(make_swin):
    fpn = "MODEL.BACKBONE.NAME", "build_swin_fpn_backbone"
    named = make_swin(*fpn, "MODEL.FPN.IN_FEATURES", ["p0", "p1", "p2", "p3"])
    assert named.in_features == make_swin(*fpn).in_features == ("p0", "p1", "p2", "p3")
    with pytest.raises(ValueError, match=re.escape("must be ['p0', 'p1', 'p2', 'p3'] (or []) for Swin, got ['p1']")):
        make_swin(*fpn, "MODEL.FPN.IN_FEATURES", ["p1"])
