"""The comparison: what a training's files say, what is trained again; and the tool once for real."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from deqdet.errors import UserError
from deqdet.measurement import comparison
from deqdet.measurement.checkpoint_cost import Measurement
from deqdet.measurement.comparison import (
    Run,
    check_record,
    complete,
    find_unlisted,
    name_seeds,
    prepare_runs,
    read_metrics,
)
from deqdet.measurement.comparison_settings import check_budgets

from helpers.comparison import MEASURED
from helpers.paths import ROOT

QUICK = ROOT / "configs" / "quick"
NAN = float("nan")
# Stands for tools/train_net.py: notes its arguments, then leaves what a training of 30 iterations leaves.
STUB = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
with open(folder / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
print("the stub's output")
if (folder / "broken").exists():
    sys.exit(3)
(folder / "model_final.pth").touch()
metrics = {"bbox/AP": 12.5, "bbox/AP50": 25.0, "bbox/APs": 5.0, "iteration": 30}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


def write_lines(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluation(iteration: int, ap: float, aps: float = 1.0, **others: float) -> dict:
    return {"bbox/AP": ap, "bbox/AP50": 2 * ap, "bbox/APs": aps, "iteration": iteration, **others}


class TestMetrics:
    def test_figures_of_a_training(self, tmp_path):
        write_lines(
            tmp_path / "metrics.json",
            evaluation(9, 10.0, time=0.5, peak_memory_mb=700.0),
            {"iteration": 14, "time": 0.9, "peak_memory_mb": 750.0},
            evaluation(19, 20.0, time=0.6, peak_memory_mb=720.0),
            evaluation(30, 30.0, aps=NAN),  # the last one comes before the iteration's own line
            {"iteration": 29, "time": 0.7},
        )
        metrics = read_metrics(tmp_path / "metrics.json", 30)
        assert metrics.curve == [[10, 10.0], [20, 20.0], [30, 30.0]]
        assert (metrics.AP, metrics.AP50, metrics.APs) == (30.0, 60.0, None)
        assert metrics.seconds_per_iteration == pytest.approx(0.65)  # between 0.6 and 0.7
        assert metrics.training_memory_mb == 750.0

    def test_a_resumed_training_replaces_its_evaluations(self, tmp_path):
        path = tmp_path / "metrics.json"
        write_lines(path, evaluation(9, 10.0), evaluation(19, 20.0))
        with open(path, "a") as file:
            file.write('{"bbox/AP": 2')  # the process ended here
            file.write("\n" + json.dumps(evaluation(19, 21.0)) + "\n" + json.dumps(evaluation(30, 31.0)))
        assert read_metrics(path, 30).curve == [[10, 10.0], [20, 21.0], [30, 31.0]]

    def test_too_short_for_a_timing(self, tmp_path):
        write_lines(tmp_path / "metrics.json", evaluation(2, 0.0))
        metrics = read_metrics(tmp_path / "metrics.json", 2)
        assert metrics.seconds_per_iteration is None and metrics.training_memory_mb is None

    def test_a_training_that_is_not_done(self, tmp_path):
        assert read_metrics(tmp_path / "metrics.json", 30) is None
        write_lines(tmp_path / "metrics.json", evaluation(9, 10.0), {"iteration": 29, "time": 0.7})
        assert read_metrics(tmp_path / "metrics.json", 30) is None


class TestRestart:
    @pytest.fixture
    def run(self, tmp_path) -> Run:
        folder = tmp_path / "x-seed1"
        arguments = ("--config-file", "x.yaml", "--resume", "OUTPUT_DIR", str(folder))
        return Run("x", 1, folder, arguments, {"SOLVER.MAX_ITER": 30, "SOLVER.BASE_LR": 0.1})

    @pytest.fixture
    def train(self, tmp_path) -> list[str]:
        (tmp_path / "stub.py").write_text(STUB)
        return [sys.executable, str(tmp_path / "stub.py")]

    @staticmethod
    def calls(run: Run) -> list[str]:
        return (run.folder / "calls").read_text().splitlines()

    def test_a_finished_run_is_not_trained_again(self, run, train):
        measured = []

        def count(run: Run) -> Measurement:
            measured.append(run.name)
            return MEASURED

        first, second = complete(run, train, count), complete(run, train, count)
        assert first == second and first.metrics.AP == 12.5 and first.measurement == MEASURED
        assert self.calls(run) == [" ".join(run.arguments)] and measured == ["x"]
        assert (run.folder / "log").read_text() == "the stub's output\n"

    def test_a_finished_run_may_be_renamed(self, run, train):
        complete(run, train, lambda run: MEASURED)
        assert complete(replace(run, name="y"), train, lambda run: MEASURED).name == "y"

    def test_a_trained_run_is_only_measured(self, run, train):
        complete(run, train, lambda run: MEASURED)
        run.result_file.unlink()
        complete(run, train, lambda run: MEASURED)
        assert len(self.calls(run)) == 1 and run.result_file.is_file()

    def test_evaluated_without_a_model_is_not_trained(self, run, train):
        complete(run, train, lambda run: MEASURED)
        run.result_file.unlink()
        run.weights.unlink()
        complete(run, train, lambda run: MEASURED)
        assert len(self.calls(run)) == 2

    def test_a_failed_run_names_its_log_and_goes_on_later(self, run, train):
        run.folder.mkdir()
        (run.folder / "broken").touch()
        with pytest.raises(UserError, match=r"training of x, seed 1 failed with exit code 3: see .*x-seed1/log$"):
            complete(run, train, lambda run: MEASURED)
        assert not run.result_file.exists()
        (run.folder / "broken").unlink()
        assert complete(run, train, lambda run: MEASURED).metrics.AP == 12.5
        assert len(self.calls(run)) == 2

    def test_a_run_without_a_model_is_an_error(self, run):
        with pytest.raises(UserError, match="left no model or no final AP"):
            complete(run, [sys.executable, "-c", ""], lambda run: MEASURED)

    def test_minutes_are_those_of_all_starts(self, run, train, monkeypatch):
        """The clock of this test goes on by 90 s at each look: a start takes 1.5 minutes."""
        monkeypatch.setattr(comparison.time, "monotonic", itertools.count(0, 90).__next__)
        run.folder.mkdir()
        (run.folder / "broken").touch()
        for _ in range(2):
            with pytest.raises(UserError, match="failed with exit code 3"):
                complete(run, train, lambda run: MEASURED)
        (run.folder / "broken").unlink()
        assert complete(run, train, lambda run: MEASURED).minutes == 4.5
        run.result_file.unlink()  # trained, but not measured
        assert complete(run, train, lambda run: MEASURED).minutes == 4.5
        assert complete(run, train, lambda run: MEASURED).minutes == 4.5
        run.minutes_file.unlink()  # an earlier version made the result
        assert complete(run, train, lambda run: MEASURED).minutes is None

    def test_minutes_are_none_where_a_start_is_not_known(self, run, train):
        """A training that deqdet-train began, one that it ended, and one in which the power failed."""
        run.folder.mkdir()
        (run.folder / "metrics.json").write_text("")
        assert complete(run, train, lambda run: MEASURED).minutes is None
        run.result_file.unlink()
        run.minutes_file.unlink()
        assert complete(run, train, lambda run: MEASURED).minutes is None
        run.result_file.unlink()
        run.weights.unlink()
        run.minutes_file.write_text("[2.0, null]")
        assert complete(run, train, lambda run: MEASURED).minutes is None
        assert len(json.loads(run.minutes_file.read_text())) == 3

    def test_finished_runs_that_are_not_in_the_report(self, run, train):
        others = [("y", 2), ("y", 10), ("y", 1), ("z-seed1", 3), ("unfinished", 1)]
        for name, seed in others:
            folder = run.folder.with_name(f"{name}-seed{seed}")
            if name == "unfinished":
                folder.mkdir()
            else:
                complete(replace(run, name=name, seed=seed, folder=folder, arguments=("OUTPUT_DIR", str(folder))),
                         train, lambda run: MEASURED)  # fmt: skip
        complete(run, train, lambda run: MEASURED)
        assert find_unlisted([run], run.folder.parent) == {"y": [1, 2, 10], "z-seed1": [3]}
        assert name_seeds([1, 2, 10]) == "seeds 1, 2, 10" and name_seeds([3]) == "seed 3"

    @pytest.mark.parametrize("now, error", [(0.9, None), (0.5, "SOLVER.MOMENTUM 0.9, which is now 0.5")])
    def test_a_key_that_is_newer_than_the_run_had_its_default(self, run, train, now, error):
        """SOLVER.MOMENTUM stands for it, which is 0.9 by default."""
        complete(run, train, lambda run: MEASURED)
        later = Run(run.name, run.seed, run.folder, run.arguments, {**run.settings, "SOLVER.MOMENTUM": now})
        with nullcontext() if error is None else pytest.raises(UserError, match=f"x-seed1 was started with {error}"):
            check_record(later)

    @pytest.mark.parametrize("key, now", [("SOLVER.BASE_LR", 0.2), ("SOLVER.NEW", 0.2)])
    def test_other_settings_than_at_the_start_are_an_error(self, run, train, key, now):
        complete(run, train, lambda run: MEASURED)
        check_record(run)
        was = run.settings.get(key)
        changed = Run(run.name, run.seed, run.folder, run.arguments, {**run.settings, key: now})
        with pytest.raises(UserError, match=f"x-seed1 was started with {key} {was}, which is now {now}"):
            check_record(changed)


class TestPreparation:
    @pytest.fixture
    def prepare(self, tmp_path, monkeypatch):
        """prepare(*config files, more overrides): with few generated images."""
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))

        def prepare(*files: str | Path, overrides: tuple[str, ...] = (), **options) -> list[Run]:
            data = ("DATASETS.TRAIN", "('shapes_seed41_2',)", "DATASETS.TEST", "('shapes_seed42_2',)")
            options = {"seeds": [1, 2], "num_gpus": 1, **options}
            return prepare_runs(list(map(str, files)), tmp_path, overrides=(*data, *overrides), **options)

        return prepare

    @pytest.fixture
    def write_config(self, tmp_path):
        def write(name: str, text: str = "") -> Path:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'_BASE_: "{QUICK / "deqdet_shapes.yaml"}"\n{text}')
            return path

        return write

    def test_runs_go_seed_by_seed_with_their_own_settings(self, prepare, tmp_path):
        runs = prepare(QUICK / "deqdet_shapes.yaml", QUICK / "rnndet_shapes.yaml", overrides=("SOLVER.MAX_ITER", "90"))
        assert [run.label for run in runs] == [
            f"{name}, seed {seed}" for seed in (1, 2) for name in ("deqdet_shapes", "rnndet_shapes")
        ]
        last = runs[-1]
        assert last.folder == tmp_path / "rnndet_shapes-seed2"
        expected = {"SEED": 2, "TEST.EVAL_PERIOD": 15, "SOLVER.MAX_ITER": 90, "num_gpus": 1}
        assert expected.items() <= last.settings.items()
        assert last.settings["MODEL.DEQDET.DECODER"] == "RecurrentDecoder"
        assert "--resume" in last.arguments and "OUTPUT_DIR" not in last.settings

    def test_names_of_the_model_zoo_and_plugins(self, prepare, tmp_path):
        plugin = tmp_path / "layer_of_a_comparison.py"
        plugin.write_text("imported = True\n")
        runs = prepare("quick/deqdet_shapes", "rnndet_shapes", seeds=[1], plugins=[str(plugin)])
        assert [run.name for run in runs] == ["deqdet_shapes", "rnndet_shapes"]
        for run in runs:
            where = run.arguments.index("--plugin")
            assert run.arguments[where + 1] == str(plugin)
            assert Path(run.arguments[run.arguments.index("--config-file") + 1]).is_file()
        assert sys.modules.pop("deqdet_plugin_layer_of_a_comparison").imported

    def test_unequal_budgets_are_an_error(self, prepare, write_config):
        other = write_config("other.yaml", "SOLVER: {MAX_ITER: 77}")
        with pytest.raises(UserError, match="SOLVER.MAX_ITER is 1200 in deqdet_shapes, but 77 in other"):
            prepare(QUICK / "deqdet_shapes.yaml", other)
        assert len(prepare(QUICK / "deqdet_shapes.yaml", other, overrides=("SOLVER.MAX_ITER", "5"))) == 4

    @pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH"])
    def test_each_key_of_the_budget_counts(self, key):
        same = {"DATASETS.TRAIN": ["a"], "DATASETS.TEST": ["b"], "SOLVER.MAX_ITER": 1, "SOLVER.IMS_PER_BATCH": 2}
        same["SOLVER.REFERENCE_WORLD_SIZE"] = 0
        check_budgets({"x": same, "y": dict(same)})
        with pytest.raises(UserError, match=f"{key} is .* in x, but other in y"):
            check_budgets({"x": same, "y": {**same, key: "other"}})

    @pytest.mark.parametrize("overrides, message", [
        (("SEED", "3"), "SEED cannot be overridden here: use --seeds"),
        (("OUTPUT_DIR", "out"), "use --output"),
        (("DATASETS.TEST", "()"), "name the one set to compare on"),
        (("SOLVER.REFERENCE_WORLD_SIZE", "8"), "SOLVER.REFERENCE_WORLD_SIZE rescales the budget"),
        (("MODEL.DEQDET.NUM_CLASSES", "7"), "set MODEL.DEQDET.NUM_CLASSES to 8"),
        (("MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS", "2"),
         "^deqdet_shapes: MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT is 1: "
         r"times SUPERVISION_INTERVAL \(3\) it must be at most TRAIN_STEPS \(2\)"),
        (("SOLVER.MAXITER", "7"), "did you mean SOLVER.MAX_ITER"),
    ])  # fmt: skip
    def test_wrong_overrides(self, prepare, overrides, message):
        with pytest.raises(UserError, match=message):
            prepare(QUICK / "deqdet_shapes.yaml", overrides=overrides)

    @pytest.mark.parametrize("seeds, message", [
        ([1, -1], "^--seeds -1: a negative seed means a random one: give seeds of at least 0"),
        ([1, 2, 1], "^--seeds has 1 twice: give each seed once"),
    ])  # fmt: skip
    def test_wrong_seeds(self, prepare, seeds, message):
        with pytest.raises(UserError, match=message):
            prepare(QUICK / "deqdet_shapes.yaml", seeds=seeds)

    def test_two_configs_of_one_name(self, prepare, write_config):
        with pytest.raises(UserError, match="the same name"):
            prepare(write_config("a/x.yaml"), write_config("b/x.yaml"))

    def test_a_begun_run_with_another_config(self, prepare, write_config):
        (run,) = prepare(write_config("x.yaml"), seeds=[1])
        run.folder.mkdir()
        (run.folder / "run.json").write_text(json.dumps(run.settings))
        assert prepare(write_config("x.yaml"), seeds=[1]) == [run]
        with pytest.raises(UserError, match="started with SOLVER.BASE_LR 0.001, which is now 0.002"):
            prepare(write_config("x.yaml", "SOLVER: {BASE_LR: 0.002}"), seeds=[1])


def test_the_tool_trains_two_detectors_once(tmp_path):
    """For real, with two tiny models; then again, when nothing is left to train."""
    options = """--output out --opts SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 MODEL.DEVICE cpu
    DATASETS.TRAIN ('shapes_seed3_4',) DATASETS.TEST ('shapes_seed4_3',)
    MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 3"""
    configs = [str(QUICK / "deqdet_shapes.yaml"), str(QUICK / "rnn_sparse_rcnn_shapes.yaml")]
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), *configs, *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(tmp_path / "datasets")}

    def compare(command: list[str] = command, count: int = 2) -> dict:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert done.stdout.count("AP 0.0") == count
        unlisted = "finished runs rnn_sparse_rcnn_shapes (seed 1) in out; to include them, add their"
        assert (unlisted in done.stdout) == (count == 1) == ("Not in this table" in done.stdout)
        return json.loads((tmp_path / "out" / "comparison.json").read_text())

    first = compare()
    deqdet, sparse_rcnn = first["configs"]
    assert deqdet["decoder"] == "EquilibriumDecoder" and sparse_rcnn["layer"] == "SparseRCNNLayer"
    for config in (deqdet, sparse_rcnn):
        assert config["image_size"] == [160, 160] and config["curve"] == [[1, 0.0], [2, 0.0]]
        assert config["training_memory_mb"] > 100 and config["inference_memory_mb"] > 1
        assert config["parameters"] > 1e5 and config["multiply_adds"] > 1e6 and config["ms_per_image"] > 0
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table.count("_shapes | ") == 2 and (tmp_path / "out" / "comparison.png").is_file()
    logs = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/log"))]
    assert compare() == first
    assert len(logs) == 2 and logs == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/log"))]
    command.remove(configs[1])
    assert [config["name"] for config in compare(command, 1)["configs"]] == ["deqdet_shapes"]
