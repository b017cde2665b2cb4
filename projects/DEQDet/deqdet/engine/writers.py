"""Writers of training metrics: metrics.json, TensorBoard, and on request Weights & Biases and MLflow."""

import importlib
import json
import logging
import os
import re
import time
from abc import abstractmethod
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter, get_event_storage

from ..atomic import write_text
from ..config_keys import plain_values
from ..errors import UserError, one_line
from ..extras import how_to_install
from .resume import WINDOW

logger = logging.getLogger(__name__)

WRITERS = ("wandb", "mlflow")  # the key WRITERS
RUNS = "runs.json"  # the file in OUTPUT_DIR with the services' run identifiers, which a resumed training needs
PROJECT = "deqdet"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set


class EvaluationsWriter(hooks.PeriodicWriter):
    """detectron2's PeriodicWriter, which also writes after every evaluation.

    The event storage returns only the latest value of each metric, so the results of an evaluation between two writes
    would be lost if another one followed. Register the hook after all hooks that evaluate.
    """

    def __init__(self, writers: list[EventWriter], eval_period: int, period: int = 20):
        """
        Args:
            writers: the writers to call.
            eval_period: iterations between evaluations; 0: there is only the last one.
            period: iterations between all other writes.
        """
        super().__init__(writers, period)
        self._eval_period = eval_period

    def after_step(self) -> None:
        super().after_step()
        if self._eval_period > 0 and (self.trainer.iter + 1) % self._eval_period == 0:
            for writer in self._writers:
                if not isinstance(writer, CommonMetricPrinter):  # it prints no evaluation results
                    writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            if isinstance(writer, CommonMetricPrinter):
                writer._max_iter = self.trainer.max_iter  # where it stops printing; EarlyStop may have lowered it
        super().after_train()

    def start(self, last_write: int, *, resumed: bool) -> None:
        """Tell the writers that a training starts or is resumed.

        Args:
            last_write: the last iteration that a resumed training has already written; -1 if there is none.
            resumed: the training is resumed.
        """
        for writer in self._writers:
            if isinstance(writer, ResumableTensorboardWriter | RunWriter):
                writer.start(last_write, resumed=resumed)


class ResumableTensorboardWriter(TensorboardXWriter):
    """detectron2's writer for TensorBoard, which makes TensorBoard drop the events that a resumed training repeats."""

    def start(self, last_write: int, *, resumed: bool) -> None:
        """Begin or resume a run; see `EvaluationsWriter.start`."""
        if resumed:
            self._last_write = last_write
            self._writer_args["purge_step"] = last_write + 1


class RunWriter(EventWriter):
    """A writer to a run in some tracking service; a resumed training continues its run there."""

    name = ""  # as in WRITERS

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: the training's config; the run is named after OUTPUT_DIR, and its local files are in there.

        Raises:
            UserError: the package is not installed.
        """
        self._package = _import(self.name)
        self._folder = Path(cfg.OUTPUT_DIR)
        self._config = plain_values(cfg)
        self._last_write = -1
        self._started = False

    def start(self, last_write: int, *, resumed: bool) -> None:
        """Begin a run, or continue the one that OUTPUT_DIR/runs.json names.

        Args:
            last_write, resumed: see `EvaluationsWriter.start`.

        Raises:
            UserError: the service cannot be reached, or refuses the run.
        """
        self._last_write = last_write
        path = self._folder / RUNS
        runs = _read_runs(path)
        try:
            run = self._start(runs.get(self.name) if resumed else None)
        except Exception as error:  # whatever the service's package raises
            what = f"WRITERS has {self.name}, which cannot start ({one_line(error)})"
            raise UserError(f"{what}: {self._advice}") from error
        self._started = True
        write_text(json.dumps({**runs, self.name: run}, indent=2), path)

    def write(self) -> None:
        """Send the new metrics; an error is only logged, since metrics.json has them too."""
        if not self._started:
            return
        figures = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if iteration > self._last_write:
                figures[iteration][name] = value
        for iteration in sorted(figures):
            self._try(self._send, figures[iteration], iteration)
        self._last_write = max(figures, default=self._last_write)

    def close(self) -> None:
        if self._started:
            self._try(self._end)

    def _try(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            logger.warning("%s: %s", self.name, one_line(error))

    @property
    @abstractmethod
    def _advice(self) -> str:
        """What the user can do if the service cannot be reached."""

    @abstractmethod
    def _start(self, run: str | None) -> str:
        """Begin a run, or continue `run`; return its identifier."""

    @abstractmethod
    def _send(self, figures: dict[str, float], iteration: int) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


class WandbWriter(RunWriter):
    """Writes to Weights & Biases; with WANDB_MODE=offline, to OUTPUT_DIR/wandb, which `wandb sync` uploads later."""

    name = "wandb"
    _advice = "log in with `wandb login`, or set WANDB_MODE=offline"

    def _start(self, run: str | None) -> str:
        self._run = self._package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._folder.resolve().name,
            dir=str(self._folder),
            config=self._config,
            id=run,
            resume="allow",
        )
        # Use the iteration as the x-axis: the service's own step counter cannot go back after a kill.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def _send(self, figures: dict[str, float], iteration: int) -> None:
        self._run.log({**figures, "iteration": iteration})

    def _end(self) -> None:
        self._run.finish()


class MLflowWriter(RunWriter):
    """Writes to MLflow: to the server of MLFLOW_TRACKING_URI, else to files in OUTPUT_DIR/mlruns."""

    name = "mlflow"
    _advice = "check that the server of MLFLOW_TRACKING_URI is running, or unset that variable to write to OUTPUT_DIR"

    def _start(self, run: str | None) -> str:
        folder = self._folder.resolve()
        # MLflow 3 and later default to a database, which the small package mlflow-skinny does not support.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").as_uri()
        self._client = self._package.MlflowClient(tracking_uri=uri)
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=folder.name).info.run_id
            for key, value in self._config.items():
                self._client.log_param(run, _allowed(key), str(value)[:500])
        else:
            self._client.update_run(run, status="RUNNING")
        self._run = run
        return run

    def _send(self, figures: dict[str, float], iteration: int) -> None:
        now, metric = int(1000 * time.time()), self._package.entities.Metric
        metrics = [metric(_allowed(name), value, now, iteration) for name, value in figures.items()]
        for first in range(0, len(metrics), 1000):  # the most that MLflow takes at once
            self._client.log_batch(self._run, metrics=metrics[first : first + 1000])

    def _end(self) -> None:
        self._client.set_terminated(self._run)


def _allowed(name: str) -> str:
    """Replace the characters of a name that MLflow does not allow."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"WRITERS has {name}, which is not installed: {how_to_install(name)}, or leave it out of WRITERS"
        ) from error


def _read_runs(path: Path) -> dict[str, str]:
    """Read the file RUNS; return an empty dict if it is missing or damaged."""
    try:
        runs = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in runs.items() if isinstance(value, str)} if isinstance(runs, dict) else {}


def build_run_writers(cfg: CfgNode) -> list[RunWriter]:
    """Build the writers that WRITERS names.

    Raises:
        UserError: a package is not installed.
    """
    classes = {writer.name: writer for writer in (WandbWriter, MLflowWriter)}
    return [classes[name](cfg) for name in cfg.WRITERS]
