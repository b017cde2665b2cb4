"""A training in a process of its own, which a signal to this process stops with a checkpoint."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..engine.signals import AT_ONCE, CONFIRMATION, FirstAndSecond, Interrupted, handled_by


def run_training(command: Sequence[str], log: Path) -> int:
    """Run a training to its end, and return its exit code. All that it prints is added to the file `log`.

    The first SIGINT, SIGTERM or SIGHUP asks the training to end, which it does with a checkpoint after its current
    iteration or evaluation; this function waits for it. A second signal kills the training with all its processes.

    Raises:
        Interrupted: a signal came; no process of the training is left.
    """
    stop = _Stop()
    with handled_by(stop.handler):
        with open(log, "a") as output:
            # In a session of its own, Ctrl-C at a terminal reaches the training through this process only.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            stop.attach(process)
            code = process.wait()
        except BaseException:
            _kill(process)
            process.wait()
            raise
        if number := stop.handler.number:
            _kill(process)  # processes that the training has started may still be there
            raise Interrupted(number)
        return code


class _Stop:
    """Hands the first signal on to the training, and kills it at the second one."""

    def __init__(self) -> None:
        self.handler = FirstAndSecond(self._ask_to_end, self._end_at_once)
        self._process: subprocess.Popen | None = None

    def attach(self, process: subprocess.Popen) -> None:
        self._process = process
        if self.handler.number:  # the signal came before the process
            process.send_signal(signal.SIGTERM)

    def _ask_to_end(self, number: int) -> None:
        _say(f"{signal.Signals(number).name}: {CONFIRMATION}")
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # its launcher hands it on to the other ranks

    def _end_at_once(self, number: int) -> None:
        if self._process is not None:
            _say(AT_ONCE)
            _kill(self._process)


def _kill(process: subprocess.Popen) -> None:
    """Kill all processes of the session that `process` leads."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _say(line: str) -> None:
    with suppress(OSError):  # after SIGHUP there may be no terminal
        os.write(2, f"{line}\n".encode())
