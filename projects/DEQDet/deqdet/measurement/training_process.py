"""Run a training in a separate process, which saves a checkpoint and stops when this process gets a signal."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..engine.signals import AT_ONCE, CONFIRMATION, FirstAndSecond, Interrupted, handled_by


def run_training(command: Sequence[str], log: Path) -> int:
    """Run a training command, append its output to the file `log`, and return its exit code.

    The first SIGINT, SIGTERM or SIGHUP asks the training to stop; it saves a checkpoint after the current iteration or
    evaluation, and this function waits for it. A second signal kills all processes of the training.

    Raises:
        Interrupted: a signal arrived; no process of the training is left.
    """
    stop = _Stop()
    with handled_by(stop.handler):
        with open(log, "a") as output:
            # In its own session, the training gets Ctrl-C from this process only, not from the terminal.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            stop.attach(process)
            code = process.wait()
        except BaseException:
            _kill(process)
            process.wait()
            raise
        if number := stop.handler.number:
            _kill(process)  # child processes of the training may still be running
            raise Interrupted(number)
        return code


class _Stop:
    """Forwards the first signal to the training, and kills the training at the second one."""

    def __init__(self) -> None:
        self.handler = FirstAndSecond(self._ask_to_end, self._end_at_once)
        self._process: subprocess.Popen | None = None

    def attach(self, process: subprocess.Popen) -> None:
        self._process = process
        if self.handler.number:  # the signal arrived before the process was started
            process.send_signal(signal.SIGTERM)

    def _ask_to_end(self, number: int) -> None:
        _say(f"{signal.Signals(number).name}: {CONFIRMATION}")
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # its launcher forwards it to the other ranks

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
