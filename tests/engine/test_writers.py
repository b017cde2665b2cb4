"""Weights & Biases and MLflow, with small modules in place of theirs."""

import json
import sys
from types import SimpleNamespace

import pytest

from deqdet.engine import UserError, run_folder

from helpers.engine_toy import IN_PROCESS
from helpers.short_training import train

pytestmark = IN_PROCESS
WORDS = "TEST.EVAL_PERIOD", 7, "SOLVER.MAX_ITER", 45, "SOLVER.CHECKPOINT_PERIOD", 10
EVALUATED = [(i, 100.0 + i) for i in (6, 13, 20, 27, 34, 41, 45)]


def by_iteration(iteration: int) -> float:
    return 100.0 + iteration


class FakeWandb:
    """What the package wandb does, as far as a training needs it; a run keeps what is logged under its id."""

    def __init__(self):
        self.calls, self.axes, self.logged, self.finished, self.error = [], [], {}, [], None

    def init(self, **options):
        if self.error:
            raise self.error
        self.calls.append(options)
        self.id = options["id"] or f"run{len(self.calls)}"
        self.logged.setdefault(self.id, [])
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, figures):
        if self.error:
            raise self.error
        self.logged[self.id].append(figures)

    def finish(self):
        self.finished.append(self.id)


class FakeMlflow:
    """The same of mlflow; a client of another folder would not know the runs of this one."""

    def __init__(self):
        self.uris, self.runs, self.status = [], {}, {}
        self.entities = SimpleNamespace(Metric=lambda *values: values)

    def MlflowClient(self, tracking_uri):
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=7) if self.runs else None

    def create_experiment(self, name):
        return 7

    def create_run(self, experiment, run_name):
        assert experiment == 7
        run = f"{run_name}-{len(self.runs)}"
        self.runs[run], self.status[run] = {"params": {}, "metrics": []}, "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_param(self, run, key, value):
        assert isinstance(value, str) and len(value) <= 500 and key not in self.runs[run]["params"]
        self.runs[run]["params"][key] = value

    def log_batch(self, run, metrics):
        assert len(metrics) <= 1000 and self.status[run] == "RUNNING"
        for name, _, _, _ in metrics:
            assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. /"), name
        self.runs[run]["metrics"] += metrics

    def update_run(self, run, status):
        self.status[run] = status

    def set_terminated(self, run):
        self.status[run] = "FINISHED"


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")  # undone afterwards
    return fake


def test_weights_and_biases_gets_every_figure(toy_config, tmp_path, wandb):
    train(toy_config, *WORDS, "WRITERS", "['wandb']", ap=by_iteration)
    (call,) = wandb.calls
    assert (call["project"], call["name"], call["dir"]) == ("deqdet", "out", str(tmp_path / "out"))
    assert call["config"]["SOLVER.MAX_ITER"] == 45 and call["config"]["MODEL.META_ARCHITECTURE"] == "EngineToy"
    assert ("*", "iteration") in wandb.axes and wandb.finished == ["run1"]
    lines = wandb.logged["run1"]
    assert [(x["iteration"], x["bbox/AP"]) for x in lines if "bbox/AP" in x] == EVALUATED
    on_disk = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    sent, written = ([x["total_loss"] for x in found if "total_loss" in x] for found in (lines, on_disk))
    assert sent == written
    assert json.loads((tmp_path / "out/runs.json").read_text()) == {"wandb": "run1"}


def test_mlflow_gets_every_figure(toy_config, tmp_path, mlflow):
    train(toy_config, *WORDS, "WRITERS", "['mlflow']", ap=by_iteration)
    assert mlflow.uris == [(tmp_path / "out/mlruns").as_uri()]
    ((name, run),) = mlflow.runs.items()
    assert name == "out-0" and run["params"]["SOLVER.MAX_ITER"] == "45" and mlflow.status[name] == "FINISHED"
    assert [(step, value) for key, value, _, step in run["metrics"] if key == "bbox/AP"] == EVALUATED


def test_a_resumed_training_goes_on_with_its_runs(toy_config, tmp_path, wandb, mlflow):
    words = *WORDS, "WRITERS", "['wandb','mlflow']"
    train(toy_config, *words, ap=by_iteration, fail_at=25)
    train(toy_config, "--resume", *words, ap=by_iteration)
    assert [call["id"] for call in wandb.calls] == [None, "run1"] and wandb.calls[1]["resume"] == "allow"
    assert list(mlflow.runs) == ["out-0"] and mlflow.status == {"out-0": "FINISHED"}
    found = [(x["iteration"], x["bbox/AP"]) for x in wandb.logged["run1"] if "bbox/AP" in x]
    # Iteration 20 came after the checkpoint, and is sent again, since nothing can be taken back there.
    assert found == [*EVALUATED[:3], *EVALUATED[2:]]
    # A new training in the folder is a new run.
    train(toy_config, "--overwrite", *words, ap=by_iteration)
    assert wandb.calls[2]["id"] is None and list(mlflow.runs) == ["out-0", "out-1"]


def test_a_server_and_a_project_of_ones_own(toy_config, wandb, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    monkeypatch.setenv("WANDB_PROJECT", "cards")
    train(toy_config, "WRITERS", "['wandb','mlflow']")
    assert mlflow.uris == ["http://server:5000"] and wandb.calls[0]["project"] == "cards"


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_names_its_extra(toy_config, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    message = (
        rf"^WRITERS has {name}, which is not installed: pip install {package}, or install deqdet with its extra "
        rf"\[{name}\], or leave it out of WRITERS$"
    )
    with pytest.raises(UserError, match=message):
        train(toy_config, "WRITERS", f"['{name}']")


def test_a_service_that_refuses_is_one_line_before_the_first_iteration(toy_config, tmp_path, wandb):
    wandb.error = RuntimeError("No API key\nconfigured")
    with pytest.raises(UserError, match=r"wandb, which cannot start \(No API key configured\): log in with .*offline$"):
        train(toy_config, "WRITERS", "['wandb']")
    assert not list(tmp_path.glob("out/model_*"))


def test_a_service_that_fails_later_ends_nothing(toy_config, tmp_path, wandb, capsys):
    def fail(iteration: int) -> float:
        wandb.error = ConnectionError("gone")
        return 1.0

    train(toy_config, *WORDS, "WRITERS", "['wandb']", ap=fail)
    assert "wandb: gone" in capsys.readouterr().out
    assert (tmp_path / "out/model_final.safetensors").is_file()


def test_a_damaged_record_of_the_runs_begins_new_ones(toy_config, tmp_path, wandb):
    words = *WORDS, "WRITERS", "['wandb']"
    train(toy_config, *words, ap=by_iteration, fail_at=12)
    for content in ("", "[1]", '{"wandb": 3}'):
        (tmp_path / "out/runs.json").write_text(content)
        train(toy_config, "--resume", *words, ap=by_iteration, fail_at=13)
        assert wandb.calls[-1]["id"] is None


def test_a_run_is_part_of_the_results(tmp_path):
    (tmp_path / "runs.json").touch()
    assert run_folder.find_results(tmp_path) == [tmp_path / "runs.json"]
