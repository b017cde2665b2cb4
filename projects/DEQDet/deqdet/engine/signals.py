"""SIGTERM and Ctrl-C in a training: finish the iteration, save a checkpoint, and end. Other commands end at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from detectron2.engine import HookBase
from detectron2.utils import comm

from .hooks import average_batch_norm
from .resume import batch_norm_statistics

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTIONS = (*SIGNALS, signal.SIGHUP)  # for commands that train in child processes
# A signal to a whole process group arrives at a rank twice, since the launcher forwards it too. Two signals within this
# time count as one.
ONE_SIGNAL = 0.3  # seconds
CONFIRMATION = "the training ends with a checkpoint after this iteration or evaluation; a second signal ends it at once"
AT_ONCE = "stopped at once by a second signal: the last iterations are not saved"


class Interrupted(KeyboardInterrupt):
    """A signal has interrupted this process; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class FirstAndSecond:
    """A signal handler that distinguishes a second signal from a repeated delivery of the first."""

    def __init__(self, first: Callable[[int], None], second: Callable[[int], None]):
        """
        Args:
            first: called with the number of the first signal.
            second: called with the number of each signal that arrives more than ONE_SIGNAL later.
        """
        self.number = 0  # of the first signal; 0 before it
        self._first, self._second = first, second
        self._time = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._time = number, now
            self._first(number)
        elif now - self._time > ONE_SIGNAL:
            self._second(number)


@contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[int] = INTERRUPTIONS
) -> Iterator[None]:
    """Install a handler for these signals in the block, if in the main thread; a SIGHUP ignored by nohup stays so."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
        numbers = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let INTERRUPTIONS raise Interrupted in the block, so that it can clean up; a second signal exits at once."""

    def interrupt(number: int) -> None:
        raise Interrupted(number)

    with handled_by(FirstAndSecond(interrupt, lambda number: os._exit(128 + number))):
        yield


class Stopped(SystemExit):
    """The training was stopped by a signal, and its state is saved; the exit code is 128 + the signal's number."""


class StopOnSignal(HookBase):
    """Ends the training after the iteration in which a signal arrives, on any rank, with a checkpoint.

    The first signal is confirmed by a line on stderr, since an evaluation may take minutes to end. A second signal ends
    the process at once. Register the hook last, on every rank: the checkpoint is then saved after all other work of the
    iteration, and resuming from it gives the same results as the uninterrupted training.

    Raises:
        Stopped: in `after_step`.
    """

    def __init__(self) -> None:
        self._handler = FirstAndSecond(_confirm, _exit_at_once)
        self._handled = ExitStack()

    def before_train(self) -> None:
        self._handled.enter_context(handled_by(self._handler, SIGNALS))

    def after_step(self) -> None:
        number = _largest(self._handler.number)
        if not number:
            return
        trainer = self.trainer
        for name, model in trainer.models().items():
            mine = [x.detach().cpu().clone() for x in batch_norm_statistics(model)]
            trainer.rank_statistics[name] = comm.gather(mine)
            average_batch_norm(model)  # so that the file alone is a usable model
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
        self._handled.close()  # restores the former handlers


def _confirm(number: int) -> None:
    if comm.is_main_process():
        os.write(2, f"{signal.Signals(number).name}: {CONFIRMATION}\n".encode())


def _exit_at_once(number: int) -> None:
    if comm.is_main_process():
        os.write(2, f"{AT_ONCE}\n".encode())
    os._exit(128 + number)


def _largest(value: int) -> int:
    """Return the maximum of the ranks' values; a collective operation."""
    if comm.get_world_size() == 1:
        return value
    shared = torch.tensor([value], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())
