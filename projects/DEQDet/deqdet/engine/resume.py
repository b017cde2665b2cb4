"""The state that a checkpoint stores besides weights, optimizer and schedule, so that resuming is exact.

Random numbers and the order of the data need no state: they follow from the seed and the iteration (see
`deqdet.data.randomness`). What remains is the smoothing window of the metrics, the lines of metrics.json, and, for a
checkpoint after a signal, the BatchNorm statistics of each rank.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter

from ..atomic import replacing
from ..checkpoints.files import CheckpointError, read_file
from ..config_keys import plain_values
from ..data import mix_seed, seed_all
from ..errors import UserError, one_line

logger = logging.getLogger(__name__)

WINDOW = 20  # iterations over which detectron2's writers smooth
# Metrics of the machine rather than the training, which differ between any two runs.
CLOCK_FIGURES = frozenset({"time", "data_time", "rank_data_time", "eta_seconds", "peak_memory_mb"})
# Keys whose values the optimizer's state in a checkpoint replaces.
KEPT_KEYS = (
    "SOLVER.BASE_LR", "SOLVER.LR_RULE", "SOLVER.REFERENCE_BATCH", "SOLVER.BIAS_LR_FACTOR", "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.DECODER_LR_MULTIPLIER",
    "SOLVER.DECODER_DECAY_MULTIPLIER", "SOLVER.BACKBONE_LR_MULTIPLIER", "SOLVER.BACKBONE_NORM_LR_MULTIPLIER",
    "SOLVER.BACKBONE_NORM_DECAY_MULTIPLIER", "MODEL.WEIGHTS",
)  # fmt: skip
# Keys that depend on the machine or on where the run is stored.
LOCAL_KEYS = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "VIS_PERIOD", "WRITERS")


class SeedIteration(HookBase):
    """Seeds all generators before each iteration, from the run's seed, the rank and the iteration.

    Register it first, on every rank. Random numbers then do not depend on earlier iterations or evaluations.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        seed_all(mix_seed(self.seed, comm.get_rank(), self.trainer.iter, 1))  # 1 separates it from the seeds of samples


class MetricsWriter(JSONWriter):
    """detectron2's writer of metrics.json, which can also truncate the file to its state at a checkpoint."""

    def __init__(self, path: Path):
        super().__init__(str(path), window_size=WINDOW)
        self._file_handle.close()  # reopened by `write`
        self._path = path

    def write(self) -> None:
        """Append the new metrics to the file, and sync it to the disk."""
        if self._file_handle.closed:
            self._file_handle = self._path.open("a")
        super().write()

    @property
    def last_write(self) -> int:
        """The last iteration in the file; -1 if there is none."""
        return int(self._last_write)

    def state_dict(self) -> dict[str, int]:
        """Return the number of lines in the file, and the last iteration among them."""
        lines = self._path.read_bytes().count(b"\n") if self._path.is_file() else 0  # --overwrite has deleted it
        return {"lines": lines, "last_write": self.last_write}

    def go_back(self, state: Mapping[str, int] | None, iteration: int) -> None:
        """Drop the lines that were written after a checkpoint, and any damaged lines.

        Args:
            state: the `state_dict` stored in the checkpoint; None for an older checkpoint.
            iteration: the first iteration of the resumed training; lines from it on are dropped.
        """
        self._file_handle.close()
        lines = self._path.read_text(errors="replace").splitlines(keepends=True)
        kept = lines[: state["lines"]] if state else lines
        kept = [line for line in kept if 0 <= _iteration(line) < iteration]
        if kept != lines:
            with replacing(self._path) as file:
                file.write("".join(kept).encode())
        self._last_write = state["last_write"] if state else max(map(_iteration, kept), default=-1)


def _iteration(line: str) -> int:
    """Return the iteration of a line of metrics.json; -1 if the line is damaged."""
    try:
        return int(json.loads(line)["iteration"]) if line.endswith("\n") else -1
    except (ValueError, TypeError, KeyError):
        return -1


def storage_state(storage: EventStorage) -> dict[str, dict]:
    """Return the recent values on which the smoothed metrics of the next iterations depend, by metric name."""
    hints = storage.smoothing_hints()
    return {
        name: {
            "recent": [[float(v), int(i)] for v, i in storage.history(name).values() if i > iteration - WINDOW],
            "latest": [float(value), int(iteration)],
            "smoothed": bool(hints[name]),
        }
        for name, (value, iteration) in storage.latest().items()
        if name not in CLOCK_FIGURES
    }


def restore_storage(storage: EventStorage, state: Mapping[str, Mapping]) -> None:
    """Put the metrics that `storage_state` returned into an event storage."""
    for name, metric in state.items():
        for value, iteration in metric["recent"]:
            storage.put_scalar(name, value, smoothing_hint=metric["smoothed"], cur_iter=iteration)


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """Return the BatchNorm statistics of a model that training changes, and their counters."""
    return [
        buffer
        for module in get_bn_modules(model)
        for buffer in (module.running_mean, module.running_var, module.num_batches_tracked)
        if buffer is not None
    ]


@torch.no_grad()
def restore_batch_norm(model: nn.Module, ranks: list[list[Tensor]]) -> None:
    """Restore this rank's own statistics; if the number of ranks has changed, all ranks keep the average."""
    if len(ranks) == comm.get_world_size():
        for buffer, value in zip(batch_norm_statistics(model), ranks[comm.get_rank()], strict=True):
            buffer.copy_(value)


def dump_config(cfg: CfgNode, saved: str | None = None) -> str:
    """Return the config as YAML, without LOCAL_KEYS.

    Args:
        cfg: the config of this run.
        saved: the result of this function in the checkpoint that was resumed, whose values of KEPT_KEYS stay in force.
    """
    plain = plain_values(cfg)
    before = yaml.safe_load(saved) if saved else {}
    plain |= {key: before[key] for key in KEPT_KEYS if key in before}
    return yaml.safe_dump({key: value for key, value in plain.items() if key not in LOCAL_KEYS})


def describe_changes(saved: str, cfg: CfgNode) -> str:
    """Describe in one line the keys that differ between a checkpoint's config and the new one; "" if none does.

    Args:
        saved: the checkpoint's config, as returned by `dump_config`.
        cfg: the new config.
    """
    old, new = yaml.safe_load(saved), yaml.safe_load(dump_config(cfg))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    kept = [f"{key} {old.get(key)} (not {new.get(key)})" for key in changed if key in KEPT_KEYS]
    taken = [f"{key} {new.get(key)} (was {old.get(key)})" for key in changed if key not in KEPT_KEYS]
    parts = [f"kept from the checkpoint: {', '.join(kept)}"] if kept else []
    parts += [f"changed by the new config: {', '.join(taken)}"] if taken else []
    if "SOLVER.IMS_PER_BATCH" in changed and old.get("SOLVER.LR_RULE", "none") != "none":
        parts.append("the learning rate stays scaled to the batch size of the checkpoint")
    return "; ".join(parts)


@contextmanager
def fitting_checkpoint(path: str) -> Iterator[None]:
    """Turn errors in the block, which loads the state of optimizer and schedule, into a UserError."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not fit this config ({one_line(error)}): resume with the config that it was trained with, "
            "or start anew with it as MODEL.WEIGHTS in another OUTPUT_DIR"
        ) from error


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint exists and can be read."""
    try:
        return os.path.isfile(path) and bool(read_file(path))
    except CheckpointError:
        return False
