"""What only a GPU can show. Run by themselves, `python -m pytest tests/cuda`: all other tests hide the GPU."""

import copy
import dataclasses
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from deqdet.decoders import DecodingGraphs, compile_refinement
from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration
from deqdet.layers import kernels
from deqdet.layers import table as tables
from deqdet.layers.mixing import AdaptiveMixing
from deqdet.layers.regions import _level, pool_regions
from deqdet.layers.sampling import sample_pyramid, sample_table
from deqdet.layers.table import build_table
from deqdet.measurement.memory import training_memory

from helpers.batches import strip, total
from helpers.paths import ROOT
from helpers.six_detectors import DECODERS, LAYERS, detector_keys

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: run these alone, where there is one")

QUICK = ("adamixer", "rnndet", "deqdet", "sparse_rcnn", "rnn_sparse_rcnn", "deq_sparse_rcnn")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
detectors = pytest.mark.parametrize("layer", LAYERS), pytest.mark.parametrize("decoder", DECODERS)


def each_detector(test):
    for mark in detectors:
        test = mark(test)
    return test


@pytest.fixture
def build(small_model):
    """build(decoder, layer, "KEY", value, ...), on the GPU"""

    def make(decoder: str, layer: str, *overrides) -> nn.Module:
        return small_model(*detector_keys(decoder, layer), *overrides).cuda()

    return make


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Without TF32, which cuDNN uses by default."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def autocast(dtype: torch.dtype):
    return torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Yield a list that holds, at the end, file:line of each time the host waited for the GPU."""
    found: list[str] = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{x.filename}:{x.lineno}" for x in caught if "synchronizing" in str(x.message)]


@torch.no_grad()
@each_detector
def test_predictions_are_those_of_the_cpu(build, make_inputs, decoder, layer):
    model, inputs = build(decoder, layer).eval(), strip(make_inputs(0, 0))
    found = [copy.deepcopy(model).to(device).decode(inputs)[0] for device in ("cpu", "cuda")]
    one, other = (x.prediction for x in found)
    torch.testing.assert_close(other.boxes.cpu(), one.boxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(other.logits.cpu(), one.logits, rtol=1e-3, atol=1e-3)


@each_detector
def test_losses_and_gradients_are_those_of_the_cpu(build, make_inputs, decoder, layer):
    model, inputs, found = build(decoder, layer).train(), make_inputs(2, 1), []
    for device in ("cpu", "cuda"):
        other = copy.deepcopy(model).to(device)
        losses = other(inputs)
        total(losses).backward()
        found.append((losses, {name: x.grad for name, x in other.named_parameters() if x.grad is not None}))
    (losses, gradients), (gpu_losses, gpu_gradients) = found
    assert losses.keys() == gpu_losses.keys() and gradients.keys() == gpu_gradients.keys()
    for name in losses:
        torch.testing.assert_close(gpu_losses[name].cpu(), losses[name], rtol=1e-3, atol=1e-4, msg=name)
    for name, gradient in gradients.items():
        error = (gpu_gradients[name].cpu() - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 2e-2, (name, float(error))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_detector
def test_decoding_never_waits(build, make_inputs, decoder, layer, dtype):
    model, inputs = build(decoder, layer).eval(), strip(make_inputs(1, 0))
    options = [{}]
    if decoder == "EquilibriumDecoder":
        solvers = FixedPointIteration(), FixedPointIteration(damping=0.5), Anderson(history_size=3), Broyden()
        options = [{"solver": solver, "steps": 6} for solver in solvers]
    features, initial = model.encode(model.preprocess(inputs))
    for chosen in options:
        with autocast(dtype), counted_waits() as waits:
            model.decode_queries(initial, features, **chosen)
        assert waits == [], chosen
    with counted_waits() as waits:
        initial.position.sum().item()
    assert len(waits) == 1  # so that the test above can fail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_detector
def test_training_waits_for_the_matching_alone(build, make_inputs, decoder, layer, dtype):
    model, inputs = build(decoder, layer, "MODEL.DEQDET.PERTURBATION.KIND", "multi-step").train(), make_inputs(2, 0)
    for _ in range(2):  # the first iteration is not looked at
        with counted_waits() as waits:
            with autocast(dtype):
                losses = model(inputs)
            total(losses).backward()
    assert [Path(x).name.split(":")[0] for x in waits] == ["matcher.py"], waits


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_detector
def test_a_recorded_decode_is_the_eager_one(build, make_inputs, decoder, layer, dtype, caplog):
    """Also after the weights have changed, which a recording reads where they are."""
    plain = build(decoder, layer).eval()
    recorded = copy.deepcopy(plain)
    recorded.graphs = DecodingGraphs(2)
    with autocast(dtype):
        for seed in range(3):
            torch.manual_seed(seed)
            inputs = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)} for _ in range(2)]
            one, other = (model.decode(inputs)[0] for model in (plain, recorded))
            torch.testing.assert_close(other.prediction.boxes, one.prediction.boxes, rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(other.prediction.logits, one.prediction.logits, rtol=1e-3, atol=1e-3)
            assert torch.equal(other.steps, one.steps)
            for model in (plain, recorded):
                for weight in model.decoder.parameters():
                    weight.mul_(1.01)
            torch.clear_autocast_cache()  # of the eager model's old weights
    assert len(recorded.graphs._recordings) == 1 and warnings_of(caplog) == []


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_a_recording_keeps_the_numbers_that_it_copies(build, make_inputs, layer):
    """Its copies from the host read pinned memory, which no other tensor may have got by the time of a replay."""
    model, inputs = build("EquilibriumDecoder", layer).eval(), strip(make_inputs(0))
    expected = model.decode(inputs)[0].prediction
    model.graphs = DecodingGraphs(1)
    model.decode(inputs)
    pinned = [torch.full((size,), 1e9).pin_memory() for size in (8, 16, 32, 64, 128, 256) for _ in range(20)]
    found = model.decode(inputs)[0].prediction
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-2)
    assert len(pinned) == 120 and model.graphs.replays == 2


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a single GPU")
@pytest.mark.parametrize("layer", LAYERS)
def test_a_gpu_that_is_not_the_current_one(build, make_inputs, layer, caplog):
    """Recordings of two GPUs after one another, since torch's own stream of recordings is on the GPU of the first."""
    model, inputs = build("EquilibriumDecoder", layer).eval(), [strip(make_inputs(n)) for n in (0, 2)]
    expected = [model.decode(x)[0].prediction.boxes for x in inputs]
    for device in ("cuda:0", "cuda:1"):
        other = copy.deepcopy(model).to(device)
        other.graphs = DecodingGraphs(1)
        for _ in range(2):
            for x, boxes in zip(inputs, expected, strict=True):
                found = other.decode(x)[0].prediction.boxes
                assert found.device == torch.device(device)
                torch.testing.assert_close(found.cpu(), boxes.cpu(), rtol=1e-4, atol=1e-2)
        assert other.graphs.replays == 4
    assert torch.cuda.current_device() == 0 and warnings_of(caplog) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_the_memory_of_training_is_counted_without_computing(build, make_inputs, layer):
    model = build("EquilibriumDecoder", layer).train()
    with torch.no_grad():
        features, initial = model.encode(model.preprocess(make_inputs(1)))
    counted, found = (training_memory(model.decoder, initial, features, (0, 1), compute=x) for x in (False, True))
    assert [x.saved for x in counted] == pytest.approx([x.saved for x in found], rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_compute_what_the_operations_do(dtype):
    """In float32 up to the rounding of coordinates of 1,344 pixels, which takes another way in grid_sample."""
    assert tables._kernels_work(torch.device("cuda", 0))
    within = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    levels = [torch.randn(2, 64, 800 // s, 1344 // s, device="cuda") for s in (4, 8, 16, 32)]
    table = build_table(levels, (4, 8, 16, 32), dtype, 4)
    size = torch.tensor([1500.0, 900.0, 9.0], device="cuda")
    points = torch.rand(4, 50, 4, 32, 3, device="cuda") * size - 20
    x = torch.randn(60, 4, 128, 64, device="cuda").to(dtype)
    whole = build_table(levels, table.strides, dtype)  # in one group, as Sparse R-CNN's
    exact = dataclasses.replace(whole, rows=whole.rows.float(), has_kernels=False)
    boxes = torch.rand(4, 50, 4, device="cuda") * 600 + torch.tensor([-20.0, -20.0, 580.0, 580.0], device="cuda")
    assert len(_level(whole, boxes).unique()) > 1
    pairs = [
        (sample_table(table, points), sample_pyramid(levels, table.strides, points)),
        (pool_regions(whole, boxes, 7, 2), pool_regions(exact, boxes, 7, 2)),
        (kernels.norm_relu(x), F.layer_norm(x.float(), x.shape[-2:]).relu()),
    ]
    if dtype != torch.float32:
        for points, dim in ((32, 64), (64, 128)):  # the second are the largest that fit
            mixing = AdaptiveMixing(dim=4 * dim, num_groups=4, num_points=points, num_out_points=128).cuda()
            mixing.out = mixing.generator = nn.Identity()
            samples = torch.randn(2, 50, 4, points, dim, device="cuda").to(dtype)
            matrices = torch.randn(2, 50, 4 * (dim * dim + 128 * points), device="cuda").to(dtype)
            found = kernels.mix(samples, matrices, 128).flatten(2)
            pairs.append((found, mixing(matrices.float(), samples.float())))
    for found, expected in pairs:
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found.float() - expected).norm() <= within * expected.norm()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = float("nan"), float("inf")
    assert torch.equal(kernels.norm_relu(x).isnan(), F.layer_norm(x, x.shape[-2:]).relu().isnan())


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer, dtype, names", [
    ("AdaMixerLayer", torch.float32, {"_sample", "_norm_relu"}),
    ("AdaMixerLayer", torch.bfloat16, {"_sample", "_mix"}),
    ("SparseRCNNLayer", torch.float32, {"_pool"}),
    ("SparseRCNNLayer", torch.bfloat16, {"_pool"}),
])  # fmt: skip
def test_a_decode_runs_the_kernels(build, make_inputs, layer, dtype, names, compiled):
    model, inputs = build("EquilibriumDecoder", layer).eval(), strip(make_inputs(0, 0))
    if compiled:
        compile_refinement(model.decoder)
    with autocast(dtype):
        model.decode(inputs)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            model.decode(inputs)
            torch.cuda.synchronize()
    assert names <= {x.name for x in profiled.events()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("graph", [False, True], ids=["compiled", "compiled-graph"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_compiled_decode_is_the_eager_one(build, make_inputs, layer, graph, dtype, caplog):
    """In bfloat16 after one step, and no farther apart than bfloat16 and float32: the order of operations differs."""
    steps = 4 if dtype == torch.float32 else 1
    plain = build("EquilibriumDecoder", layer, "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", steps).eval()
    fast = copy.deepcopy(plain)
    compile_refinement(fast.decoder)
    if graph:
        fast.graphs = DecodingGraphs(2)
    for height, width in ((64, 96), (96, 64), (64, 96)):
        inputs = strip(make_inputs(0, 0, height=height, width=width))
        exact = plain.decode(inputs)[0].prediction
        with autocast(dtype):
            one, other = (model.decode(inputs)[0].prediction for model in (plain, fast))
        if dtype == torch.float32:
            torch.testing.assert_close(other.boxes, one.boxes, rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(other.logits, one.logits, rtol=1e-3, atol=1e-3)
        else:
            assert (other.boxes - one.boxes).norm() <= (one.boxes - exact.boxes).norm()
            assert (other.logits - one.logits).norm() <= (one.logits - exact.logits).norm()
    assert warnings_of(caplog) == [] and (fast.graphs is None or len(fast.graphs._recordings) == 2)


@pytest.mark.parametrize("keys", [(), ("SOLVER.AMP.ENABLED", "True"),
                                  ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16")],
                         ids=["float32", "bfloat16", "float16"])  # fmt: skip
@pytest.mark.parametrize("name", QUICK)
def test_train_net_trains_and_evaluates(tmp_path, name, keys):
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    data = "DATASETS.TRAIN", "('shapes_seed3_16',)", "DATASETS.TEST", "('shapes_seed4_4',)"
    options = "SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "2", "SOLVER.BASE_LR", "1e-6"
    command = [sys.executable, "tools/train_net.py", "--config-file", f"configs/quick/{name}_shapes.yaml",
               "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cuda", *data, *options, *keys]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "max_mem:" in log and "copypaste: Task: bbox" in log
