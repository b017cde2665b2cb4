"""The benchmark of a small model: what it reports, and what its floor is made of."""

import json

import pytest
import torch

from deqdet.decoders import DecodingGraphs
from deqdet.errors import UserError
from deqdet.measurement import benchmark as module
from deqdet.measurement.benchmark import Setting, Timing, _Operations, benchmark, interleave
from deqdet.tools import benchmark as tool

SMALL = {"height": 64, "width": 96, "batch": 2, "precision": "float32", "repeats": 3, "warm_up": 1}


def test_quartiles_of_the_times_of_several_parts():
    timing = Timing.of([0.010, 0.030, 0.020, 0.040, 0.050], parts=10)
    assert (timing.median, timing.low, timing.high) == pytest.approx((3.0, 2.0, 4.0))  # milliseconds


def test_quartiles_of_two_times_lie_between_them():
    timing = Timing.of([0.001, 0.009])
    assert (timing.median, timing.low, timing.high) == pytest.approx((5.0, 3.0, 7.0))


def test_calls_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleave(calls, torch.device("cpu"), repeats=2, warm_up=1)
    assert "".join(order) == "ababab" and {name: len(x) for name, x in times.items()} == {"a": 2, "b": 2}


def test_the_floor_has_the_matrix_products_alone():
    a, b, query = torch.randn(3, 4), torch.randn(4, 5), torch.randn(2, 2, 6, 4)
    with _Operations() as seen:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        (a @ b).relu().sum()
    shapes = [[tuple(x.shape) for x in args] for _, args, _ in seen.products_seen]
    assert shapes == [[(4, 6, 4), (4, 4, 6)], [(4, 6, 6), (4, 6, 4)], [(3, 4), (4, 5)]]
    assert seen.moved >= 4 * (12 + 20 + 15)
    seen.products()


def test_the_bytes_moved_include_tensors_in_lists():
    with _Operations() as seen:
        torch.cat([torch.ones(3), torch.ones(5)])
        torch.ones(4).view(2, 2)  # a view moves nothing
    made, joined = 4 * (3 + 5) + 4 * 4, 4 * (3 + 5) * 2
    assert seen.moved == made + joined


@pytest.mark.parametrize("layer", ["AdaMixerLayer", "SparseRCNNLayer"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step(small_model, layer, precision):
    backbone = "build_basic_resnet_fpn_backbone"
    keys = ("MODEL.BACKBONE.NAME", backbone) if layer == "SparseRCNNLayer" else ()
    model = small_model("MODEL.DEQDET.REFINEMENT_LAYER", layer, *keys)
    found = benchmark(model, Setting(task="step", **SMALL | {"precision": precision}))
    assert 0 < found["floor_ms"] < found["median_ms"] and found["simple_ms"] > found["floor_ms"]
    assert found["low_ms"] <= found["median_ms"] <= found["high_ms"] and found["peak_mb"] > 0


def test_a_recorded_step_has_a_recorded_floor(small_model, monkeypatch):
    """The recorder is one of the tests' own, since there is no CUDA."""
    recorded, starts, iterate = [], [], module.iterate

    def record(function, device):
        recorded.append(function)
        return function(), function

    def seen_iterate(layer, start, features, **options):
        starts.append((start.position.sum().item(), start.content.sum().item()))
        return iterate(layer, start, features, **options)

    monkeypatch.setattr(module, "record_cuda_graph", record)
    monkeypatch.setattr(module, "iterate", seen_iterate)
    found = benchmark(small_model(), Setting(task="step", graph=True, **SMALL))
    assert [len(set(numbers)) for numbers in zip(*starts[2:], strict=True)] == [4, 4]  # a replay gets new inputs
    assert len(recorded) == 2 and 0 < found["floor_ms"] < found["median_ms"]
    assert "simple_ms" not in found and found["peak_mb"] is None


@pytest.mark.parametrize("task", ["decoder", "inference"])
def test_a_decoder_is_replayed_only_where_a_graph_is_asked_for(small_model, monkeypatch, task):
    recorded = []

    def record(function):
        recorded.append(function)
        return function(), lambda: None

    monkeypatch.setattr(module, "DecodingGraphs", lambda most: DecodingGraphs(most, record))
    benchmark(small_model("MODEL.DEQDET.CUDA_GRAPHS", 4), Setting(task=task, **SMALL))
    assert recorded == []
    assert benchmark(small_model(), Setting(task=task, graph=True, **SMALL))["peak_mb"] is None
    assert len(recorded) == 1
    with pytest.raises(UserError, match="set MODEL.DEQDET.SOLVER.RTOL to 0"):
        benchmark(small_model("MODEL.DEQDET.SOLVER.RTOL", 0.1), Setting(task=task, graph=True, **SMALL))


def test_tf32_is_on_for_the_measurement_alone(small_model):
    seen, precision = [], torch.get_float32_matmul_precision()
    model = small_model().eval()
    model.backbone.register_forward_hook(lambda *x: seen.append(torch.get_float32_matmul_precision()))
    for name in ("float32", "tf32"):
        benchmark(model, Setting(task="inference", **SMALL | {"precision": name}))
    assert set(seen[: len(seen) // 2]) == {"highest"} and set(seen[len(seen) // 2 :]) == {"high"}
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("decoder", ["StackedDecoder", "RecurrentDecoder", "EquilibriumDecoder"])
@pytest.mark.parametrize("task", ["decoder", "inference", "training"])
def test_the_other_tasks(small_model, task, decoder):
    model = small_model("MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.NUM_LAYERS", 3)
    found = benchmark(model, Setting(task=task, **SMALL))
    assert 0 < found["low_ms"] <= found["median_ms"] <= found["high_ms"] and found["peak_mb"] > 0
    if task == "training":
        parts = [found[f"{part}_ms"] for part in ("forward", "backward", "optimizer")]
        assert all(x > 0 for x in parts) and found["median_ms"] >= max(parts)


def test_more_steps_take_longer(small_model):
    few, many = (
        benchmark(small_model(), Setting(task="decoder", steps=steps, **SMALL))["median_ms"] for steps in (1, 40)
    )
    assert many > 4 * few


def test_the_tool(tmp_path, small_cfg, capsys, monkeypatch):
    (tmp_path / "small.yaml").write_text(small_cfg().dump())
    threads = torch.get_num_threads()
    words = ["--config-file", str(tmp_path / "small.yaml"), "--height", "64", "--width", "96", "--repeats", "2"]
    tool.main([*words, "--threads", "1", "--output", str(tmp_path / "out.json"), "MODEL.DEQDET.NUM_QUERIES", "5"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["queries"] == 5 and found["task"] == "step" and found["image"] == [64, 96]
    assert found["median_ms"] > found["floor_ms"] > 0 and "1 thread" in found["machine"]
    row = capsys.readouterr().out.strip().splitlines()[-1]
    assert row.count("|") == 11 and "| step | 5 | float32 | eager | 1 |" in row
    torch.set_num_threads(threads)


@pytest.mark.parametrize("words, message", [
    (["--repeats", "1"], "quartiles need several"), (["--batch", "0"], "--batch must be at least 1"),
    (["--device", "cuda"], "CUDA is not available on this machine"),
    (["--mode", "graph"], "--mode graph needs a GPU, and the model is on cpu"),
    (["--precision", "tf32"], "--precision tf32 needs a GPU"),
    (["FLOAT32_PRECISION", "high"],
     "FLOAT32_PRECISION is 'high': set it to '' and use --precision float32 or tf32 instead"),
    (["TEST.PRECISION", "bfloat16"], "TEST.PRECISION is 'bfloat16': set it to 'float32' and use --precision instead"),
    (["MODEL.DEQDET.COMPILE", "True"], "MODEL.DEQDET.COMPILE is True: set it to False and use --mode compiled instead"),
    (["MODEL.DEQDET.CUDA_GRAPHS", "4"], "MODEL.DEQDET.CUDA_GRAPHS is 4: set it to 0 and use --mode graph instead"),
    (["--mode", "compiled-graph", "--task", "training"], "a CUDA graph is for detection, not for --task training"),
    (["--steps", "0"], "--steps must be at least 1, got 0"),
    (["--steps", "3", "--task", "decoder", "MODEL.DEQDET.DECODER", "StackedDecoder"],
     "a StackedDecoder takes MODEL.DEQDET.NUM_LAYERS"),
])  # fmt: skip
def test_errors_of_the_command_line(tmp_path, small_cfg, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "small.yaml").write_text(small_cfg().dump())
    with pytest.raises(SystemExit) as error:
        tool.main(["--config-file", str(tmp_path / "small.yaml"), *words])
    assert message in str(error.value)
