"""Where the host would wait for a GPU, and how many kernels it would start, found on the CPU (see device_log.py)."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration

from helpers.batches import total
from helpers.device_log import DeviceLog
from helpers.six_detectors import DECODERS, LAYERS, detector_keys

SOLVERS = [FixedPointIteration(), FixedPointIteration(damping=0.5), Anderson(history_size=3), Broyden(history_size=2)]
NOISE = "MODEL.DEQDET.PERTURBATION.KIND", "multi-step"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def build(small_model):
    """build(decoder, layer, "KEY", value, ...)"""

    def make(decoder: str, layer: str, *overrides) -> nn.Module:
        return small_model(*detector_keys(decoder, layer), *overrides)

    return make


def autocast(dtype: torch.dtype):
    return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)


def host_tensors(inputs: list[dict]) -> list[Tensor]:
    found = [x["image"] for x in inputs]
    for x in inputs:
        found += [x["instances"].gt_boxes.tensor, x["instances"].gt_classes]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_training_waits_for_the_matching_alone(build, make_inputs, decoder, layer, dtype):
    """Forward and backward pass; one image has no box."""
    model, inputs = build(decoder, layer, *NOISE).train(), make_inputs(2, 0)
    with DeviceLog(host=host_tensors(inputs)) as log:
        with autocast(dtype):
            losses = model(inputs)
        total(losses).backward()
    assert [x.split(":")[0] + x.split(" ")[1] for x in log.waits] == ["matcher.pycpu"], log.waits
    assert log.mixed == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoding_never_waits(build, make_inputs, decoder, layer, dtype):
    model, inputs = build(decoder, layer).eval(), make_inputs(1, 0)
    solvers = SOLVERS if decoder == "EquilibriumDecoder" else [None]
    for solver in solvers:
        with DeviceLog(host=host_tensors(inputs)) as log, autocast(dtype):
            features, initial = model.encode(model.preprocess(inputs))
            if solver is None:
                model.decoder.decode(initial, features)
            else:
                model.decoder.walk(initial, features, steps=6, solver=solver, record=[2, 6]).decoded()
        assert (log.waits, log.mixed) == ([], []), solver
        assert log.count > 100


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_a_tolerance_waits_once_a_step(build, make_inputs, layer):
    model = build("EquilibriumDecoder", layer).eval()
    features, initial = model.encode(model.preprocess(make_inputs(1, 0, 0)))
    free = model.decoder.walk(initial, features, steps=8, rtol=0.0).solution.residuals
    rtol = free[2:6].amin(dim=0).sort().values[1].item()  # some image stops before another one
    with DeviceLog() as log:
        found = model.decoder.walk(initial, features, steps=8, rtol=rtol).solution
    assert found.steps.min() < found.steps.max()
    assert len(log.waits) <= found.steps.max() and {x.split(":")[0] for x in log.waits} == {"solve.py"}


@torch.no_grad()
@pytest.mark.parametrize("layer, most", [("AdaMixerLayer", 56), ("SparseRCNNLayer", 102)])
def test_kernels_of_a_step(build, make_inputs, layer, most):
    """One more step starts so many kernels; two more are allowed for what is computed for 16 steps at once."""
    model, counts = build("EquilibriumDecoder", layer).eval(), []
    features, initial = model.encode(model.preprocess(make_inputs(1, 0)))
    for steps, record in ((5, ()), (6, ()), (38, ()), (38, range(39))):
        with DeviceLog() as log:
            model.decoder.walk(initial, features, steps=steps, record=record)
        counts.append(log.count)
    assert 50 < counts[1] - counts[0] <= most
    assert counts[2] - counts[1] <= 32 * (most + 2)
    assert counts[3] - counts[2] <= 38 * 7  # where steps are recorded, each is packed and tested by itself


PAPER = ("MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS", 20, "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT", 4,
         "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL", 3)  # fmt: skip


@pytest.mark.parametrize("layer, most", [("AdaMixerLayer", 3391), ("SparseRCNNLayer", 4187)])
def test_kernels_of_a_training_iteration(build, make_inputs, layer, most):
    """With the paper's numbers of steps; the small backbone is a part of it."""
    model, inputs = build("EquilibriumDecoder", layer, *NOISE, *PAPER).train(), make_inputs(2, 1)
    with DeviceLog(host=host_tensors(inputs)) as log:
        total(model(inputs)).backward()
    assert 2000 < log.count <= most


# The tests above can fail


def plant(monkeypatch, model: nn.Module, what) -> None:
    forward = model.decoder.refinement.forward
    monkeypatch.setattr(model.decoder.refinement, "forward", lambda *args: what(forward(*args)))


def planted_item(state):
    return state if state.content.sum().item() > 0 else state


def planted_mask(state):
    state.content[state.content > 5].sum()
    return state


def planted_host_tensor(state):
    torch.add(state.position, torch.ones(4))
    return state


def planted_copy(state):
    torch.tensor([1.0, 2.0], device=state.content.device)
    return state


def planted_number(state):
    state.content[torch.zeros_like(state.content, dtype=torch.int64)[0, 0]] = 0.0
    return state


def planted_array(state):
    torch.from_numpy(np.ones(4)).to(state.content.device)
    return state


@torch.no_grad()
@pytest.mark.parametrize("what, seen", [
    (planted_item, "waits"), (planted_mask, "waits"), (planted_host_tensor, "mixed"), (planted_copy, "waits"),
    (planted_number, "waits"), (planted_array, "waits"),
])  # fmt: skip
def test_what_is_planted_is_found(build, make_inputs, monkeypatch, what, seen):
    model = build("EquilibriumDecoder", "AdaMixerLayer").eval()
    features, initial = model.encode(model.preprocess(make_inputs(1)))
    plant(monkeypatch, model, what)
    with DeviceLog() as log:
        model.decoder.walk(initial, features, steps=3)
    found = getattr(log, seen)
    assert len(found) == 3 and all(x.startswith("test_device_waits.py:") for x in found), found


def test_a_gradient_that_waits_is_found():
    """Tensor.prod's, as a GPU has shown."""
    sides = torch.ones(3, 2, requires_grad=True)
    with DeviceLog() as log:
        sides.detach().prod(1)
        sides.prod(1)
    assert len(log.waits) == 1 and log.waits[0].endswith("aten.prod")
