"""Several configs trained on the same data for the same budget, each in a folder of its own.

In a run's folder, run.json is written first and holds the settings with which the run was begun; result.json is written
last and marks it as done; minutes.json has the minutes of each start of the training. A comparison that was interrupted
goes on from there.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from ..checkpoints.files import write_text
from ..engine import build_model, check_processes, check_run, load_config
from ..errors import UserError
from ..model_zoo import find_config
from .comparison_settings import (
    OWN_KEYS,
    carry_over,
    check_budgets,
    parse_training,
    prepare_defaults,
    prepare_settings,
)
from .metrics_file import read_lines
from .timing import Measurement, describe_machine
from .training_process import run_training

EVALUATIONS = 6  # of a training, if no period is given


@dataclass(frozen=True)
class Run:
    """One config with one seed, to be trained in a folder."""

    name: str  # that of the config file, without .yaml
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # those of tools/train_net.py
    settings: dict[str, object]  # as prepare_settings returns them, and num_gpus

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def weights(self) -> Path:
        """The checkpoint after the last iteration, which exists once the training is done."""
        return self.folder / "model_final.pth"

    @property
    def log(self) -> Path:
        """The file that gets all that the training and the measurement print."""
        return self.folder / "log"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    @property
    def minutes_file(self) -> Path:
        """The file in which the minutes of each start of the training are noted."""
        return self.folder / "minutes.json"


@dataclass(frozen=True)
class Metrics:
    """Figures of a finished training. One is None where it has no value, such as APs on a set without small objects."""

    AP: float | None  # after the last iteration, as are the next two
    AP50: float | None
    APs: float | None
    curve: list[list]  # [iterations done, AP] of every evaluation, in order
    seconds_per_iteration: float | None  # median; None if too few iterations were timed
    training_memory_mb: float | None  # the most that deqdet.engine.hooks.PeakMemory saw


@dataclass(frozen=True)
class Result:
    """Settings and figures of a finished run."""

    name: str
    seed: int
    settings: dict[str, object]
    metrics: Metrics
    measurement: Measurement
    machine: str
    minutes: float | None  # of all starts of the training, evaluations included; None if one of them is not known


def prepare_runs(
    config_files: Sequence[str],
    output: Path,
    *,
    seeds: Sequence[int],
    num_gpus: int,
    overrides: Sequence[str],
    eval_period: int | None = None,
    scale: str | None = None,
    plugins: Sequence[str] = (),
) -> list[Run]:
    """List every config with the first seed, then with the next. All are checked before any is trained.

    Args:
        config_files: files or names of the model zoo; with a `scale`, rows of an ablation.
        output: the folder that gets a folder for each run.
        overrides: KEY VALUE pairs, the same for all configs; with a `scale`, put on that one first.
        eval_period: iterations between two points of the curve; a sixth of SOLVER.MAX_ITER if None.
        scale: a config on which the rows' changes are put, see `carry_over`.
        plugins: modules of the user's own to import first.

    Raises:
        UserError: a seed is negative or given twice, a config is wrong or has another budget than the first, two have
            the same name, a row cannot be put on `scale`, or a run was begun with other settings.
    """
    _check_seeds(seeds)
    files = {Path(file).stem: file for file in map(find_config, config_files)}
    if len(files) < len(config_files):
        raise UserError("two config files have the same name, which is that of a run's folder: rename one")
    for key in overrides[::2]:
        if key in OWN_KEYS:
            raise UserError(f"{key} cannot be overridden here: use {OWN_KEYS[key]}")
    imports = [word for name in plugins for word in ("--plugin", name)]
    arguments = _arguments(files, scale, (*imports, "--num-gpus", str(num_gpus), "--resume", *overrides))
    configs = {name: _prepare_named(name, mine) for name, mine in arguments.items()}
    check_budgets(configs)
    if eval_period is None:
        eval_period = max(1, round(next(iter(configs.values()))["SOLVER.MAX_ITER"] / EVALUATIONS))
    runs = []
    for seed in seeds:
        for name, mine in arguments.items():
            folder = output / f"{name}-seed{seed}"
            own = ("OUTPUT_DIR", str(folder), "SEED", str(seed), "TEST.EVAL_PERIOD", str(eval_period))
            settings = {**prepare_settings((*mine, *own)), "num_gpus": num_gpus}
            runs.append(Run(name, seed, folder, (*mine, *own), settings))
    for run in runs:
        check_record(run)
    check_trainings([run for run in runs if not run.result_file.is_file()])
    return runs


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if seed < 0:
            raise UserError(f"--seeds {seed}: a negative seed stands for a random one: give numbers from 0 on")
        if seeds.count(seed) > 1:
            raise UserError(f"--seeds has {seed} twice: give each seed once")


def name_seeds(seeds: Sequence[int]) -> str:
    """Several seeds as words: "seed 1" or "seeds 1, 2"."""
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


def _prepare_named(name: str, arguments: Sequence[str]) -> dict[str, object]:
    """The settings of one config, whose errors begin with its name."""
    try:
        return prepare_settings(arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _arguments(files: dict[str, str], scale: str | None, common: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The arguments of tools/train_net.py, by the names of the config files."""
    if scale is None:
        return {name: ("--config-file", file, *common) for name, file in files.items()}
    base = ("--config-file", find_config(scale), *common)
    settings = prepare_settings(base)
    return {name: (*base, *carry_over(file, scale, settings)) for name, file in files.items()}


def check_trainings(runs: Sequence[Run]) -> None:
    """Check that runs which are still to be trained can be.

    Raises:
        UserError: the data or the weights of one are not there or do not fit, or its model cannot be built.
    """
    built = set()
    for run in runs:
        args = parse_training(run.arguments)
        check_processes(args)
        cfg = load_config(args)
        check_run(cfg, args)
        cfg.MODEL.DEVICE = "cpu"
        try:
            if run.name not in built:  # the seeds make no difference
                build_model(cfg)
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error
        built.add(run.name)


def check_record(run: Run) -> None:
    """Check that a run which was begun earlier has still the same settings. A key that is newer had its default then.

    Raises:
        UserError: it has others now.
    """
    record = run.folder / "run.json"
    if not record.is_file():
        return
    begun, defaults = json.loads(record.read_text()), prepare_defaults()
    for key in sorted(begun.keys() | run.settings.keys()):
        was, now = begun.get(key, defaults.get(key)), run.settings.get(key)
        if was != now:
            raise UserError(
                f"{run.folder} was started with {key} {was}, which is now {now}: "
                "choose another --output, or delete that folder to train it again"
            )


def complete(run: Run, train: Sequence[str], measure: Callable[[Run], Measurement]) -> Result:
    """Train a run, or what is left of it, and measure the model. The result of a finished run is only read.

    Args:
        train: the command to which the run's arguments are added. Its output goes to the run's file "log".
        measure: called when the training is done.

    Raises:
        UserError: the command failed, or left no model or no final AP.
        Interrupted: as `run_training`.
    """
    if run.result_file.is_file():
        known = json.loads(run.result_file.read_text())
        parts = {"metrics": Metrics(**known["metrics"]), "measurement": Measurement.from_dict(known["measurement"])}
        if not run.minutes_file.is_file():  # an earlier version noted the minutes of the last start only
            parts["minutes"] = None
        return Result(**{**known, **parts, "name": run.name})  # config and folder may have been renamed
    run.folder.mkdir(parents=True, exist_ok=True)
    _write(run.folder / "run.json", run.settings)
    metrics = _trained_metrics(run)
    if metrics is None:
        with _timed_start(run):
            code = run_training([*train, *run.arguments], run.log)
        metrics = _trained_metrics(run)
        if code or metrics is None:
            fault = f"failed with exit code {code}" if code else "left no model or no final AP"
            raise UserError(f"the training of {run.label} {fault}: see {run.log}")
    result = Result(run.name, run.seed, run.settings, metrics, measure(run), describe_machine(), _sum_minutes(run))
    _write(run.result_file, asdict(result))
    return result


@contextmanager
def _timed_start(run: Run) -> Iterator[None]:
    """Note in the run's minutes.json how long one start of the training takes, also if it is interrupted.

    The file is a list with a number for each start, which is null until the start has ended. A start of which the file
    knows nothing, because an earlier version or deqdet-train made it, is null too.
    """
    begun = (run.folder / "metrics.json").is_file()
    earlier = json.loads(run.minutes_file.read_text()) if run.minutes_file.is_file() else [None] * begun
    _write(run.minutes_file, [*earlier, None])
    start = time.monotonic()
    try:
        yield
    finally:
        _write(run.minutes_file, [*earlier, (time.monotonic() - start) / 60])


def _sum_minutes(run: Run) -> float | None:
    minutes = json.loads(run.minutes_file.read_text()) if run.minutes_file.is_file() else [None]
    return None if None in minutes else sum(minutes)


def find_unlisted(runs: Sequence[Run], output: Path) -> dict[str, list[int]]:
    """The seeds of finished runs in the folder `output` that are not among `runs`, by the names of their configs."""
    listed, found = {run.folder.name for run in runs}, {}
    for file in sorted(output.glob("*-seed*/result.json")):
        name, _, seed = file.parent.name.rpartition("-seed")
        if file.parent.name not in listed and seed.isdigit():
            found.setdefault(name, []).append(int(seed))
    return {name: sorted(seeds) for name, seeds in found.items()}


def _trained_metrics(run: Run) -> Metrics | None:
    """The figures of the run's training; None while it is not done."""
    if not run.weights.is_file():
        return None
    return read_metrics(run.folder / "metrics.json", run.settings["SOLVER.MAX_ITER"])


def read_metrics(path: Path, max_iter: int) -> Metrics | None:
    """Read a training's metrics.json; None if the evaluation after iteration `max_iter` is not there yet."""
    lines = read_lines(path) if path.is_file() else []
    # detectron2 counts iterations from 0, but gives the last evaluation the number of all of them.
    evaluations = {min(line["iteration"] + 1, max_iter): line for line in lines if "bbox/AP" in line}
    if max_iter not in evaluations:
        return None
    last = evaluations[max_iter]
    times = [line["time"] for line in lines if "time" in line]
    return Metrics(
        **{name: _number(last[f"bbox/{name}"]) for name in ("AP", "AP50", "APs")},
        curve=[[iteration, _number(evaluations[iteration]["bbox/AP"])] for iteration in sorted(evaluations)],
        seconds_per_iteration=median(times) if times else None,
        training_memory_mb=max((line["peak_memory_mb"] for line in lines if "peak_memory_mb" in line), default=None),
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(path: Path, content: dict | list) -> None:
    write_text(json.dumps(content, indent=1, allow_nan=False), path)
