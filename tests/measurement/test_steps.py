"""Paths read off at several steps against separate solves; rows by hand; the tool from end to end."""

import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
import torch
from torch import nn

from detectron2.modeling import build_model
from detectron2.structures import Instances

from deqdet.data import build_test_loader
from deqdet.decoders import SOLVER_REGISTRY, packed_map, prepare_features
from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration, first_below, solve
from deqdet.errors import UserError
from deqdet.measurement.cost import count_multiply_adds
from deqdet.measurement.residuals import measure_residuals
from deqdet.measurement.steps import Plan, build_solvers, summarize, walk_paths
from deqdet.measurement.timing import Latency
from deqdet.structures import QueryState

from helpers.engine_toy import IN_PROCESS
from helpers.paths import TOOLS
from helpers.steps import COST, NAN, accuracy_of_choice, duplicates_of_step, make_path, make_results

TOOL = TOOLS / "evaluate_steps.py"
SOLVERS = {"plain": FixedPointIteration(), "anderson": Anderson(history_size=3), "broyden": Broyden(history_size=2)}
LIMIT = 8
SMALL_DATA = "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0
INF = float("inf")


@pytest.fixture
def inputs(make_inputs) -> list[dict]:
    """Three images of 64 x 96 pixels, whose originals had other sizes."""
    sizes = ((64, 96), (128, 192), (32, 48))
    return [
        {"image": x["image"], "image_id": 10 + i, "height": height, "width": width}
        for i, (x, (height, width)) in enumerate(zip(make_inputs(0, 0, 0), sizes, strict=True))
    ]


def assert_same(found: Instances, expected: Instances, **tolerance: float) -> None:
    assert found.image_size == expected.image_size and len(found) > 0
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, **tolerance)
    torch.testing.assert_close(found.scores, expected.scores, **tolerance)
    assert found.pred_classes.tolist() == expected.pred_classes.tolist()


@torch.no_grad()
def solve_alone(model: nn.Module, inputs: dict, solver: object, steps: int, rtol: float) -> tuple[Instances, int]:
    """The model's own forward with these settings, of one image; detections and the steps it took."""
    decoder = model.decoder
    decoder.solver, decoder.test_steps, decoder.rtol = solver, steps, rtol
    (found,) = model([inputs])
    return found["instances"], int(found["steps"])


@torch.no_grad()
def residuals_alone(model: nn.Module, inputs: dict, solver: object, steps: int) -> torch.Tensor:
    """The residuals of one image, by a solve that is written out here."""
    features, initial = model.encode(model.preprocess([inputs]))
    features = prepare_features((model.decoder.initialization, model.decoder.refinement), features)
    start = model.decoder.initialize(initial, features)
    refine = packed_map(model.decoder.refinement, features, start.content.shape[1])
    return solve(refine, start.pack(), solver=solver, max_steps=steps).residuals[:, 0]


def stop_in_the_middle(model: nn.Module, inputs: list[dict], solver: object) -> tuple[float, ...]:
    """An rtol that the residuals of the first image reach midway, and one that none ever reaches."""
    residuals = residuals_alone(model, inputs[0], solver, LIMIT)
    return float(residuals[2:6].min()) * 1.001, 1e-12


class TestPaths:
    @pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
    @pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
    def test_every_row_is_what_a_separate_solve_gives(self, small_model, inputs, solver, best):
        model = small_model("MODEL.DEQDET.SOLVER.RETURN_BEST", best).eval()
        plan = Plan(steps=(1, 4, 9), rtols=stop_in_the_middle(model, inputs, solver), limit=LIMIT)
        paths = list(walk_paths(model, [[x] for x in inputs[:2]], solver=solver, plan=plan))
        assert [path.image_id for path in paths] == [10, 11]
        middle = []
        for path, x in zip(paths, inputs[:2], strict=True):
            torch.testing.assert_close(path.residuals, residuals_alone(model, x, solver, 9), rtol=0, atol=0)
            assert (path.steps, path.finite) == (9, True)
            for steps in (1, 4, 9):
                assert_same(path.detections[steps], solve_alone(model, x, solver, steps, 0.0)[0])
            for rtol in plan.rtols:
                stop = int(first_below(path.residuals[:LIMIT, None], rtol))
                found, taken = solve_alone(model, x, solver, LIMIT, rtol)
                assert taken == stop
                assert_same(path.detections[stop], found)
                middle.append(stop)
        assert 2 < middle[0] < LIMIT and middle[1::2] == [LIMIT] * 2

    def test_a_batch_gives_what_its_images_give_alone(self, small_model, inputs):
        model = small_model().eval()
        plan = Plan(steps=(3,), rtols=stop_in_the_middle(model, inputs, SOLVERS["anderson"]), limit=LIMIT)
        walk = {"solver": SOLVERS["anderson"], "plan": plan}
        alone = walk_paths(model, [[x] for x in inputs], **walk)
        for one, other in zip(walk_paths(model, [inputs], **walk), alone, strict=True):
            torch.testing.assert_close(one.residuals, other.residuals, rtol=1e-3, atol=1e-5)
            assert one.detections.keys() == other.detections.keys()
            for step, found in one.detections.items():
                assert_same(found, other.detections[step], rtol=1e-3, atol=1e-2)

    def test_states_that_become_nan_keep_the_last_finite_one(self, small_model, inputs):
        model = small_model().eval()
        calls = []

        def break_from_third_call_on(layer, arguments, state):
            calls.append(layer)
            return QueryState(state.position, state.content * NAN) if len(calls) >= 3 else state

        handle = model.decoder.refinement.register_forward_hook(break_from_third_call_on)
        plan = Plan(steps=(2, 3, 5), rtols=(1e-12,), limit=4)
        (path,) = walk_paths(model, [inputs[:1]], solver=SOLVERS["plain"], plan=plan)
        handle.remove()
        assert (path.steps, path.finite) == (3, False)
        expected = solve_alone(model, inputs[0], SOLVERS["plain"], 2, 0.0)[0]
        for step in (2, 3, 4, 5):
            assert_same(path.detections[step], expected)

    @pytest.mark.parametrize("rtol, limit, expected", [
        (0.0, 4, [4, 4, 4]),
        (0.5, 4, [2, 1, 4]),  # the second one's later rise does not matter; NaN is not below
        (0.5, 1, [1, 1, 1]),
        (0.2, 4, [3, 4, 4]),  # the fourth residual of the second one comes at the limit
        (0.2, 3, [3, 3, 3]),
        (0.4, 4, [3, 1, 4]),  # 0.4 is not below 0.4
    ])  # fmt: skip
    def test_stopping_steps_by_hand(self, rtol, limit, expected):
        residuals = torch.tensor([[1.0, 0.3, 1.0], [0.4, 0.9, NAN], [0.1, 0.8, NAN], [0.1, 0.1, NAN]])
        assert first_below(residuals[:limit], rtol).tolist() == expected

    @pytest.mark.parametrize("plan, message", [
        ({"steps": (4, 0)}, "a number of steps must be at least 1, got 0"),
        ({"limit": 0}, "a number of steps must be at least 1, got 0"),
        ({"rtols": (0.1, 0.0)}, "an rtol must be a number above 0, got 0.0"),
        ({"rtols": (NAN,)}, "an rtol must be a number above 0, got nan"),
    ])  # fmt: skip
    def test_a_plan_that_makes_no_sense(self, plan, message):
        with pytest.raises(ValueError, match=message):
            Plan(**{"steps": (1,), "rtols": (), "limit": 2} | plan)

    def test_only_what_is_needed_is_recorded(self):
        assert Plan(steps=(2, 6), rtols=(), limit=4).record == {2, 4, 6}
        assert Plan(steps=(2, 6), rtols=(0.1,), limit=4).record == {1, 2, 3, 4, 6}


class TestRows:
    def test_steps_by_hand(self):
        results = make_results()
        assert [row.steps for row in results.steps] == [1, 3, 5]
        assert [row.multiply_adds for row in results.steps] == [101 * 10**9, 107 * 10**9, 113 * 10**9]
        assert [row.seconds for row in results.steps] == pytest.approx([0.52, 0.56, 0.6])
        # Of four images the mean of the middle two; NaN is the largest.
        assert results.median_residuals == pytest.approx([1.5, 0.7, 0.6, 0.4, 0.15])
        assert [row.residual for row in results.steps] == pytest.approx([1.5, 0.6, 0.15])
        assert [row.accuracy.AP for row in results.steps] == [10.0, 30.0, 50.0]
        assert results.nonfinite == 1

    def test_tolerances_by_hand(self):
        everything, half, never = make_results().tolerances
        assert (everything.rtol, everything.mean_steps, everything.median_steps) == (0.0, 4.0, 4.0)
        assert (everything.saved, everything.converged, everything.difference) == (0.0, None, 0.0)
        assert everything.accuracy.AP == 40.0
        # Below 0.5 first after 2, 3, never, never.
        assert (half.mean_steps, half.median_steps, half.saved, half.converged) == (3.0, 3.0, 25.0, 50.0)
        assert half.percentile_95_steps == pytest.approx(3.85)  # 2, 3, 3, 4: 0.85 of the way from the third on
        assert (half.accuracy.AP, half.difference) == (32.5, -7.5)
        # The fourth image becomes NaN at the third step, and with an rtol takes part in no other.
        assert (never.rtol, never.mean_steps, never.converged, never.difference) == (0.01, 3.75, 0.0, 0.0)
        # The AP of fixed steps is 10 at 1 and 30 at 3 steps, 40 at the limit of 4: on a straight line 10 a step.
        assert [row.AP_fixed for row in (everything, half, never)] == pytest.approx([40.0, 30.0, 37.5])

    def test_fewer_steps_than_any_row_have_no_fixed_ap(self):
        """The images stop after 1 and 2 steps, and the rows begin with 3."""
        paths = [make_path(1, [0.1] * 5), make_path(2, [1.0, 0.1, 0.1, 0.1, 0.1])]
        plan = Plan(steps=(3, 5), rtols=(0.5,), limit=4)
        results = summarize("plain", "", paths, plan=plan, evaluate=accuracy_of_choice, cost=COST,
                            count_duplicates=duplicates_of_step, latency=Latency(0.1, 0.1))  # fmt: skip
        assert [row.AP_fixed for row in results.tolerances] == [40.0, None]

    def test_residuals_that_are_nowhere_finite(self):
        results = make_results(paths=[make_path(1, [INF, NAN, NAN, NAN, NAN], steps=1)])
        assert results.median_residuals == [None] * 5 and results.steps[0].residual is None


class TestSolvers:
    def test_names(self, small_cfg):
        cfg = small_cfg("MODEL.DEQDET.SOLVER.DAMPING", 0.5, "MODEL.DEQDET.SOLVER.MEMORY", 6)
        cfg.freeze()
        found = build_solvers(cfg, ["plain", "anderson2", "anderson", "broyden12", "broyden"])
        regularization = cfg.MODEL.DEQDET.SOLVER.REGULARIZATION
        assert found == {
            "plain": FixedPointIteration(damping=0.5),
            "anderson2": Anderson(history_size=2, damping=0.5, regularization=regularization),
            "anderson": Anderson(history_size=6, damping=0.5, regularization=regularization),
            "broyden12": Broyden(history_size=12),
            "broyden": Broyden(history_size=6),
        }
        assert cfg.MODEL.DEQDET.SOLVER.NAME == "FixedPointIteration"

    def test_each_comes_once_under_its_first_name(self, small_cfg):
        names = ["anderson", "anderson04", "anderson4", "broyden4", "broyden004", "anderson5"]
        found = build_solvers(small_cfg("MODEL.DEQDET.SOLVER.MEMORY", 4), names)
        assert {name: solver.history_size for name, solver in found.items()} == {
            "anderson": 4,
            "broyden4": 4,
            "anderson5": 5,
        }

    def test_a_registered_solver_of_ones_own(self, small_cfg):
        @SOLVER_REGISTRY.register()
        @dataclass(frozen=True)
        class Slow(FixedPointIteration):
            patience: int = 3

        try:
            found = build_solvers(small_cfg(), ["plain", "slow", "Slow(patience=5)", "Slow(patience=3)"])
            assert list(found) == ["plain", "slow", "Slow(patience=5)"]
            assert found["slow"] == Slow() and found["Slow(patience=5)"] == Slow(patience=5)
        finally:
            SOLVER_REGISTRY._obj_map.pop("Slow")

    @pytest.mark.parametrize("name, message", [
        ("newton", "unknown solver newton: choose plain, .*, or with a history size, as anderson4"),
        ("plain2", "solver plain2: FixedPointIteration has no option history_size"),
        ("anderson1", "solver anderson1: .*history_size of Anderson must be at least 2"),
    ])  # fmt: skip
    def test_an_unknown_one(self, small_cfg, name, message):
        with pytest.raises(UserError, match=message):
            build_solvers(small_cfg(), ["plain", name])


def test_a_decoder_without_an_equilibrium(small_model, inputs):
    model = small_model("MODEL.DEQDET.DECODER", "StackedDecoder").eval()
    with pytest.raises(UserError, match="MODEL.DEQDET.DECODER is StackedDecoder, whose number of steps is fixed"):
        next(walk_paths(model, [inputs], solver=SOLVERS["plain"], plan=Plan(steps=(1,), rtols=(), limit=2)))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """Where the generated images go: in one process their set is registered once."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def tool(monkeypatch, tmp_path, datasets, small_cfg, stir):
    """tool(...) runs it on a small random model and three generated images; without weights=True those are missing."""

    def run(*arguments: str, weights: bool = True) -> None:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
        cfg = small_cfg("MODEL.DEQDET.NUM_CLASSES", 8, "DATASETS.TEST", ("shapes_seed41_3",), "DATASETS.TRAIN", (),
                        *SMALL_DATA, "SEED", 1, "OUTPUT_DIR", str(tmp_path / "trained"))  # fmt: skip
        (tmp_path / "small.yaml").write_text(cfg.dump())
        if weights:
            (tmp_path / "trained").mkdir(exist_ok=True)
            torch.manual_seed(0)
            model = build_model(cfg)
            stir(model, size=0.01)
            torch.save({"model": model.state_dict()}, tmp_path / "trained" / "model_final.pth")
        options = ["--config-file", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *options])
        runpy.run_path(str(TOOL), run_name="__main__")

    return run


class TestTool:
    pytestmark = IN_PROCESS

    def test_end_to_end(self, tool, tmp_path, capsys):
        # TEST_STEPS is 4. The KEY VALUE pairs follow a list.
        tool("--limit", "2", "--solvers", "plain", "anderson2", "plain", "--rtols", "1E-9", "0.5", "--steps", "6", "2",
             "3", "2", "MODEL.DEQDET.SOLVER.DAMPING", "0.5")  # fmt: skip
        found = json.loads((tmp_path / "out" / "steps.json").read_text())
        assert (found["images"], found["limit"], found["dataset"]) == (2, 4, "shapes_seed41_3")
        plain, anderson = found["results"]
        assert plain["solver"] == "FixedPointIteration(damping=0.5)"
        assert anderson["solver"] == "Anderson(history_size=2, damping=0.5, regularization=1e-06)"
        for results in (plain, anderson):
            assert [row["steps"] for row in results["steps"]] == [2, 3, 6]
            assert [row["rtol"] for row in results["tolerances"]] == [0.0, 0.5, 1e-9]
            assert results["tolerances"][-1]["mean_steps"] == 4.0
            assert len(results["median_residuals"]) == 6

        printed = capsys.readouterr().out
        assert (tmp_path / "out" / "steps.md").read_text() in printed
        assert cv2.imread(str(tmp_path / "out" / "steps.png")).std() > 5
        assert not (tmp_path / "trained" / "config.yaml").exists()

    def test_its_figures_are_those_of_the_model(self, tool, tmp_path, small_cfg):
        tool("--solvers", "plain", "--rtols", "0.5", "--steps", "3", "5")
        found = json.loads((tmp_path / "out" / "steps.json").read_text())
        (plain,) = found["results"]
        assert found["images"] == 3
        model = build_model(small_cfg("MODEL.DEQDET.NUM_CLASSES", 8)).eval()
        model.load_state_dict(torch.load(tmp_path / "trained" / "model_final.pth", weights_only=True)["model"])
        cost = count_multiply_adds(model, steps=5, height=64, width=64)
        assert plain["steps"][1]["multiply_adds"] == cost.total.linear
        assert found["cost"]["image_size"] == [64, 64]
        loader = build_test_loader(small_cfg(*SMALL_DATA), "shapes_seed41_3")
        medians = measure_residuals(model, loader, steps=5).median(dim=1).values.tolist()
        assert plain["median_residuals"] == pytest.approx(medians[1:], rel=1e-5)

    @pytest.mark.parametrize("arguments, message", [
        (["--solvers", "newton"], "unknown solver newton: choose plain, "),
        (["--steps", "4", "0"], "--steps or --rtols: a number of steps must be at least 1, got 0"),
        (["--rtols", "-1"], "--steps or --rtols: an rtol must be a number above 0, got -1.0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["MODEL.DEQDET.DECODER", "RecurrentDecoder"], "MODEL.DEQDET.DECODER is RecurrentDecoder"),
        (["MODEL.META_ARCHITECTURE", "EngineToy"], "MODEL.META_ARCHITECTURE is EngineToy: it must be DEQDet"),
        (["MODEL.DEQDET.DECODER", "Stack"], "MODEL.DEQDET.DECODER is 'Stack'"),
        (["MODEL.BACKBONE.NAME", "Nothing"], "error: MODEL.BACKBONE.NAME is 'Nothing': it must be one of "),
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty: give the checkpoint of a trained model"),
        (["MODEL.WEIGHTS", "no.pth"], "MODEL.WEIGHTS no.pth does not exist"),
        (["MODEL.DEQDET.NUM_QUERYS", "3"], "did you mean MODEL.DEQDET.NUM_QUERIES?"),
    ])  # fmt: skip
    def test_one_line_says_what_is_wrong(self, tool, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            tool(*arguments)
        error = str(stopped.value.code)
        assert error.startswith("error: ") and message in error and "\n" not in error

    def test_a_model_that_was_not_trained(self, tool):
        with pytest.raises(SystemExit, match="trained/model_final.pth does not exist: train the model, or give"):
            tool(weights=False)

    @pytest.mark.parametrize("arguments, message", [
        (["--steps", "few"], "argument --steps: invalid int value: 'few'"),
        (["--steps", "MODEL.DEQDET.NUM_QUERIES", "3"], "argument --steps: expected at least one argument"),
    ])  # fmt: skip
    def test_a_flag_with_a_wrong_value(self, tool, capsys, arguments, message):
        with pytest.raises(SystemExit, match="2"):
            tool(*arguments)
        assert message in capsys.readouterr().err
