"""Rows of an ablation at another scale: what is carried over, and what is refused before any training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deqdet.errors import UserError
from deqdet.measurement.comparison import Run, prepare_runs
from deqdet.measurement.comparison_settings import carry_over, prepare_settings

from helpers.paths import ROOT

ABLATIONS, QUICK = ROOT / "configs" / "ablations", ROOT / "configs" / "quick"
SHAPES = QUICK / "deqdet_shapes.yaml"
NAMES = sorted(path.stem for path in ABLATIONS.glob("*.yaml"))
DATA = "DATASETS.TRAIN ('shapes_seed41_2',) DATASETS.TEST ('shapes_seed42_2',)".split()
SIZES = "CONTENT_SIZE", "POSITION_SIZE"
# What each row is at the scale of SHAPES, under MODEL.DEQDET: 25 pixels are 4 there.
CARRIED = {
    "default": {},
    "init_layer_none": {"EQUILIBRIUM.USE_INIT_LAYER": False},
    "init_layer_p32": {"ADAMIXER.NUM_POINTS_INIT": 32},
    "extra_supervision_0": {"EQUILIBRIUM.EXTRA_SUPERVISION": 0},
    "extra_supervision_1": {"EQUILIBRIUM.EXTRA_SUPERVISION": 1},
    "rag_1": {"EQUILIBRIUM.GRADIENT_STEPS": 1},
    "rag_3": {"EQUILIBRIUM.GRADIENT_STEPS": 3},
    "rag_4": {"EQUILIBRIUM.GRADIENT_STEPS": 4},
    "supervision_m4_c4": {"EQUILIBRIUM.SUPERVISION_INTERVAL": 4},
    "perturbation_zero_step": {"PERTURBATION.KIND": "zero-step"},
    "perturbation_one_step": {"PERTURBATION.KIND": "one-step"},
    "noise_none": {"PERTURBATION.KIND": "none"},
    "noise_position_25": {"PERTURBATION.CONTENT_SIZE": 0.0},
    "noise_position_50": {"PERTURBATION.CONTENT_SIZE": 0.0, "PERTURBATION.POSITION_SIZE": 8.0},
    "noise_content_0.1": {"PERTURBATION.POSITION_SIZE": 0.0},
    "noise_content_0.2": {"PERTURBATION.CONTENT_SIZE": 0.2, "PERTURBATION.POSITION_SIZE": 0.0},
    "noise_content_0.1_position_50": {"PERTURBATION.POSITION_SIZE": 8.0},
    "noise_content_0.2_position_25": {"PERTURBATION.CONTENT_SIZE": 0.2},
    "noise_content_0.2_position_50": {"PERTURBATION.CONTENT_SIZE": 0.2, "PERTURBATION.POSITION_SIZE": 8.0},
}
# Rows whose starting point SHAPES does not share: the key, there and in the default row.
REFUSED = {
    "supervision_m3_c3": ("SUPERVISION_COUNT", 1, 4),
    "supervision_m5_c3": ("SUPERVISION_COUNT", 1, 4),
    "train_steps_15": ("TRAIN_STEPS", 6, 20),
    "train_steps_25": ("TRAIN_STEPS", 6, 20),
}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(row, ..., opts="KEY VALUE ..."): their runs at the scale of SHAPES, on few generated images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))

    def prepare(*rows: str | Path, opts: str = "", scale: Path | None = SHAPES) -> list[Run]:
        files = [str(ABLATIONS / f"{row}.yaml" if isinstance(row, str) else row) for row in rows]
        options = {"seeds": [1], "num_gpus": 1, "scale": str(scale)}
        return prepare_runs(files, tmp_path / "out", overrides=[*DATA, *opts.split()], **options)

    return prepare


def differences(run: Run, base: dict) -> dict:
    """Between the settings of a run and others, without the runs' own."""
    own = ("num_gpus", "SEED", "TEST.EVAL_PERIOD")
    return {key: value for key, value in run.settings.items() if key not in own and value != base[key]}


def test_every_row_is_one_or_the_other():
    assert sorted(CARRIED.keys() | REFUSED.keys()) == NAMES and not CARRIED.keys() & REFUSED.keys()


def test_rows_are_put_on_the_scale(prepare):
    base = prepare_settings(["--config-file", str(SHAPES), *DATA])
    runs = prepare(*CARRIED)
    assert [run.name for run in runs] == list(CARRIED)
    for run in runs:
        assert differences(run, base) == {f"MODEL.DEQDET.{key}": value for key, value in CARRIED[run.name].items()}
        assert run.arguments[:2] == ("--config-file", str(SHAPES)) and run.folder.name == f"{run.name}-seed1"


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_start_elsewhere_are_refused(prepare, tmp_path, name):
    key, there, default = REFUSED[name]
    key = f"MODEL.DEQDET.EQUILIBRIUM.{key}"
    message = (
        rf"{name}.yaml changes {key} from {default} to \d+, but {key} is {there} in .*deqdet_shapes.yaml, "
        f"not {default}: leave that config out, or add {key} {default} at the end of the command$"
    )
    with pytest.raises(UserError, match=message):
        prepare("default", name)
    assert not (tmp_path / "out").exists()


def test_overrides_come_first_and_can_provide_the_start(prepare):
    paper = "MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS 20 MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT 4"
    default, *rows = prepare("default", *REFUSED, opts=paper)
    for run in rows:
        (changed,) = differences(run, default.settings).values()
        assert run.name in (f"supervision_m{changed}_c3", f"train_steps_{changed}")


def test_a_change_that_makes_no_model_is_refused(prepare):
    """C = 4, but T_train = 3: Omega would go beyond it."""
    steps = "MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS 3"
    assert len(prepare("default", opts=steps)) == 1
    message = r"^supervision_m4_c4: MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT is 1: times SUPERVISION_INTERVAL \(4\)"
    with pytest.raises(UserError, match=rf"{message} it must be at most TRAIN_STEPS \(3\)"):
        prepare("default", "supervision_m4_c4", opts=steps)


@pytest.mark.parametrize("row, opts, key, there", [
    ("noise_position_50", "MODEL.DEQDET.PERTURBATION.KIND none", "MODEL.DEQDET.PERTURBATION.KIND", "none"),
    ("noise_none", "MODEL.DEQDET.PERTURBATION.KIND zero-step", "MODEL.DEQDET.PERTURBATION.KIND", "zero-step"),
    ("rag_1", "MODEL.DEQDET.DECODER RecurrentDecoder", "MODEL.DEQDET.DECODER", "RecurrentDecoder"),
    ("init_layer_p32", "MODEL.DEQDET.REFINEMENT_LAYER SparseRCNNLayer", "MODEL.DEQDET.REFINEMENT_LAYER",
     "SparseRCNNLayer"),
])  # fmt: skip
def test_changes_without_effect_are_refused(prepare, row, opts, key, there):
    with pytest.raises(UserError, match=f"{row}.yaml changes .*, but {key} is {there} in "):
        prepare(row, opts=opts)


def test_a_row_of_a_row(prepare, tmp_path):
    """What counts is the difference from the default row beside it, not the file's own lines."""
    (tmp_path / "default.yaml").write_text(f'_BASE_: "{ABLATIONS / "noise_content_0.2.yaml"}"\n')
    (tmp_path / "row.yaml").write_text(f'_BASE_: "{ABLATIONS / "noise_content_0.2_position_50.yaml"}"\n')
    base = prepare_settings(["--config-file", str(SHAPES), *DATA])
    row = tmp_path / "row.yaml"
    with pytest.raises(UserError, match="POSITION_SIZE is 4.0 in .*, not 0.0"):  # 50 is no multiple of 0
        carry_over(str(row), "scale.yaml", base)
    base["MODEL.DEQDET.PERTURBATION.POSITION_SIZE"] = 0.0
    assert carry_over(str(row), "scale.yaml", base) == ["MODEL.DEQDET.PERTURBATION.POSITION_SIZE", "50.0"]


def test_a_row_without_a_default_row(prepare):
    with pytest.raises(UserError, match="--scale needs .*quick/default.yaml, the row that .*rnndet_shapes.yaml is"):
        prepare(QUICK / "rnndet_shapes.yaml")


def test_a_run_at_a_scale_is_recognised(prepare):
    (run,) = prepare("rag_1")
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(run.settings))
    assert prepare("rag_1") == [run]
    with pytest.raises(UserError, match="rag_1-seed1 was started with SOLVER.BASE_LR 0.001, which is now 0.002"):
        prepare("rag_1", opts="SOLVER.BASE_LR 0.002")


def test_the_tool(tmp_path):
    """It hands over what it is given: one line for a row that cannot be carried over."""
    options = ["--scale", str(SHAPES), "--output", "out", "--opts", *DATA]
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), str(ABLATIONS / "train_steps_15.yaml"), *options]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "datasets")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if "train_steps_15" in line)
    assert line.startswith("error: ") and "TRAIN_STEPS 20 at the end" in line
    assert "Traceback" not in done.stderr
