"""Training insight: its figures on a small model, that they are written, and that the training does not notice."""

import json
import random
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import get_cfg
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from deqdet import add_deqdet_config
from deqdet.engine import Trainer, UserError, insight, setup
from deqdet.engine.insight import EquilibriumInsight, build_insight, measure_equilibrium
from deqdet.engine.optimizer import build_optimizer
from deqdet.equilibrium import relative_residual
from deqdet.measurement.residuals import measure_residuals
from deqdet.structures import QueryState

from helpers.batches import strip
from helpers.engine_toy import IN_PROCESS, parse
from helpers.paths import SHAPES_CONFIG
from helpers.six_detectors import LAYERS, detector_keys
from helpers.two_ranks import run_two_ranks

NAMES = ("residual_step1", "residual", "steps_to_rtol0.05", "reached_rtol0.05", "spectral_radius")
# A training whose every step draws random numbers: noise, and flips in the main process.
TINY = """
DATASETS.TRAIN ('shapes_seed3_8',) DATASETS.TEST () SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 3
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8 INPUT.MIN_SIZE_TRAIN (64,96) INPUT.MIN_SIZE_TEST 64
MODEL.DEQDET.PERTURBATION.PROBABILITY 1.0 MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 4
MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS 3 MODEL.DEQDET.INSIGHT.NUM_IMAGES 2 MODEL.DEQDET.INSIGHT.POWER_ITERATIONS 4
"""


# The figures


def test_figures_of_the_training_iteration(small_model, make_inputs):
    """Residuals by hand: T_train = 3 and T_infer = 4 plain steps, whatever the solver at test time."""
    model = small_model("MODEL.DEQDET.SOLVER.NAME", "Anderson", "MODEL.DEQDET.SOLVER.RETURN_BEST", True).train()
    batch = strip(make_inputs(1, 1, 1))
    found = measure_equilibrium(model, batch, power_iterations=10)
    assert tuple(found) == NAMES and all(isinstance(value, float) for value in found.values())
    model.eval()
    with torch.no_grad():
        features, initial = model.encode(model.preprocess(batch))
        state, residuals = model.decoder.initialize(initial, features), []
        for _ in range(4):
            image = model.decoder.refinement(state.detach_position(), features)
            residuals.append(relative_residual(state.pack(), image.pack()).tolist())
            state = image
    assert found["residual_step1"] == pytest.approx(median(residuals[0]), rel=1e-5)
    assert found["residual"] == pytest.approx(median(residuals[2]), rel=1e-5)
    assert min(residuals[2]) < found["residual"] < max(residuals[2])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_figures_in_bfloat16(small_model, make_inputs, monkeypatch, layer, compiled):
    """They are near those in float32, and leave the layer that a compiled decode casts in use.

    The spectral radius is the least exact: it is above 1 in this untrained model, whose path so amplifies rounding.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    keys, batch = detector_keys("EquilibriumDecoder", layer), strip(make_inputs(1))
    exact = measure_equilibrium(small_model(*keys), batch, power_iterations=10)
    model = small_model(*keys, "TEST.PRECISION", "bfloat16", "MODEL.DEQDET.COMPILE", compiled)
    found = measure_equilibrium(model, batch, power_iterations=10)
    assert found.pop("spectral_radius") == pytest.approx(exact.pop("spectral_radius"), rel=0.3)
    assert found == pytest.approx(exact, rel=0.15) and found != exact
    if compiled:
        call = model.decoder.refinement._compiled_call_impl
        assert call._copies and not call._broken


def test_the_radius_is_that_of_the_contents_jacobian_after_the_training_steps(small_model, make_inputs):
    """The whole Jacobian of one image, written out at y_3."""
    model, batch = small_model().eval(), strip(make_inputs(1))
    found = measure_equilibrium(model, batch, power_iterations=160)["spectral_radius"]
    with torch.no_grad():
        features, initial = model.encode(model.preprocess(batch))
        start = model.decoder.initialize(initial, features)
        state = start
        for _ in range(3):
            state = model.decoder.refinement(state, features)

    def content(flat: torch.Tensor) -> torch.Tensor:
        moved = QueryState(state.position, flat.view_as(state.content))
        return model.decoder.refinement(moved, features).content.flatten()

    jacobian = torch.autograd.functional.jacobian(content, state.content.flatten())
    assert found == pytest.approx(torch.linalg.eigvals(jacobian).abs().max().item(), rel=0.02)


def test_images_that_do_not_converge_count_with_all_steps(small_model, make_inputs):
    batch = strip(make_inputs(1))
    residuals = measure_residuals(small_model(), [batch], steps=4)[1:, 0]
    assert residuals.min() > 0.05
    assert measure_equilibrium(small_model(), batch, power_iterations=2)["steps_to_rtol0.05"] == 4.0


@pytest.mark.parametrize("reached, share", [(False, 0.0), (True, 1.0)])
def test_the_last_step_differs_from_never(small_model, make_inputs, monkeypatch, reached, share):
    """The limit lies just above or at the lowest residual, that of the last step."""
    model, batch = small_model(), strip(make_inputs(1))
    residuals = measure_residuals(model, [batch], steps=4)[1:, 0]
    assert residuals.argmin() == 3
    monkeypatch.setattr(insight, "RTOL", residuals[3].item() * (1.001 if reached else 0.999))
    figures = list(measure_equilibrium(model, batch, power_iterations=2).values())
    assert figures[2:4] == [4.0, share]


def test_the_share_of_the_images_that_converge(small_model, make_inputs, monkeypatch):
    model, batch = small_model(), strip(make_inputs(1, 1, 1))
    lowest = measure_residuals(model, [batch], steps=4)[1:].min(dim=0).values
    monkeypatch.setattr(insight, "RTOL", lowest.median().item() * 1.001)
    figures = list(measure_equilibrium(model, batch, power_iterations=2).values())
    assert figures[3] == pytest.approx((lowest < insight.RTOL).sum().item() / 3) and 0 < figures[3] < 1


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_image_that_becomes_infinite_is_the_furthest_from_convergence(small_model, make_inputs, monkeypatch, broken):
    """Wherever it stands in the batch: the median of three residuals is then the larger one of the others."""
    model, batch = small_model(), strip(make_inputs(1, 1, 1))
    residuals = measure_residuals(model, [batch], steps=4)[1:]
    forward, where = model.decoder.refinement.forward, torch.arange(3)[:, None, None] == broken

    def fail(state, features):
        image = forward(state, features)
        return QueryState(image.position, image.content.masked_fill(where, torch.inf))

    monkeypatch.setattr(model.decoder.refinement, "forward", fail)
    residuals[:, broken] = torch.inf
    found = measure_equilibrium(model, batch, power_iterations=2)
    assert found["residual_step1"] == pytest.approx(residuals[0].median().item(), rel=1e-5)
    assert found["residual"] == pytest.approx(residuals[2].median().item(), rel=1e-5)


def test_the_model_is_left_as_it_was(small_model, make_inputs):
    model = small_model("MODEL.DEQDET.FIX_BN_STATISTICS", True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    measure_equilibrium(model, strip(make_inputs(1)), power_iterations=3)
    assert modes == {name: module.training for name, module in model.named_modules()} and True in modes.values()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# The hook


def states() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_random_states_and_calls(small_model, make_inputs):
    """The probe is loaded once, at the period's first end; what it draws is undone."""
    loaded = []

    def load() -> list[dict]:
        loaded.append((random.random(), np.random.rand(), torch.rand(1)))
        return strip(make_inputs(1))

    hook = EquilibriumInsight(period=3, load_probe=load, power_iterations=2)
    seen = []
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(model=small_model(), storage=storage, max_iter=8)
        before = states()
        for iteration in range(8):
            hook.trainer.iter = storage.iter = iteration
            hook.after_step()
            if any(at == iteration for _, at in storage.latest().values()):
                seen.append(iteration)
            assert bool(loaded) == (iteration >= 2)
    assert seen == [2, 5, 7] and len(loaded) == 1
    assert states() == before
    assert set(storage.latest()) == {f"equilibrium/{name}" for name in NAMES}


def test_off_by_default_and_on_the_main_process_only(small_cfg, small_model, monkeypatch):
    assert build_insight(small_cfg(), small_model()) == []
    cfg = small_cfg("MODEL.DEQDET.INSIGHT.PERIOD", 5)
    assert [type(hook) for hook in build_insight(cfg, small_model())] == [EquilibriumInsight]
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert build_insight(cfg, small_model()) == []


@pytest.mark.parametrize("decoder", ["RecurrentDecoder", "StackedDecoder"])
def test_a_decoder_without_equilibrium_is_an_error(small_cfg, small_model, decoder):
    keys = "MODEL.DEQDET.DECODER", decoder
    assert build_insight(small_cfg(*keys), small_model(*keys)) == []
    with pytest.raises(UserError, match=f"INSIGHT.PERIOD is 5, but MODEL.DEQDET.DECODER {decoder} has no equilibrium"):
        build_insight(small_cfg("MODEL.DEQDET.INSIGHT.PERIOD", 5, *keys), small_model(*keys))


# A training


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(name, KEY, value, ...): the folder of a finished training."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))

    def run(name: str, *overrides: object) -> Path:
        folder = tmp_path / name
        trainer = Trainer(setup(parse(str(SHAPES_CONFIG), *TINY.split(), "OUTPUT_DIR", folder, *overrides)))
        trainer.resume_or_load(resume=False)
        trainer.train()
        return folder

    return run


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestTraining:
    pytestmark = IN_PROCESS

    def test_figures_are_written_and_nothing_else_changes(self, train):
        without, with_it = train("without"), train("with", "MODEL.DEQDET.INSIGHT.PERIOD", 1)
        keys = {f"equilibrium/{name}" for name in NAMES}
        lines = [read_lines(folder / "metrics.json") for folder in (without, with_it)]
        assert not any(keys & line.keys() for line in lines[0])
        (line,) = (line for line in lines[1] if keys & line.keys())
        assert keys < line.keys() and line["iteration"] == 2 and "grad_norm" in line
        assert 0 < line["equilibrium/residual"] and 0 < line["equilibrium/spectral_radius"]
        events = [b"".join(path.read_bytes() for path in folder.glob("events.*")) for folder in (without, with_it)]
        for key in keys:
            assert key.encode() not in events[0] and key.encode() in events[1]
        weights = [torch.load(folder / "model_final.pth", weights_only=True)["model"] for folder in (without, with_it)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        losses = [{k: v for k, v in lines[i][-1].items() if "loss" in k or k == "grad_norm"} for i in (0, 1)]
        assert losses[0] == losses[1] and len(losses[0]) > 5

    def test_the_trainer_refuses_a_decoder_without_equilibrium(self, train):
        keys = "MODEL.DEQDET.DECODER", "RecurrentDecoder", "MODEL.DEQDET.INSIGHT.PERIOD", 1
        with pytest.raises(UserError, match="has no equilibrium"):
            train("recurrent", *keys)


def observe_worker(cfg, batch: list[dict], output: str) -> None:
    """Only rank 0 has the hook, between two steps of both; a collective call in it would meet the other's step."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Trainer.build_model(cfg).train())
    hooks = build_insight(cfg, model)
    for hook in hooks:
        hook._load_probe = lambda: strip(batch)
    with EventStorage() as storage:
        for _ in range(2):
            model.zero_grad()
            sum(model(batch).values()).backward()
            for hook in hooks:
                hook.trainer = SimpleNamespace(model=model, storage=storage, iter=0, max_iter=1)
                hook.after_step()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.save([len(hooks), sorted(storage.latest()), gradients], f"{output}{comm.get_rank()}")


@pytest.mark.usefixtures("loggers")
def test_two_processes(small_cfg, make_inputs, tmp_path):
    cfg = small_cfg("MODEL.DEQDET.INSIGHT.PERIOD", 1, "MODEL.DEQDET.INSIGHT.POWER_ITERATIONS", 2)
    run_two_ranks(observe_worker, cfg, make_inputs(1), str(tmp_path / "rank"))
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert (first[0], second[0]) == (1, 0)
    keys = {f"equilibrium/{name}" for name in NAMES}
    assert keys <= set(first[1]) and not keys & set(second[1])
    assert torch.equal(first[2], second[2]) and first[2].norm() > 0.1


# The norm of the gradient


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("clip_type", ["full_model", "norm", "value"])
def test_the_norm_before_clipping_is_logged_whatever_the_clipping(enabled, clip_type):
    cfg = get_cfg()
    add_deqdet_config(cfg)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = enabled, clip_type, 1.0
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))})
    model["a"].grad, model["b"].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    optimizer = build_optimizer(cfg, model)
    with EventStorage(7) as storage:
        optimizer.step()
    assert storage.latest()["grad_norm"] == (13.0, 7)
    assert torch.equal(model["b"].grad, torch.tensor([12.0])) == (not enabled)
