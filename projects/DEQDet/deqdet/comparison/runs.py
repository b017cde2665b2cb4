"""The trainings of a comparison: what each one runs, whether it may, whether it is done.

Each lives in a folder of its own. run.json, written first, holds the settings it was begun with; result.json,
written last, marks it as done.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..engine import argument_parser, build_model, load_config
from ..engine.configuration import check_run
from ..errors import UserError
from .measurement import Measurement, describe_machine
from .metrics import Metrics, read_metrics
from .settings import OWN_KEYS, carry_over, check_budgets, prepare_defaults, prepare_settings

EVALUATIONS = 6  # of a training, if no period is given


@dataclass(frozen=True)
class Run:
    """One config with one seed, to be trained in a folder."""

    name: str  # of the config file, without .yaml
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of tools/train_net.py
    settings: dict[str, object]  # as prepare_settings returns them, and num_gpus

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def weights(self) -> Path:
        """Those after the last iteration, once there."""
        return self.folder / "model_final.pth"

    @property
    def log(self) -> Path:
        """All that the training and the measurement print."""
        return self.folder / "log"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    name: str
    seed: int
    settings: dict[str, object]
    metrics: Metrics
    measurement: Measurement
    machine: str
    minutes: float  # that the last start of the training took, evaluations included


def prepare_runs(
    config_files: Sequence[str],
    output: Path,
    *,
    seeds: Sequence[int],
    num_gpus: int,
    overrides: Sequence[str],
    eval_period: int | None = None,
    scale: str | None = None,
) -> list[Run]:
    """Every config with the first seed, then with the next; all are checked before any is trained.

    Args:
        config_files: with a `scale`, rows of an ablation.
        output: the folder that gets a folder for each run.
        overrides: KEY VALUE pairs, the same for all configs; with a `scale`, put on that one first.
        eval_period: iterations between two points of the curve; a sixth of SOLVER.MAX_ITER if None.
        scale: a config file on which the rows' changes are put, see `carry_over`.

    Raises:
        UserError: a config is wrong or has another budget than the first, two have the same name, a row cannot be
            put on `scale`, or a run was begun with other settings.
    """
    files = {Path(file).stem: file for file in config_files}
    if len(files) < len(config_files):
        raise UserError("two config files have the same name, which is that of a run's folder: rename one")
    for key in overrides[::2]:
        if key in OWN_KEYS:
            raise UserError(f"{key} cannot be overridden here: use {OWN_KEYS[key]}")
    common = ("--num-gpus", str(num_gpus), "--resume", *overrides)
    arguments = _arguments(files, scale, common)
    configs = {name: prepare_settings(mine) for name, mine in arguments.items()}
    check_budgets(configs)
    if eval_period is None:
        eval_period = max(1, round(next(iter(configs.values()))["SOLVER.MAX_ITER"] / EVALUATIONS))
    runs = []
    for seed in dict.fromkeys(seeds):
        for name, mine in arguments.items():
            folder = output / f"{name}-seed{seed}"
            own = ("OUTPUT_DIR", str(folder), "SEED", str(seed), "TEST.EVAL_PERIOD", str(eval_period))
            settings = {**prepare_settings((*mine, *own)), "num_gpus": num_gpus}
            runs.append(Run(name, seed, folder, (*mine, *own), settings))
    for run in runs:
        check_record(run)
    check_trainings([run for run in runs if not run.result_file.is_file()])
    return runs


def _arguments(files: dict[str, str], scale: str | None, common: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Those of tools/train_net.py by the names of the config files."""
    if scale is None:
        return {name: ("--config-file", file, *common) for name, file in files.items()}
    base = ("--config-file", scale, *common)
    settings = prepare_settings(base)
    return {name: (*base, *carry_over(file, scale, settings)) for name, file in files.items()}


def check_trainings(runs: Sequence[Run]) -> None:
    """
    Raises:
        UserError: the data or the weights of one are not there or do not fit, or its model cannot be built.
    """
    for run in runs:
        args = argument_parser().parse_args(run.arguments)
        check_run(load_config(args), args)
    for run in {run.name: run for run in runs}.values():
        cfg = load_config(argument_parser().parse_args(run.arguments))
        cfg.MODEL.DEVICE = "cpu"
        try:
            build_model(cfg)
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error


def check_record(run: Run) -> None:
    """
    Raises:
        UserError: the run was begun with other settings than it has now. A key that is newer had its default then.
    """
    record = run.folder / "run.json"
    if not record.is_file():
        return
    begun, defaults = json.loads(record.read_text()), prepare_defaults()
    for key in sorted(begun.keys() | run.settings.keys()):
        was, now = begun.get(key, defaults.get(key)), run.settings.get(key)
        if was != now:
            raise UserError(
                f"{run.folder} was begun with {key} {was}, which is {now} now: "
                "choose another --output, or delete that folder to train it again"
            )


def complete(run: Run, train: Sequence[str], measure: Callable[[Run], Measurement]) -> Result:
    """Train a run, or what is left of it, and measure the model; a finished run's result is only read.

    Args:
        train: the command to which the run's arguments are added; its output goes to the run's file "log".
        measure: called when the training is done.

    Raises:
        UserError: the command failed, or left no model or no final AP.
    """
    if run.result_file.is_file():
        known = json.loads(run.result_file.read_text())
        parts = {"metrics": Metrics(**known["metrics"]), "measurement": Measurement(**known["measurement"])}
        return Result(**{**known, **parts, "name": run.name})  # config and folder may have been renamed
    run.folder.mkdir(parents=True, exist_ok=True)
    _write(run.folder / "run.json", run.settings)
    start = time.monotonic()
    metrics = _trained_metrics(run)
    if metrics is None:
        code = _execute([*train, *run.arguments], run.log)
        metrics = _trained_metrics(run)
        if code or metrics is None:
            fault = f"failed with exit code {code}" if code else "left no model or no final AP"
            raise UserError(f"the training of {run.label} {fault}: see {run.log}")
    minutes = (time.monotonic() - start) / 60
    result = Result(run.name, run.seed, run.settings, metrics, measure(run), describe_machine(), minutes)
    _write(run.result_file, asdict(result))
    return result


def _execute(command: Sequence[str], log: Path) -> int:
    """The exit code. If this process is interrupted meanwhile, the command ends too, with all that it has started."""
    with open(log, "a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _trained_metrics(run: Run) -> Metrics | None:
    """None while the training is not done."""
    if not run.weights.is_file():
        return None
    return read_metrics(run.folder / "metrics.json", run.settings["SOLVER.MAX_ITER"])


def _write(path: Path, content: dict) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False))
    os.replace(temporary, path)
