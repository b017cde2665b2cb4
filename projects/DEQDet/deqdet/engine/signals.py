"""SIGTERM and Ctrl-C in a training: finish the iteration, save a checkpoint, and end. Other commands end at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from detectron2.engine import HookBase
from detectron2.utils import comm

from .hooks import average_batch_norm
from .resume import batch_norm_statistics

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTIONS = (*SIGNALS, signal.SIGHUP)  # of a command that trains in processes of its own
# A signal to a whole process group reaches a rank twice, since the launcher hands it on too.
ONE_SIGNAL = 0.3  # seconds
CONFIRMATION = "the training ends with a checkpoint after this iteration or evaluation; a second signal ends it at once"

AT_ONCE = "stopped at once by a second signal: the last iterations are not saved"


class Interrupted(KeyboardInterrupt):
    """A signal has ended what this process did; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give INTERRUPTIONS to a handler within it, in the main thread. A SIGHUP that nohup has made ignored stays so."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        numbers = [n for n in INTERRUPTIONS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let INTERRUPTIONS raise Interrupted within it, so that cleaning up can be done; a second one exits at once."""
    first: float | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            raise Interrupted(number)
        if now - first > ONE_SIGNAL:
            os._exit(128 + number)

    with handled_by(interrupt):
        yield


class Stopped(SystemExit):
    """The training was stopped by a signal, and its state is saved; the exit code is 128 + the signal's number."""


class StopOnSignal(HookBase):
    """Ends the training after the iteration in which a signal arrives, on any rank, with a checkpoint.

    The first signal is confirmed by a line on stderr, since an evaluation may take minutes to end. A second signal ends
    the process at once. Register the hook last, on every rank: the checkpoint then comes after everything that belongs
    to the iteration, and resuming from it gives what the uninterrupted training gives.

    Raises:
        Stopped: in `after_step`.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._time = 0.0
        self._before: dict[int, object] = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def after_step(self) -> None:
        number = _largest(self._signal)
        if not number:
            return
        trainer = self.trainer
        for name, model in trainer.models().items():
            mine = [x.detach().cpu().clone() for x in batch_norm_statistics(model)]
            trainer.rank_statistics[name] = comm.gather(mine)
            average_batch_norm(model)  # the weights in the file are a model to be used
        trainer.iteration_complete = True
        name = f"model_{trainer.iter:07d}"
        if trainer.iter + 1 == trainer.max_iter:
            name = "model_final"
        trainer.checkpointer.save(name, iteration=trainer.iter)
        if comm.is_main_process():
            path = os.path.join(trainer.checkpointer.save_dir, f"{name}.pth")
            what = f"stopped by {signal.Signals(number).name} after iteration {trainer.iter}"
            print(f"{what}: saved {path}; --resume continues from there", file=sys.stderr, flush=True)
        comm.synchronize()
        trainer.drop_data_loader()
        raise Stopped(128 + number)

    def after_train(self) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._time = number, now
            if comm.is_main_process():
                os.write(2, f"{signal.Signals(number).name}: {CONFIRMATION}\n".encode())
        elif now - self._time > ONE_SIGNAL:
            if comm.is_main_process():
                os.write(2, f"{AT_ONCE}\n".encode())
            os._exit(128 + number)


def _largest(value: int) -> int:
    """The largest of the ranks' values; a collective operation."""
    if comm.get_world_size() == 1:
        return value
    shared = torch.tensor([value], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())
