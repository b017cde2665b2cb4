"""Train several configs on the same data with the same budget, each run in its own folder.

In the folder of a run, run.json is written first and holds the settings with which the run was started; result.json is
written last and marks the run as finished; minutes.json holds the duration of each start of the training. An
interrupted comparison resumes from these files.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from ..atomic import write_text
from ..engine import build_model, check_processes, check_run, load_config
from ..errors import UserError
from ..model_zoo import find_config
from .checkpoint_cost import Measurement
from .comparison_settings import (
    OWN_KEYS,
    carry_over,
    check_budgets,
    parse_training,
    prepare_defaults,
    prepare_settings,
)
from .json_numbers import finite_or_none
from .metrics_file import read_lines
from .timing import describe_machine
from .training_process import run_training

EVALUATIONS = 6  # per training run, if no period is given


@dataclass(frozen=True)
class Run:
    """One config with one seed, trained in its own folder."""

    name: str  # of the config file, without .yaml
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # for tools/train_net.py
    settings: dict[str, object]  # those of prepare_settings, and num_gpus

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def weights(self) -> Path:
        """The checkpoint of the last iteration, which exists once the training is finished."""
        return self.folder / "model_final.pth"

    @property
    def log(self) -> Path:
        """The file that receives the output of the training and of the measurement."""
        return self.folder / "log"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    @property
    def minutes_file(self) -> Path:
        """The file that holds the duration of each start of the training."""
        return self.folder / "minutes.json"


@dataclass(frozen=True)
class Metrics:
    """Results of a training run. A field is None if undefined, such as APs on a data set without small objects."""

    AP: float | None  # this and the next two: after the last iteration
    AP50: float | None
    APs: float | None
    curve: list[list]  # [iterations done, AP] of every evaluation, in order
    seconds_per_iteration: float | None  # median; None if too few iterations were timed
    training_memory_mb: float | None  # the maximum that deqdet.engine.hooks.PeakMemory reported


@dataclass(frozen=True)
class Result:
    """The settings and results of a finished run."""

    name: str
    seed: int
    settings: dict[str, object]
    metrics: Metrics
    measurement: Measurement
    machine: str
    minutes: float | None  # of all starts of the training, with evaluations; None if one of them is unknown


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
    """Check and list the runs: every config with the first seed, then every config with the next seed, and so on.

    Args:
        config_files: config files or names in the model zoo; with `scale`, rows of an ablation.
        output: the folder in which each run gets its own folder.
        overrides: KEY VALUE pairs that are applied to every config; with `scale`, to that config before the rows.
        eval_period: iterations between two points of the curve; None: a sixth of SOLVER.MAX_ITER.
        scale: a config to which the changes of the rows are applied, see `carry_over`.
        plugins: modules or .py files to import first.

    Raises:
        UserError: a seed is negative or given twice, a config is invalid or has a different budget than the first, two
            configs have the same name, a row cannot be applied to `scale`, a run was started with other settings, or a
            run cannot be trained (see `check_trainings`).
    """
    _check_seeds(seeds)
    files = {Path(file).stem: file for file in map(find_config, config_files)}
    if len(files) < len(config_files):
        raise UserError("two config files have the same name, but a run's folder is named after it: rename one")
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
            raise UserError(f"--seeds {seed}: a negative seed means a random one: give seeds of at least 0")
        if seeds.count(seed) > 1:
            raise UserError(f"--seeds has {seed} twice: give each seed once")


def name_seeds(seeds: Sequence[int]) -> str:
    """Format several seeds: "seed 1" or "seeds 1, 2"."""
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


def _prepare_named(name: str, arguments: Sequence[str]) -> dict[str, object]:
    """Return the settings of one config; error messages start with its name."""
    try:
        return prepare_settings(arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _arguments(files: dict[str, str], scale: str | None, common: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the arguments for tools/train_net.py, by config name."""
    if scale is None:
        return {name: ("--config-file", file, *common) for name, file in files.items()}
    base = ("--config-file", find_config(scale), *common)
    settings = prepare_settings(base)
    return {name: (*base, *carry_over(file, scale, settings)) for name, file in files.items()}


def check_trainings(runs: Sequence[Run]) -> None:
    """Check that runs can be trained.

    Raises:
        UserError: the data or the weights of a run are missing or do not fit, or its model cannot be built.
    """
    built = set()
    for run in runs:
        args = parse_training(run.arguments)
        check_processes(args)
        cfg = load_config(args)
        check_run(cfg, args)
        cfg.MODEL.DEVICE = "cpu"
        try:
            if run.name not in built:  # the model does not depend on the seed
                build_model(cfg)
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error
        built.add(run.name)


def check_record(run: Run) -> None:
    """Check that a run that was started earlier still has the same settings.

    Keys that did not exist then are taken to have had their default values.

    Raises:
        UserError: a setting has changed.
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
    """Train or resume a run, and measure the model. If the run is finished, only read its result.

    Args:
        train: the training command, to which the run's arguments are appended. Its output goes to the run's log file.
        measure: called after the training.

    Raises:
        UserError: the command failed, or left no model or no final AP.
        Interrupted: see `run_training`.
    """
    if run.result_file.is_file():
        known = json.loads(run.result_file.read_text())
        parts = {"metrics": Metrics(**known["metrics"]), "measurement": Measurement.from_dict(known["measurement"])}
        if not run.minutes_file.is_file():  # an earlier version recorded the last start only
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
    """Record the duration of one start of the training in the run's minutes.json, even if it is interrupted.

    The file is a list with one number per start. The number is null until the start has ended, and for an earlier start
    that was not recorded because it was made by an earlier version or by deqdet-train.
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
    """Find the finished runs in the folder `output` that are not among `runs`: their seeds by config name."""
    listed, found = {run.folder.name for run in runs}, {}
    for file in sorted(output.glob("*-seed*/result.json")):
        name, _, seed = file.parent.name.rpartition("-seed")
        if file.parent.name not in listed and seed.isdigit():
            found.setdefault(name, []).append(int(seed))
    return {name: sorted(seeds) for name, seeds in found.items()}


def _trained_metrics(run: Run) -> Metrics | None:
    """Read the results of the run's training; None if it is not finished."""
    if not run.weights.is_file():
        return None
    return read_metrics(run.folder / "metrics.json", run.settings["SOLVER.MAX_ITER"])


def read_metrics(path: Path, max_iter: int) -> Metrics | None:
    """Read a training's metrics.json; None if the evaluation after iteration `max_iter` is missing."""
    lines = read_lines(path) if path.is_file() else []
    # detectron2 numbers iterations from 0, but stores the last evaluation under the total number of iterations.
    evaluations = {min(line["iteration"] + 1, max_iter): line for line in lines if "bbox/AP" in line}
    if max_iter not in evaluations:
        return None
    last = evaluations[max_iter]
    times = [line["time"] for line in lines if "time" in line]
    return Metrics(
        **{name: finite_or_none(last[f"bbox/{name}"]) for name in ("AP", "AP50", "APs")},
        curve=[[iteration, finite_or_none(evaluations[iteration]["bbox/AP"])] for iteration in sorted(evaluations)],
        seconds_per_iteration=median(times) if times else None,
        training_memory_mb=max((line["peak_memory_mb"] for line in lines if "peak_memory_mb" in line), default=None),
    )


def _write(path: Path, content: dict | list) -> None:
    write_text(json.dumps(content, indent=1, allow_nan=False), path)
