"""The comparison: what a training's files say, what is trained again, the table; and the tool once for real."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TextIO

import cv2
import pytest
import torch
from matplotlib.axes import Axes

from deqdet.analysis import count_multiply_adds
from deqdet.comparison import (
    Measurement,
    Metrics,
    Result,
    Run,
    complete,
    prepare_runs,
    read_metrics,
    write_report,
)
from deqdet.comparison.measurement import IMAGES, WARM_UP, measure, peak_memory
from deqdet.comparison.report import summarize
from deqdet.comparison.runs import check_record
from deqdet.comparison.settings import check_budgets
from deqdet.engine import UserError

from helpers.paths import ROOT

QUICK = ROOT / "configs" / "quick"
NAN = float("nan")
MEASURED = Measurement(parameters=2_000_000, multiply_adds=3_000_000_000, image_size=[160, 192],
                       ms_per_image=40.0, inference_memory_mb=50.0)  # fmt: skip

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


def make_result(name: str, seed: int, ap: float | None, **figures: object) -> Result:
    settings = {
        "MODEL.DEQDET.DECODER": f"{name}Decoder",
        "MODEL.DEQDET.REFINEMENT_LAYER": "SomeLayer",
        "SOLVER.MAX_ITER": 30,
        "SOLVER.IMS_PER_BATCH": 16,
        "DATASETS.TRAIN": ["some_train"],
        "DATASETS.TEST": ["some_val"],
        "num_gpus": 2,
    }
    curve = [[10, 1.0], [20, 2.0], [30, ap]]
    metrics = {"AP": ap, "AP50": 60.0, "APs": 10.0, "curve": curve, "seconds_per_iteration": 0.5}
    metrics = Metrics(**{**metrics, "training_memory_mb": 900.0, **figures})
    return Result(name, seed, settings, metrics, MEASURED, "a machine", 1.5)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_free(file: TextIO) -> bool:
    """Whether no process holds a lock on the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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

    def test_an_interruption_ends_every_process_of_the_training(self, run):
        """The stub and a process that it starts hold a lock, for longer than the test waits."""
        run.folder.mkdir()
        lock, ready = run.folder / "lock", run.folder / "ready"
        sleep = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(300)"
        stub = f"""
import fcntl, subprocess, sys, time
lock = open({str(lock)!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen([sys.executable, "-c", {sleep!r}], pass_fds=[lock.fileno()])
time.sleep(300)"""

        def interrupt(*_) -> None:
            raise KeyboardInterrupt

        def alarm() -> None:
            wait_for(ready.exists)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, interrupt)
        thread = threading.Thread(target=alarm)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            complete(run, [sys.executable, "-c", stub], lambda run: MEASURED)
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        assert ready.exists()
        with open(lock) as file:
            assert wait_for(lambda: is_free(file))

    @pytest.mark.parametrize("now, error", [(0.9, None), (0.5, "SOLVER.MOMENTUM 0.9, which is 0.5 now")])
    def test_a_key_that_is_newer_than_the_run_had_its_default(self, run, train, now, error):
        """SOLVER.MOMENTUM stands for it, which is 0.9 by default."""
        complete(run, train, lambda run: MEASURED)
        later = Run(run.name, run.seed, run.folder, run.arguments, {**run.settings, "SOLVER.MOMENTUM": now})
        with nullcontext() if error is None else pytest.raises(UserError, match=f"x-seed1 was begun with {error}"):
            check_record(later)

    @pytest.mark.parametrize("key, now", [("SOLVER.BASE_LR", 0.2), ("SOLVER.NEW", 0.2)])
    def test_other_settings_than_at_the_start_are_an_error(self, run, train, key, now):
        complete(run, train, lambda run: MEASURED)
        check_record(run)
        was = run.settings.get(key)
        changed = Run(run.name, run.seed, run.folder, run.arguments, {**run.settings, key: now})
        with pytest.raises(UserError, match=f"x-seed1 was begun with {key} {was}, which is {now} now"):
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
        (("MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS", "2"), "^deqdet_shapes: Omega reaches step m C = 1 . 3"),
        (("SOLVER.MAXITER", "7"), "did you mean SOLVER.MAX_ITER"),
    ])  # fmt: skip
    def test_wrong_overrides(self, prepare, overrides, message):
        with pytest.raises(UserError, match=message):
            prepare(QUICK / "deqdet_shapes.yaml", overrides=overrides)

    def test_two_configs_of_one_name(self, prepare, write_config):
        with pytest.raises(UserError, match="the same name"):
            prepare(write_config("a/x.yaml"), write_config("b/x.yaml"))

    def test_a_begun_run_with_another_config(self, prepare, write_config):
        (run,) = prepare(write_config("x.yaml"), seeds=[1])
        run.folder.mkdir()
        (run.folder / "run.json").write_text(json.dumps(run.settings))
        assert prepare(write_config("x.yaml"), seeds=[1]) == [run]
        with pytest.raises(UserError, match="begun with SOLVER.BASE_LR 0.001, which is 0.002 now"):
            prepare(write_config("x.yaml", "SOLVER: {BASE_LR: 0.002}"), seeds=[1])


class TestMeasurement:
    def test_figures_of_a_model(self, small_model, make_inputs):
        model = small_model().eval()
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        found = measure(model, repeat(make_inputs(1)))
        assert len(calls) == WARM_UP + IMAGES
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert found.image_size == [64, 96]
        assert found.multiply_adds == count_multiply_adds(model, height=64, width=96).total.linear
        assert found.ms_per_image > 0
        weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
        assert weights < found.inference_memory_mb < weights + 20  # a small image: no libraries are counted

    def test_two_images_are_too_few(self, small_model, make_inputs):
        with pytest.raises(ValueError, match="2 image.s. are too few"):
            measure(small_model().eval(), [make_inputs(1)] * 2)

    def test_peak_of_memory(self):
        held = torch.zeros(2**20)  # 4 MiB, there before

        def step() -> torch.Tensor:
            doubled = held * 2  # 4
            more = torch.cat([doubled, held])  # 12
            del doubled
            return more.sum()  # 8 and a little

        assert peak_memory(step, torch.device("cpu")) / 2**20 == pytest.approx(12, abs=0.1)


class TestReport:
    def test_means_over_the_seeds(self):
        results = [
            make_result("A", 1, 20.0, curve=[[10, 1.0], [20, 2.0], [30, 20.0]], seconds_per_iteration=0.5),
            make_result("B", 1, 33.0),
            make_result("A", 2, 30.0, curve=[[10, 4.0], [30, 30.0]], seconds_per_iteration=0.7, APs=None),
        ]
        a, b = summarize(results)
        assert (a["name"], b["name"], a["decoder"]) == ("A", "B", "ADecoder")
        assert (a["AP"], a["APs"]) == (25.0, None)
        assert a["seconds_per_iteration"] == pytest.approx(0.6)
        assert a["curve"] == [[10, 2.5], [30, 25.0]]  # the points that both have
        assert [seed["AP"] for seed in a["seeds"]] == [20.0, 30.0]
        assert b["AP"] == 33.0 and len(b["seeds"]) == 1

    def test_table_and_json(self, tmp_path):
        results = [make_result("A", 1, 20.0), make_result("B", 1, 33.0, APs=None), make_result("A", 2, 31.0)]
        write_report(results, tmp_path, "the command")
        text = (tmp_path / "comparison.md").read_text()
        assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
            "| A | ADecoder | SomeLayer | 25.5 | 20.0, 31.0 | 60.0 | 10.0 | 2.00 | 3 | 0.5 | 40 | 900 | 50 |",
            "| B | BDecoder | SomeLayer | 33.0 | 33.0 | 60.0 | - | 2.00 | 3 | 0.5 | 40 | 900 | 50 |",
        ]
        for part in ("30 iterations of 16 images of some_train", "160 x 192", "a machine", "`the command`", "some_val"):
            assert part in text
        whole = json.loads((tmp_path / "comparison.json").read_text())
        assert whole["command"] == "the command" and whole["configs"] == summarize(results)

    def test_what_differs_from_the_first_config(self, tmp_path):
        """Not the seed, and not a key that the first one's run did not know."""
        results = [make_result("A", seed, 20.0) for seed in (1, 2)] + [make_result(name, 1, 30.0) for name in "BA"]
        results[3] = replace(results[0], name="C")
        results[0].settings["SEED"] = 1
        results[2].settings.update({"SEED": 5, "SOLVER.MAX_ITER": 40, "SOLVER.NEWER": 1})
        write_report(results, tmp_path, "")
        assert [config["changes"] for config in summarize(results)] == [
            {}, {"MODEL.DEQDET.DECODER": "BDecoder", "SOLVER.MAX_ITER": 40}, {}
        ]  # fmt: skip
        lines = (tmp_path / "comparison.md").read_text().splitlines()
        start = lines.index("- What differs from A:")
        assert lines[start + 1 : start + 3] == [
            "  - B: `MODEL.DEQDET.DECODER` BDecoder, `SOLVER.MAX_ITER` 40",
            "  - C: nothing",
        ]
        write_report(results[:2], tmp_path, "")
        assert "differs" not in (tmp_path / "comparison.md").read_text()

    def test_curve_has_a_colour_for_each_config(self, tmp_path):
        curve = [[10, None], [20, 20.0], [30, 30.0]]  # the first AP has no value
        write_report([make_result("A", 1, 20.0), make_result("B", 1, 30.0, curve=curve)], tmp_path, "")
        picture = cv2.imread(str(tmp_path / "comparison.png"))[..., ::-1]
        for colour in ([31, 119, 180], [255, 127, 14], [255, 255, 255]):  # tab10's first two, the ground
            assert (abs(picture.astype(int) - colour).max(axis=-1) < 3).sum() > 300
        assert (abs(picture.astype(int) - [44, 160, 44]).max(axis=-1) < 3).sum() == 0  # there is no third

    def test_an_eleventh_curve_is_dashed(self, tmp_path, monkeypatch):
        drawn, plot = [], Axes.plot

        def note(axes, *values, **style):
            drawn.append((style["color"], style["linestyle"]))
            return plot(axes, *values, **style)

        monkeypatch.setattr(Axes, "plot", note)
        write_report([make_result(f"config {index}", 1, 20.0) for index in range(12)], tmp_path, "")
        assert len(set(drawn)) == 12
        assert drawn[10] == (drawn[0][0], "--") and drawn[9][1] == "-"


def test_the_tool_trains_two_detectors_once(tmp_path):
    """For real, with two tiny models; then again, when nothing is left to train."""
    options = """--output out --opts SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 MODEL.DEVICE cpu
    DATASETS.TRAIN ('shapes_seed3_4',) DATASETS.TEST ('shapes_seed4_3',)
    MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 3"""
    configs = [str(QUICK / "deqdet_shapes.yaml"), str(QUICK / "rnn_sparse_rcnn_shapes.yaml")]
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), *configs, *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(tmp_path / "datasets")}

    def compare() -> dict:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert done.stdout.count("AP 0.0") == 2
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
