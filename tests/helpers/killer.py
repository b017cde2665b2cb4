"""A plugin that ends a training, or one of its ranks, at a moment that the environment variable KILL names.

KILL is "<what>[:<rank>]", by default of rank 0, where <what> is
    SIGKILL@9, SIGTERM@9, SIGINT@9   the signal, at the beginning of iteration 9
    LAUNCHER-SIGTERM@9               the same, to the process that started the ranks
    STOP@9                           the rank freezes (SIGSTOP)
    SLEEP@9                          the rank lives, but does not go on; it prints "asleep"
    EVALUATION                       SIGKILL in the first evaluation
    HALF:<name>                      SIGKILL when half of the file <name> is written
    BEFORE:<name>, AFTER:<name>      SIGKILL right before or after the file <name> gets its name
    LINE@19                          SIGKILL when half of the lines from iteration 19 on is written to metrics.json
"""

import os
import signal
import time

from detectron2.utils import comm

from deqdet import atomic
from deqdet.engine import Trainer
from deqdet.engine.resume import MetricsWriter


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def at_iteration(action: str, iteration: int, rank: int) -> None:
    run_step = Trainer.run_step

    def run_and_act(self) -> None:
        if self.iter == iteration and comm.get_rank() == rank:
            if action == "SLEEP":
                print("asleep", flush=True)
                time.sleep(600)
            target = os.getppid() if action.startswith("LAUNCHER-") else os.getpid()
            os.kill(target, getattr(signal, {"STOP": "SIGSTOP"}.get(action, action.removeprefix("LAUNCHER-"))))
            time.sleep(0.2)  # for the launcher to hand it on
        run_step(self)

    Trainer.run_step = run_and_act


class KillingOs:
    """The module os for `deqdet.atomic`, whose writing of one file does not end."""

    def __init__(self, moment: str, name: str):
        self._moment = moment
        self._name = name

    def __getattr__(self, name: str):
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self._moment == "HALF" and f".{self._name}." in os.path.basename(path):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        os.fsync(descriptor)

    def replace(self, source, target) -> None:
        here = os.path.basename(target) == self._name
        if here and self._moment == "BEFORE":
            die()
        os.replace(source, target)
        if here and self._moment == "AFTER":
            die()


def in_metrics(iteration: int) -> None:
    write = MetricsWriter.write

    def write_half(self) -> None:
        before = self._path.stat().st_size
        write(self)
        after = self._path.stat().st_size
        if after > before and self._last_write >= iteration:
            os.truncate(self._path, (before + after) // 2)
            die()

    MetricsWriter.write = write_half


def prepare(kill: str) -> None:
    what, *rest = kill.split(":")
    if what in ("HALF", "BEFORE", "AFTER"):
        atomic.os = KillingOs(what, rest[0])
    elif what == "EVALUATION":
        Trainer.test = classmethod(lambda cls, cfg, model: die())
    elif what.startswith("LINE@"):
        in_metrics(int(what.split("@")[1]))
    else:
        action, iteration = what.split("@")
        at_iteration(action, int(iteration), int(rest[0]) if rest else 0)


if os.environ.get("KILL") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # not after a restart
    prepare(os.environ["KILL"])
