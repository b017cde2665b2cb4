"""Hooks of the training loop: BatchNorm averaging, memory, checkpoints, progress and the model file."""

import json
import logging
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.hooks import RemovableHandle

from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..atomic import write_text
from ..checkpoints import Checkpointer, write_model_file
from ..checkpoints.files import read_file
from ..checkpoints.latest import delete_older
from ..checkpoints.publish import AVERAGE
from ..data import find_class_names
from ..errors import UserError, one_line
from .models import unwrap
from .ranks import AFTER_FORWARD, BEFORE_DATA, IN_FORWARD, OUTSIDE, mark

logger = logging.getLogger(__name__)


def is_due(trainer: TrainerBase, periods: Iterable[int]) -> bool:
    """Return whether the current iteration is the last one, or completes one of the periods (0: never)."""
    done = trainer.iter + 1
    return done == trainer.max_iter or any(period > 0 and done % period == 0 for period in periods)


class AverageBatchNorm(HookBase):
    """Averages BatchNorm's running statistics over the ranks, right before they are saved or used.

    Each rank keeps the statistics of its own share of the images, because detectron2's DDP does not broadcast buffers.
    But a checkpoint holds those of rank 0, while each rank evaluates part of the images. Without this hook, the AP at
    the end of training would not be the AP of the checkpoint.

    Register it before the checkpointer and the evaluation, on every rank. It does nothing in `after_train`, although
    the last evaluation comes then: `after_step` has already averaged, and a collective operation after an error on one
    rank would hang the others.
    """

    def __init__(self, checkpoint_period: int, eval_period: int):
        """
        Args:
            checkpoint_period, eval_period: in iterations; with eval_period 0, there is only the last evaluation.
        """
        self._periods = checkpoint_period, eval_period

    def after_step(self) -> None:
        if is_due(self.trainer, self._periods):
            average_batch_norm(self.trainer.model)


@torch.no_grad()
def average_batch_norm(model: nn.Module) -> None:
    """Replace running means and variances by their averages over the ranks, in place. A collective operation.

    Fixed statistics (BatchNorm in eval mode, FrozenBatchNorm2d) are the same on all ranks and are left alone, since
    averaging would make them drift by rounding.
    """
    if comm.get_world_size() == 1:
        return
    statistics = [
        buffer
        for module in get_bn_modules(model)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None  # track_running_stats=False
    ]
    if not statistics:
        return
    flat = torch.cat(statistics)  # for a single collective operation
    dist.all_reduce(flat)
    flat /= comm.get_world_size()
    for buffer, average in zip(statistics, flat.split([len(b) for b in statistics]), strict=True):
        buffer.copy_(average)


class PeakMemory(HookBase):
    """Puts "peak_memory_mb", the peak memory of the training so far, into the event storage.

    With CUDA, this is the memory of tensors on this rank's GPU; on a CPU, the resident memory of rank 0's process,
    including libraries and data.
    """

    def __init__(self, period: int = 20):
        """
        Args:
            period: iterations between measurements, best the period of detectron2's writers.
        """
        self._period = period

    def after_step(self) -> None:
        if is_due(self.trainer, [self._period]):
            self.trainer.storage.put_scalar("peak_memory_mb", peak_memory_mb(), smoothing_hint=False)


def peak_memory_mb() -> float:
    """Return this process's peak memory in MiB: of tensors on the current GPU, or without CUDA its resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class BestCheckpointer(hooks.BestCheckpointer):
    """detectron2's BestCheckpointer, except that a resumed training remembers the best value so far.

    The value and iteration are stored in model_best.pth itself, so that a kill between writing two files cannot
    separate them from the weights. model_best.json repeats both for human readers.
    """

    def __init__(self, eval_period: int, checkpointer: "WeightsCheckpointer", val_metric: str):
        super().__init__(eval_period, checkpointer, val_metric, file_prefix="model_best")
        self._weights = Path(checkpointer.save_dir, "model_best.pth")
        self._record = self._weights.with_suffix(".json")

    def before_train(self) -> None:
        if self.trainer.start_iter == 0 or not (self._weights.exists() or self._record.exists()):
            return
        try:
            best = read_file(self._weights)
            record = best if "value" in best else json.loads(self._record.read_text())
            self.best_metric, self.best_iter = float(record["value"]), int(record["iteration"])
        except (UserError, OSError, ValueError, TypeError, KeyError) as error:
            what = one_line(error) if isinstance(error, UserError) else f"{self._record} is missing or damaged"
            logger.warning("%s: the next evaluation counts as the best so far", what)
        else:
            self._write_record()  # an earlier run may have been killed before writing it

    def after_step(self) -> None:
        known = self.best_metric
        super().after_step()
        self._save_record(known)

    def after_train(self) -> None:
        known = self.best_metric
        super().after_train()
        self._save_record(known)

    def _save_record(self, known: float | None) -> None:
        if self.best_metric != known:
            self._write_record()

    def _write_record(self) -> None:
        write_text(json.dumps({"value": self.best_metric, "iteration": self.best_iter}), self._record)


class WeightsCheckpointer(Checkpointer):
    """Saves the weights with the metric value they were chosen by; --resume does not continue from these files."""

    def __init__(self, model: nn.Module, save_dir: str, metric: str):
        """
        Args:
            metric: name in the event storage of the metric to save as "value".
        """
        super().__init__(model, save_dir)
        self._metric = metric

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the weights with the latest value of the metric; call it in training."""
        super().save(name, value=get_event_storage().latest()[self._metric][0], **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Do nothing: "last_checkpoint" must keep naming a checkpoint with the optimizer's state."""


class KeepNewest(HookBase):
    """Deletes older checkpoints once a newer one is complete (SOLVER.KEEP_CHECKPOINTS).

    It lists the files in the folder each time, so a resumed training also deletes checkpoints from before the
    interruption. Register it on the main process, right after the checkpointer.
    """

    def __init__(self, count: int, period: int, folder: str):
        """
        Args:
            count: number of checkpoints to keep; 0 keeps all.
            period: iterations between checkpoints.
            folder: OUTPUT_DIR.
        """
        self._count = count
        self._period = period
        self._folder = Path(folder)

    def after_step(self) -> None:
        if self._count > 0 and (self.trainer.iter + 1) % self._period == 0:
            delete_older(self._folder, self._count, self.trainer.iter)


class MarkProgress(HookBase):
    """Reports this rank's progress within an iteration to the launcher. Register it first, on every rank."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before_train(self) -> None:
        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(lambda module, inputs: self._mark(module, IN_FORWARD)),
            model.register_forward_hook(lambda module, inputs, outputs: self._mark(module, AFTER_FORWARD)),
        ]

    def before_step(self) -> None:
        mark(self.trainer.iter, BEFORE_DATA)

    def after_step(self) -> None:
        mark(self.trainer.iter, OUTSIDE)

    def after_train(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _mark(self, module: nn.Module, phase: float) -> None:
        if module.training:
            mark(self.trainer.iter, phase)


class ModelFileWriter(HookBase):
    """Writes the model file OUTPUT_DIR/model_final.safetensors after the last iteration (see `checkpoints.model_file`).

    Register it on the main process, after the hooks that change the weights.
    """

    def __init__(self, cfg: CfgNode, average: nn.Module | None = None):
        """
        Args:
            cfg: the training's config; it is stored in the file, with the class names of its data sets.
            average: the model with averaged weights; None writes the raw weights.
        """
        self._cfg = cfg
        self._average = average

    def after_train(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            return  # stopped by an error
        model = self.trainer.model if self._average is None else self._average
        model = unwrap(model)
        path = os.path.join(self._cfg.OUTPUT_DIR, "model_final.safetensors")
        write_model_file(
            path,
            weights=model.state_dict(),
            cfg=self._cfg,
            class_names=find_class_names(self._cfg),
            notes={"weights": "raw" if self._average is None else AVERAGE},
        )
        logger.info("The trained model in one file: %s", path)
