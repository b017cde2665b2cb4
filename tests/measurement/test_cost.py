"""Parameters and multiply-adds: counts by hand, a trace of the whole detector, the paper's figures, the tool."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from deqdet import add_deqdet_config
from deqdet.decoders import Decoder, Execution
from deqdet.errors import UserError
from deqdet.measurement.cost import (
    Cost,
    MultiplyAdds,
    count_multiply_adds,
    count_parameters,
    format_cost,
    format_parameters,
    plan_execution,
    trace,
)
from deqdet.queries import InitialQueries

from helpers.paths import ROOT

TOOL = ROOT / "tools" / "analyze_model.py"
DECODERS = ("EquilibriumDecoder", "RecurrentDecoder", "StackedDecoder")
LEVELS = ["res2", "res3", "res4", "res5"]
FPN = ("MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone",
       "MODEL.FPN.IN_FEATURES", LEVELS, "MODEL.FPN.OUT_CHANNELS", 32)  # fmt: skip
SPARSE = (*FPN, "MODEL.DEQDET.REFINEMENT_LAYER", "SparseRCNNLayer", "MODEL.DEQDET.QUERIES.LEARN_BOXES", True,
          "MODEL.DEQDET.SPARSE_RCNN.FEEDFORWARD_DIM", 64, "MODEL.DEQDET.SPARSE_RCNN.DYNAMIC_DIM", 8,
          "MODEL.DEQDET.SPARSE_RCNN.POOLER_RESOLUTION", 3)  # fmt: skip
SWIN = ("MODEL.BACKBONE.NAME", "build_swin_channel_mapper_backbone", "MODEL.SWIN.EMBED_DIM", 8,
        "MODEL.SWIN.DEPTHS", [1, 1, 2, 1], "MODEL.SWIN.NUM_HEADS", [1, 2, 2, 2], "MODEL.SWIN.WINDOW_SIZE", 4,
        "MODEL.SWIN.DROP_PATH_RATE", 0.0)  # fmt: skip

# small_cfg's layers: 6 queries, 32 channels, a hidden dimension of 64, 3 classes.
N, C, HIDDEN, CLASSES = 6, 32, 64, 3
# 160 x 192 pixels are a 35th of 800 x 1344, and all strides divide both.
SMALL_IMAGE = {"height": 160, "width": 192}
SHARE = 35


def load(path: str) -> CfgNode:
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_file(str(ROOT / path))
    return cfg


def adamixer_layer() -> MultiplyAdds:
    """docs/design.md, "Refinement layers", with 2 groups, 4 points and 8 mixed points; 4 levels."""
    groups, points, mixed, group_dim = 2, 4, 8, C // 2
    offsets = C * groups * points * 3
    generator = C * groups * (group_dim * group_dim + mixed * points)
    branches = (C * C + C * 4) + (C * C + C * CLASSES)
    linear = offsets + generator + mixed * C * C + 2 * C * HIDDEN + branches
    attention = 4 * C * C + 2 * N * C  # projections, then its two products
    sampling = 4 * 4 * points * C
    mixing = groups * (points * group_dim * group_dim + mixed * points * group_dim)
    norms = 5 * (5 * C) + 4 * (points + mixed) * C  # five with an affine part, and the mixing's two without
    return MultiplyAdds(N * linear, N * (linear + attention + sampling + mixing + norms))


def sparse_rcnn_layer() -> MultiplyAdds:
    """The same for 3 x 3 cells, 2 x 2 samples each, and 8 dynamic channels."""
    cells, dynamic = 9, 8
    generator = C * 2 * C * dynamic
    towers = (C * C + C * CLASSES) + (3 * C * C + C * 4)
    linear = generator + cells * C * C + 2 * C * HIDDEN + towers
    attention = 4 * C * C + 2 * N * C
    pooling = 4 * 4 * cells * C
    filters = 2 * cells * C * dynamic
    norms = 5 * (3 * C + 4 * C + cells * dynamic + cells * C + C)  # around the blocks, of the towers, inside
    return MultiplyAdds(N * linear, N * (linear + attention + pooling + filters + norms))


class Detector(nn.Module):
    """The whole of it up to its prediction."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, initial = self.model.encode(self.model.preprocess([{"image": image}]))
        prediction = self.model.decoder.decode(initial, features).prediction
        return prediction.logits, prediction.boxes


@pytest.mark.parametrize("overrides, expected", [((), adamixer_layer()), (SPARSE, sparse_rcnn_layer())],
                         ids=["AdaMixer", "Sparse R-CNN"])  # fmt: skip
def test_a_layer_by_hand(small_model, overrides, expected):
    cost = count_multiply_adds(small_model(*overrides), height=64, width=96)
    assert cost.per_step == expected
    # g has as many points here, so that it costs the same.
    assert cost.initialization == expected and cost.steps == 4
    read_out = N * (C * C + C * CLASSES)
    assert cost.read_out == MultiplyAdds(read_out, read_out + 5 * N * C)


@pytest.mark.parametrize("overrides, decoder", [
    *(((), decoder) for decoder in DECODERS), *((SPARSE, decoder) for decoder in DECODERS), (SWIN, DECODERS[0]),
], ids=[*(f"AdaMixer-{x}" for x in DECODERS), *(f"Sparse R-CNN-{x}" for x in DECODERS), "Swin"])  # fmt: skip
def test_the_parts_make_the_whole(small_model, overrides, decoder):
    """What the parts add up to is what runs, but for the read-outs before the last and the norm of the queries."""
    # Where g has fewer points than f, neither can stand for the other.
    model = small_model(*overrides, "MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT", 2,
                        "MODEL.DEQDET.NUM_LAYERS", 3, "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 2)  # fmt: skip
    cost = count_multiply_adds(model, height=64, width=96)
    assert cost.steps == 2
    whole = trace(Detector(model.eval()), torch.zeros(3, 64, 96))[""]
    assert cost.total - cost.read_out * cost.steps + MultiplyAdds(0, 4 * N * C) == whole


@pytest.mark.parametrize("overrides, kernel, lateral", [((), 1, 0), (FPN, 9, 1)], ids=["channel mapper", "FPN"])
def test_body_and_neck_by_hand(small_model, overrides, kernel, lateral):
    cost = count_multiply_adds(small_model(*overrides), height=64, width=96)
    cells = [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    channels = [8, 16, 32, 64]
    inputs = [C if lateral else width for width in channels]
    neck = sum(n * (kernel * wide * C + lateral * width * C)
               for n, wide, width in zip(cells, inputs, channels, strict=True))  # fmt: skip
    assert cost.neck.linear == neck
    stem = 32 * 48 * 3 * 8 * 49
    blocks = cells[0] * 2 * 9 * 8 * 8
    for n, width in zip(cells[1:], channels[1:], strict=True):  # 3x3, 3x3, and 1x1 beside them
        blocks += n * width * (9 * width // 2 + 9 * width + width // 2)
    assert cost.backbone.linear == stem + blocks


def test_an_image_is_padded_as_the_model_pads_it(small_model):
    model = small_model()
    padded = count_multiply_adds(model, height=60, width=90)
    assert padded.image_size == (60, 90) and padded.padded_size == (64, 96)
    assert replace(padded, image_size=(64, 96)) == count_multiply_adds(model, height=64, width=96)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_model_costs_the_same(small_model, precision):
    """What torch.compile makes of a layer shows a tracer no operations; in bfloat16 the steps run a copy of it."""
    counts = []
    for compiled in (False, True):
        model = small_model("MODEL.DEQDET.COMPILE", compiled, "TEST.PRECISION", precision).eval()
        whole = trace(Detector(model), torch.zeros(3, 64, 96))[""]
        counts.append((count_multiply_adds(model, height=64, width=96), whole))
    assert counts[0] == counts[1]


def test_it_leaves_the_model_and_torch_as_they_were(small_model):
    model = small_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_multiply_adds(model, height=64, width=96)
    assert model.training and model.decoder.refinement.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_steps(small_model):
    model = small_model("MODEL.DEQDET.EQUILIBRIUM.USE_INIT_LAYER", False)
    cost = count_multiply_adds(model, steps=7, height=64, width=96)
    assert cost.steps == 7 and cost.initialization == MultiplyAdds(0, 0)
    assert cost.total == cost.backbone + cost.neck + adamixer_layer() * 7
    with pytest.raises(UserError, match="at least 1, got 0"):
        plan_execution(model.decoder, 0)


@pytest.mark.parametrize("decoder", DECODERS[1:])
def test_steps_of_a_fixed_number_of_layers(small_model, decoder):
    model = small_model("MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.NUM_LAYERS", 3)
    assert plan_execution(model.decoder).steps == plan_execution(model.decoder, 2).steps == 2
    with pytest.raises(UserError, match=f"{decoder} of 3 layers takes 2 steps after the first layer, not 25"):
        plan_execution(model.decoder, 25)


def test_a_decoder_of_ones_own(small_model):
    """It says itself which layers run how often; here f three times, and no initialization layer."""
    model = small_model()

    class Thrice(Decoder):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def supervise(self, initial, features):
            raise NotImplementedError

        def decode(self, initial, features):
            raise NotImplementedError

        def execution(self):
            return Execution(None, self.layer, 3)

    model.decoder = Thrice(model.decoder.refinement)
    cost = count_multiply_adds(model, height=64, width=96)
    assert (cost.steps, cost.initialization, cost.per_step) == (3, MultiplyAdds(0, 0), adamixer_layer())
    with pytest.raises(UserError, match="a Thrice of 4 layers takes 3 steps after the first layer, not 4"):
        plan_execution(model.decoder, 4)


def test_roi_align_without_a_fixed_number_of_samples(small_model):
    model = small_model(*SPARSE, "MODEL.DEQDET.SPARSE_RCNN.POOLER_SAMPLING_RATIO", 0)
    with pytest.raises(UserError, match="POOLER_SAMPLING_RATIO to at least 1"):
        count_multiply_adds(model, height=64, width=96)


@pytest.fixture(scope="module")
def dagger() -> nn.Module:
    """DEQDet with 64 points at full width."""
    cfg = load("configs/deqdet_r50_100q_1x_p64.yaml")
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


@pytest.fixture(scope="module")
def dagger_cost(dagger) -> Cost:
    return count_multiply_adds(dagger, **SMALL_IMAGE)


def resnet50_and_channel_mapper(height: int, width: int) -> tuple[int, int]:
    """Multiply-adds of the convolutions, by hand: bottlenecks of 1x1, 3x3 (which has the stride) and 1x1."""
    body = (height // 2) * (width // 2) * 3 * 64 * 49
    neck, cells, channels = 0, (height // 4) * (width // 4), 64
    for index, blocks in enumerate((3, 4, 6, 3)):
        narrow, wide = 64 * 2**index, 256 * 2**index
        before = cells if index == 0 else cells * 4
        body += before * channels * narrow + cells * (9 * narrow * narrow + narrow * wide + channels * wide)
        body += (blocks - 1) * cells * (wide * narrow + 9 * narrow * narrow + narrow * wide)
        neck += cells * wide * 256
        cells, channels = cells // 4, wide
    return body, neck


def test_resnet50_by_hand(dagger_cost):
    assert (dagger_cost.backbone.linear, dagger_cost.neck.linear) == resnet50_and_channel_mapper(**SMALL_IMAGE)
    full = resnet50_and_channel_mapper(800, 1344)
    assert full == (dagger_cost.backbone.linear * SHARE, dagger_cost.neck.linear * SHARE)


@pytest.mark.parametrize("queries, per_step, totals", [
    (100, 2.234, {4: 107.50, 5: 109.73, 6: 111.97, 8: 116.43, 10: 120.90, 15: 132.07, 20: 143.24, 25: 154.41,
                  50: 210.25}),
    (300, 6.70, {4: 129.87, 5: 136.57, 6: 143.27, 8: 156.67, 10: 170.07, 15: 203.58, 20: 237.08, 25: 270.59,
                 50: 438.11}),
])  # fmt: skip
def test_tables_7_and_8(dagger, monkeypatch, queries, per_step, totals):
    """The paper's GFLOPS. We count 95.84 for ResNet-50 and neck, of the padded image; the paper's rows leave 96.33."""
    made = InitialQueries(num_queries=queries, hidden_dim=256, norm_content=True, learn_boxes=False)
    monkeypatch.setitem(dagger._modules, "queries", made)
    cost = count_multiply_adds(dagger, **SMALL_IMAGE)
    cost = replace(cost, backbone=cost.backbone * SHARE, neck=cost.neck * SHARE)
    assert cost.per_step.linear / 1e9 == pytest.approx(per_step, rel=0.01)
    assert (cost.backbone + cost.neck).linear / 1e9 == pytest.approx(95.84, abs=0.005)
    found = {steps: replace(cost, steps=steps).total.linear / 1e9 for steps in totals}
    assert found == pytest.approx(totals, rel=0.005)


def test_a_full_layer(dagger_cost):
    """docs/design.md, "Parameter counts and costs", millions per query: 22.37, attention, mixing."""
    step = dagger_cost.per_step
    assert step.linear == 22_369_280 * 100
    products, attention, samples = 3_145_728, 4 * 256**2 + 2 * 100 * 256, 4 * 4 * 64 * 256
    norms = 5 * 5 * 256 + 4 * 256 * (64 + 128)
    assert step.all == (22_369_280 + products + attention + samples + norms) * 100


@pytest.mark.parametrize("path, millions", [
    ("configs/adamixer_r50_100q_1x.yaml", 134.8),
    ("configs/deqdet_r50_300q_1x.yaml", 65.6),
    ("configs/sparse_rcnn_r50_300q_3x.yaml", 106.3),
])  # fmt: skip
def test_parameters_of_full_models(path, millions):
    cfg = load(path)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        parameters = count_parameters(build_model(cfg))
    assert parameters.total / 1e6 == pytest.approx(millions, abs=0.05)
    assert sum(parameters.modules[name] for name in ("backbone", "queries", "decoder")) == parameters.total
    (feedforward,) = {n for name, n in parameters.modules.items() if name.endswith(".feedforward")}
    assert feedforward == 2 * 256 * 2048 + 2048 + 256


def test_tables_show_names_and_units(small_model):
    model = small_model()
    table = format_parameters(count_parameters(model)).splitlines()
    refinement = table.index(next(line for line in table if line.startswith("  refinement ")))
    assert table[refinement + 1].split()[0] == "attention" and table[refinement].endswith(" M")
    assert table[-1].split() == ["total", f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}", "M"]

    one = MultiplyAdds(10**9, 2 * 10**9)
    cost = Cost(image_size=(800, 1333), padded_size=(800, 1344), steps=3, backbone=one * 5, neck=one,
                initialization=one * 2, per_step=one * 4, read_out=one)  # fmt: skip
    lines = format_cost(cost).splitlines()
    assert lines[0] == "Multiply-adds at 800 x 1333 pixels, padded to 800 x 1344"
    assert lines[-2].split() == ["3", "steps", "12.000", "G", "24.000", "G"]
    assert lines[-1].split() == ["total", "20.000", "G", "40.000", "G"]
    assert max(map(len, table + lines)) <= 100


@pytest.fixture
def tool(monkeypatch, tmp_path, small_cfg):
    """tool("--tasks", "flop", ...) runs it on small_cfg's model, with weights and data sets that do not exist."""
    cfg = small_cfg("MODEL.WEIGHTS", "none.pth", "DATASETS.TRAIN", ("none",), "DATASETS.TEST", ("none",))
    (tmp_path / "small.yaml").write_text(cfg.dump())

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--config-file", str(tmp_path / "small.yaml"), *arguments])
        runpy.run_path(str(TOOL), run_name="__main__")

    return run


def test_the_tool(tool, tmp_path, small_model, capsys):
    tool("--steps", "3", "--output", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    model = small_model()
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    refinement = sum(p.numel() for p in model.decoder.refinement.parameters())
    assert found["parameters"]["modules"]["decoder.refinement"] == refinement

    flops = found["flops"]
    assert (flops["image_size"], flops["padded_size"], flops["steps"]) == ([800, 1333], [800, 1344], 3)
    small, layer = count_multiply_adds(model, **SMALL_IMAGE), adamixer_layer()
    assert flops["linear"]["per_step"] == layer.linear and flops["all"]["per_step"] == layer.all
    for way in ("linear", "all"):
        pyramid = SHARE * (getattr(small.backbone, way) + getattr(small.neck, way))
        assert flops[way]["backbone"] + flops[way]["neck"] == pyramid
        assert flops[way]["total"] == pyramid + 4 * getattr(layer, way)  # g and 3 steps

    printed = capsys.readouterr().out.splitlines()
    totals = [line.split()[1:] for line in printed if line.startswith("total")]
    assert totals[0] == [f"{found['parameters']['total'] / 1e6:.3f}", "M"]
    assert totals[1] == [f"{flops['linear']['total'] / 1e9:.3f}", "G", f"{flops['all']['total'] / 1e9:.3f}", "G"]
    assert any(line.startswith("3 steps ") for line in printed)


def test_another_size_of_the_image(tool, tmp_path, small_model, capsys):
    tool("--tasks", "flop", "--size", "160", "190", "--output", str(tmp_path / "out.json"), "MODEL.MASK_ON", "False")
    flops = json.loads((tmp_path / "out.json").read_text())["flops"]
    assert (flops["image_size"], flops["padded_size"]) == ([160, 190], [160, 192])
    assert flops["linear"]["backbone"] == count_multiply_adds(small_model(), **SMALL_IMAGE).backbone.linear
    assert "Multiply-adds at 160 x 190 pixels, padded to 160 x 192" in capsys.readouterr().out


def test_overrides_may_follow_the_tasks(tool, tmp_path, capsys):
    tool("--output", str(tmp_path / "out.json"), "--tasks", "parameter", "MODEL.DEQDET.NUM_QUERIES", "9")
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"parameters"} and found["parameters"]["modules"]["queries.content"] == 9 * C
    assert "Multiply-adds" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--tasks", "parameter", "--steps", "3"], "--steps is only for the task flop"),
    (["--tasks", "parameter", "--size", "160", "160"], "--size is only for the task flop"),
    (["--size", "160", "0"], "--size must be two positive numbers of pixels, height and width, got 160 0"),
    (["--size", "-160", "160"], "height and width, got -160 160"),
    (["--steps", "3", "MODEL.DEQDET.DECODER", "StackedDecoder"], "a StackedDecoder of 6 layers takes 5"),
    (["--tasks", "parameter", "MODEL.DEQDET.DECODER", "Stack"], "MODEL.DEQDET.DECODER is 'Stack': it must be one of"),
    (["MODEL.DEQDET.NUM_QUERYS", "3"], "did you mean MODEL.DEQDET.NUM_QUERIES?"),
    (["--output", "{}/small.yaml/out.json"], "out.json cannot be written: its folder cannot be created (File exists)"),
])  # fmt: skip
def test_one_line_says_what_is_wrong(tool, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool(*[argument.format(tmp_path) for argument in arguments])
    error = str(stopped.value.code)
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_an_unknown_task(tool, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool("--tasks", "flops")
    assert "argument --tasks: invalid choice: 'flops' (choose from" in capsys.readouterr().err
