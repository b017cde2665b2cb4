"""Where the metrics of a training go: metrics.json, TensorBoard, and on request Weights & Biases and MLflow."""

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

import yaml

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter, get_event_storage

from ..checkpoints.files import write_text
from ..errors import UserError, one_line
from ..extras import how_to_install
from ..model_zoo import flatten
from .resume import WINDOW

logger = logging.getLogger(__name__)

WRITERS = ("wandb", "mlflow")  # the key WRITERS
RUNS = "runs.json"  # the file in OUTPUT_DIR with the names of the runs there, by which a resumed training finds them
PROJECT = "deqdet"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise


class EvaluationsWriter(hooks.PeriodicWriter):
    """detectron2's PeriodicWriter, which writes after every evaluation too.

    The event storage hands out the latest value of each metric alone, so that an evaluation between two writes would be
    lost when the next one comes. Register it after everything that evaluates.
    """

    def __init__(self, writers: list[EventWriter], eval_period: int, period: int = 20):
        """
        Args:
            eval_period: of the evaluations, in iterations; 0: there are none but the last.
            period: of all other writes, in iterations.
        """
        super().__init__(writers, period)
        self._eval_period = eval_period

    def after_step(self) -> None:
        super().after_step()
        if self._eval_period > 0 and (self.trainer.iter + 1) % self._eval_period == 0:
            for writer in self._writers:
                if not isinstance(writer, CommonMetricPrinter):  # which prints no evaluation
                    writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            if isinstance(writer, CommonMetricPrinter):
                writer._max_iter = self.trainer.max_iter  # where it is silent; an EarlyStop has lowered it
        super().after_train()

    def start(self, last_write: int, *, resumed: bool) -> None:
        """Tell the writers that a training begins, or goes on.

        Args:
            last_write: the last iteration whose figures a resumed training has written already; -1 if there is none.
        """
        for writer in self._writers:
            if isinstance(writer, ResumableTensorboardWriter | RunWriter):
                writer.start(last_write, resumed=resumed)


class ResumableTensorboardWriter(TensorboardXWriter):
    """detectron2's writer for TensorBoard, which lets TensorBoard forget what a resumed training writes anew."""

    def start(self, last_write: int, *, resumed: bool) -> None:
        """See EvaluationsWriter."""
        if resumed:
            self._last_write = last_write
            self._writer_args["purge_step"] = last_write + 1


class RunWriter(EventWriter):
    """A writer into a run of some service; a resumed training goes on with the run that it had."""

    name = ""  # as in WRITERS

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: of the training; the run's name is that of OUTPUT_DIR, and its files are in there.

        Raises:
            UserError: the package is not installed.
        """
        self._package = _import(self.name)
        self._folder = Path(cfg.OUTPUT_DIR)
        self._config = {
            key: value for key, value in flatten(yaml.safe_load(cfg.dump())) if not isinstance(value, dict)
        }
        self._last_write = -1
        self._started = False

    def start(self, last_write: int, *, resumed: bool) -> None:
        """Begin a run, or go on with the one that is named in OUTPUT_DIR.

        Args:
            last_write: see EvaluationsWriter.

        Raises:
            UserError: the service cannot be reached or refuses.
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
        """Send the figures that are new; an error is logged and ends nothing, since metrics.json has them too."""
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
        """What to do if the service cannot be reached."""

    @abstractmethod
    def _start(self, run: str | None) -> str:
        """Begin a run, or go on with `run`; returns its identifier."""

    @abstractmethod
    def _send(self, figures: dict[str, float], iteration: int) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


class WandbWriter(RunWriter):
    """Writes into Weights & Biases; with WANDB_MODE=offline into OUTPUT_DIR/wandb, which `wandb sync` uploads later."""

    name = "wandb"
    _advice = "log in by `wandb login`, or set WANDB_MODE=offline"

    def _start(self, run: str | None) -> str:
        self._run = self._package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._folder.resolve().name,
            dir=str(self._folder),
            config=self._config,
            id=run,
            resume="allow",
        )
        # The x-axis is the iteration. The service's own steps could not go back after a kill.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def _send(self, figures: dict[str, float], iteration: int) -> None:
        self._run.log({**figures, "iteration": iteration})

    def _end(self) -> None:
        self._run.finish()


class MLflowWriter(RunWriter):
    """Writes into MLflow: the server of MLFLOW_TRACKING_URI, else files in OUTPUT_DIR/mlruns."""

    name = "mlflow"
    _advice = "see that the server of MLFLOW_TRACKING_URI runs, or unset that variable to write into OUTPUT_DIR"

    def _start(self, run: str | None) -> str:
        folder = self._folder.resolve()
        # Releases from 3 on want a database, for which the small package mlflow-skinny lacks the means.
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
    """A name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"WRITERS has {name}, which is not installed: {how_to_install(name)}, or leave it out of WRITERS"
        ) from error


def _read_runs(path: Path) -> dict[str, str]:
    """What the file RUNS holds; nothing if it is missing or damaged."""
    try:
        runs = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in runs.items() if isinstance(value, str)} if isinstance(runs, dict) else {}


def build_run_writers(cfg: CfgNode) -> list[RunWriter]:
    """The writers that WRITERS names.

    Raises:
        UserError: a package is not installed.
    """
    classes = {writer.name: writer for writer in (WandbWriter, MLflowWriter)}
    return [classes[name](cfg) for name in cfg.WRITERS]
