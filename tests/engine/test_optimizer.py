"""Groups, learning rates and decays by name; clipped gradients by hand."""

import io
import re

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage

from deqdet import add_deqdet_config
from deqdet.engine.optimizer import build_optimizer, has_fused_kernel


def make_cfg(**solver):
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.001, "SOLVER.WEIGHT_DECAY", 0.01])
    for key, value in solver.items():
        cfg.merge_from_list(["SOLVER." + key.replace("__", "."), value])
    return cfg


def make_model():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.bottom_up = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model.backbone.bottom_up[2].requires_grad_(False)
    model.backbone.norm = nn.GroupNorm(2, 4)
    model.queries = nn.Embedding(5, 4)
    model.decoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.decoder_head = nn.Linear(4, 1)  # its name only begins like the decoder's
    return model


def by_name(optimizer, model):
    """{name: (lr, weight decay)}, in thousandths."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[p]: (pytest.approx(1000 * group["lr"]), pytest.approx(1000 * group["weight_decay"]))
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_groups_of_the_paper():
    model = make_model()
    optimizer = build_optimizer(make_cfg(), model)
    plain, decoder = (1, 10), (4, 100)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert by_name(optimizer, model) == {
        "backbone.bottom_up.0.weight": plain,
        "backbone.bottom_up.0.bias": plain,
        "backbone.bottom_up.1.weight": plain,
        "backbone.bottom_up.1.bias": plain,
        "backbone.norm.weight": plain,
        "backbone.norm.bias": plain,
        "queries.weight": plain,
        "decoder.0.weight": decoder,
        "decoder.0.bias": decoder,
        "decoder.1.weight": decoder,
        "decoder.1.bias": decoder,
        "decoder_head.weight": plain,
        "decoder_head.bias": plain,
    }
    assert len(optimizer.param_groups) == 2


def test_groups_with_detectron2s_keys_and_backbone_norms():
    cfg = make_cfg(
        WEIGHT_DECAY_NORM=0.002,
        WEIGHT_DECAY_BIAS=0.003,
        BIAS_LR_FACTOR=2.0,
        DECODER_LR_MULTIPLIER=1.0,
        BACKBONE_NORM_LR_MULTIPLIER=0.5,
        BACKBONE_NORM_DECAY_MULTIPLIER=0.0,
    )
    model = make_model()
    groups = by_name(build_optimizer(cfg, model), model)
    assert groups["backbone.bottom_up.0.bias"] == (2, 3)
    assert groups["backbone.bottom_up.1.weight"] == (0.5, 0)
    assert groups["backbone.bottom_up.1.bias"] == (1, 0)
    assert groups["backbone.norm.weight"] == (1, 2)
    assert groups["decoder.0.weight"] == (1, 100)
    assert groups["decoder.1.weight"] == (1, 20)


def test_groups_with_a_backbone_of_its_own_rate():
    """Of the backbone without its neck; that of its norms multiplies it; no decay changes."""
    cfg = make_cfg(BACKBONE_LR_MULTIPLIER=0.25, BACKBONE_NORM_LR_MULTIPLIER=0.5)
    model = make_model()
    groups = by_name(build_optimizer(cfg, model), model)
    assert groups["backbone.bottom_up.0.weight"] == groups["backbone.bottom_up.0.bias"] == (0.25, 10)
    assert groups["backbone.bottom_up.1.weight"] == groups["backbone.bottom_up.1.bias"] == (0.125, 10)
    assert groups["backbone.norm.weight"] == groups["queries.weight"] == (1, 10)
    assert groups["decoder.0.weight"] == (4, 100)


def test_groups_of_swin(small_cfg):
    """The recipe's tenth of the rate and no decay for the norms and tables of Swin, not for the neck."""
    keys = "MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [1,1,1,1] MODEL.SWIN.NUM_HEADS [1,1,1,1] MODEL.SWIN.WINDOW_SIZE 2"
    backbone = "MODEL.BACKBONE.NAME build_swin_channel_mapper_backbone MODEL.SWIN.DROP_PATH_RATE 0.0"
    multipliers = "SOLVER.BACKBONE_NORM_LR_MULTIPLIER 0.1 SOLVER.BACKBONE_NORM_DECAY_MULTIPLIER 0.0"
    rates = "SOLVER.BASE_LR 0.001 SOLVER.WEIGHT_DECAY 0.01"
    cfg = small_cfg(*f"{keys} {backbone} {multipliers} {rates}".split())
    model = build_model(cfg)
    groups = by_name(build_optimizer(cfg, model), model)
    norms = {name for name, values in groups.items() if values == (0.1, 0)}
    tables = {name for name in norms if name.endswith("attn.relative_position_bias_table")}
    assert len(tables) == 4
    norms -= tables
    # One after the patches, two a block, one at each merging and each output: weight and bias each.
    assert len(norms) == 2 * (1 + 2 * 4 + 3 + 4)
    assert all(re.search(r"^backbone\.bottom_up\..*norm\d?\.(weight|bias)$", name) for name in norms)
    others = {name: values for name, values in groups.items() if name not in norms | tables}
    assert {name for name in others if "norm" in name} == {
        name for name, _ in model.named_parameters() if "norm" in name and not name.startswith("backbone.bottom_up.")
    }
    for name, values in others.items():
        assert values == ((4, 100) if name.startswith("decoder.") else (1, 10)), name
    assert "backbone.norm.weight" in others
    assert len(groups) == len(list(model.parameters()))


def test_the_schedule_scales_every_group():
    model = make_model()
    cfg = make_cfg(MAX_ITER=4, STEPS=(2,), WARMUP_ITERS=0, GAMMA=0.1)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    groups = by_name(optimizer, model)
    assert groups["queries.weight"] == (0.1, 10) and groups["decoder.0.weight"] == (0.4, 100)


def two_parameters(first=(3.0, 4.0), second=(12.0,)):
    """A model whose two parameters have these gradients."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))})
    model["a"].grad, model["b"].grad = torch.tensor(first), torch.tensor(second)
    return model


@pytest.mark.parametrize(
    ("enabled", "clip_type", "norm_type", "value", "expected"),
    [
        (True, "full_model", 2.0, 1.0, ([3 / 13, 4 / 13], [12 / 13])),
        (True, "full_model", float("inf"), 3.0, ([0.75, 1.0], [3.0])),
        (True, "full_model", 2.0, 13.5, ([3.0, 4.0], [12.0])),
        (True, "norm", 2.0, 1.0, ([0.6, 0.8], [1.0])),
        (True, "value", 2.0, 3.5, ([3.0, 3.5], [3.5])),
        (False, "full_model", 2.0, 1.0, ([3.0, 4.0], [12.0])),
    ],
)
def test_clipped_gradients(enabled, clip_type, norm_type, value, expected):
    cfg = make_cfg(
        CLIP_GRADIENTS__ENABLED=enabled,
        CLIP_GRADIENTS__CLIP_TYPE=clip_type,
        CLIP_GRADIENTS__CLIP_VALUE=value,
        CLIP_GRADIENTS__NORM_TYPE=norm_type,
    )
    model = two_parameters()
    build_optimizer(cfg, model).step()
    torch.testing.assert_close(model["a"].grad, torch.tensor(expected[0]))
    torch.testing.assert_close(model["b"].grad, torch.tensor(expected[1]))


def clipping(**solver):
    return make_cfg(CLIP_GRADIENTS__ENABLED=True, CLIP_GRADIENTS__CLIP_TYPE="full_model", **solver)


def test_the_norm_before_clipping_is_logged():
    optimizer = build_optimizer(clipping(), two_parameters())
    with EventStorage(7) as storage:
        optimizer.step()
    assert storage.latest()["grad_norm"] == (13.0, 7)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    model = two_parameters(second=(float("nan"),))
    optimizer = build_optimizer(clipping(), model)
    with EventStorage(7), pytest.raises(FloatingPointError, match="iteration=7, in 1 parameter: b$"):
        optimizer.step()
    assert model["a"].tolist() == [0, 0] and model["b"].tolist() == [0]


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def kernel(request, monkeypatch) -> bool:
    """Torch's fused AdamW, which training uses on GPUs, runs on CPUs too."""
    monkeypatch.setattr("deqdet.engine.optimizer.has_fused_kernel", lambda devices: request.param)
    return request.param


def test_the_gradient_scaler_is_divided_out_before_clipping(kernel):
    model = two_parameters()
    optimizer = build_optimizer(clipping(), model)
    scaler = GradScaler("cpu", init_scale=1024.0)
    loss = model["a"] @ torch.tensor([3.0, 4.0]) + 12 * model["b"].sum()
    model.zero_grad()
    scaler.scale(loss).backward()
    with EventStorage() as storage:
        scaler.step(optimizer)
    assert storage.latest()["grad_norm"][0] == 13.0
    assert model["b"].grad.item() == pytest.approx(12 / 13)
    assert [group["fused"] for group in optimizer.param_groups] == [kernel or None]


def test_an_overflow_of_the_gradient_scaler_is_no_error(kernel):
    model = two_parameters()
    optimizer = build_optimizer(clipping(), model)
    scaler = GradScaler("cpu", init_scale=1024.0)
    model.zero_grad()
    scaler.scale(model["b"].sum() * 3e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert model["b"].item() == 0 and scaler.get_scale() == 512.0


@pytest.mark.parametrize("devices, fused", [
    (["cuda:0"], True), (["cuda:0", "cuda:1"], True), (["cpu"], False), (["cuda:0", "cpu"], False), ([], False),
])  # fmt: skip
def test_where_adamw_is_fused(devices, fused):
    assert has_fused_kernel({torch.device(x) for x in devices}) is fused


def test_a_resumed_training_goes_on_with_the_kernel_of_its_checkpoint(monkeypatch):
    """To the bit, whatever the machine would choose for a new training."""
    torch.manual_seed(0)
    gradients = [[torch.randn(2), torch.randn(1)] for _ in range(5)]

    def advance(model, optimizer, steps) -> list[float]:
        for gradient in steps:
            for parameter, value in zip(model.values(), gradient, strict=True):
                parameter.grad = value.clone()
            optimizer.step()
        return [x for parameter in model.values() for x in parameter.tolist()]

    for fused in (True, False):
        monkeypatch.setattr("deqdet.engine.optimizer.has_fused_kernel", lambda devices, fused=fused: fused)
        whole, halves = two_parameters(), two_parameters()
        expected = advance(whole, build_optimizer(clipping(), whole), gradients)
        optimizer = build_optimizer(clipping(), halves)
        advance(halves, optimizer, gradients[:2])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        monkeypatch.setattr("deqdet.engine.optimizer.has_fused_kernel", lambda devices, fused=fused: not fused)
        resumed = build_optimizer(clipping(), halves)
        resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        assert advance(halves, resumed, gradients[2:]) == expected
        assert [bool(group["fused"]) for group in resumed.param_groups] == [fused]


def test_an_unknown_clip_type_names_the_known_ones():
    cfg = make_cfg(CLIP_GRADIENTS__CLIP_TYPE="full")
    with pytest.raises(ValueError, match="CLIP_TYPE is 'full': it must be one of full_model, value, norm"):
        build_optimizer(cfg, make_model())


@pytest.mark.parametrize("rule, images, expected", [("linear", 8, 0.05), ("sqrt", 4, 0.05), ("linear", 32, 0.2)])
def test_the_learning_rate_follows_the_batch(rule, images, expected, caplog):
    """BASE_LR 0.1 is for 16 images: half of them give half the rate, or a quarter of them by the square root."""
    cfg = make_cfg(BASE_LR=0.1, LR_RULE=rule, REFERENCE_BATCH=16, IMS_PER_BATCH=images)
    with caplog.at_level("INFO"):
        optimizer = build_optimizer(cfg, make_model())
    assert min(group["lr"] for group in optimizer.param_groups) == pytest.approx(expected)
    assert f"learning rate {expected:g}: SOLVER.BASE_LR 0.1 is for 16 images" in caplog.text
    assert cfg.SOLVER.BASE_LR == 0.1


def test_without_a_rule_the_batch_does_not_matter(caplog):
    cfg = make_cfg(BASE_LR=0.1, REFERENCE_BATCH=16, IMS_PER_BATCH=64)
    assert min(group["lr"] for group in build_optimizer(cfg, make_model()).param_groups) == 0.1
