"""Signals to a process that trains in another one: the first asks the training to end, the second kills it."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from deqdet.engine.signals import AT_ONCE, CONFIRMATION, ONE_SIGNAL, Interrupted, handled_by, interruptible
from deqdet.measurement.training_process import run_training

from helpers.paths import ROOT

# Acts as a training: it and a process that it starts hold a lock; {stop} is its reaction to SIGTERM.
STUB = """
import fcntl, os, pathlib, signal, subprocess, sys, time
def stop(number, frame):
    {stop}
signal.signal(signal.SIGTERM, stop)
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
started = "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", started], pass_fds=[lock.fileno()])
print("training", flush=True)
while True:
    time.sleep(0.05)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def is_free(file: TextIO) -> bool:
    """Whether no process holds a lock on the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def heeded() -> Iterator[None]:
    """During the test, restore the default action of signals that this process ignores, for example under nohup."""
    ignored = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def train(tmp_path, monkeypatch, heeded):
    """train(stop, send): run the stub, and call send() in a thread once it and its own process are there."""
    monkeypatch.chdir(tmp_path)

    def train(stop: str, send: Callable[[], None]) -> int:
        thread = threading.Thread(target=lambda: wait_for(Path("ready").exists) and send())
        thread.start()
        try:
            return run_training([sys.executable, "-c", STUB.format(stop=stop)], Path("log"))
        finally:
            thread.join()
            assert Path("log").read_text().startswith("training\n")
            with open("lock") as file:
                assert wait_for(lambda: is_free(file))  # no process of the training is left

    return train


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_lets_the_training_save_its_state(train, capfd, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as interrupted:
        train("time.sleep(0.5); pathlib.Path('checkpoint').touch(); sys.exit(143)", lambda: send(number))
    assert interrupted.value.number == number and Path("checkpoint").is_file()
    assert capfd.readouterr().err == f"{signal.Signals(number).name}: {CONFIRMATION}\n"
    assert signal.getsignal(number) == before


def test_a_second_signal_kills_a_training_that_does_not_end(train, capfd):
    def send_twice() -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)  # within ONE_SIGNAL, as `timeout` sends two
        assert not wait_for(lambda: AT_ONCE in capfd.readouterr().err, ONE_SIGNAL / 2)
        time.sleep(ONE_SIGNAL)
        send(signal.SIGTERM)

    start = time.monotonic()
    with pytest.raises(Interrupted) as interrupted:
        train("pass", send_twice)
    assert interrupted.value.number == signal.SIGINT and time.monotonic() - start < 100
    assert capfd.readouterr().err.endswith(f"{AT_ONCE}\n")


def test_an_error_here_kills_the_training(train):
    def fail(*_) -> None:
        raise OSError("no more")

    before = signal.signal(signal.SIGUSR1, fail)
    try:
        with pytest.raises(OSError, match="no more"):
            train("pass", lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_a_signal_the_exit_code_comes_back(tmp_path):
    assert run_training([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log") == 3


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with handled_by(lambda number, frame: None):
            assert callable(signal.getsignal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_goes_on_where_signals_stopped_its_training(tmp_path):
    """For real: tests/helpers/killer.py sends each signal to the command while its training begins an iteration."""
    words = f"""quick/deqdet_shapes --eval-period 4 --output out --plugin {ROOT}/tests/helpers/killer.py
    SOLVER.MAX_ITER 4 SOLVER.IMS_PER_BATCH 2 MODEL.DEVICE cpu DATASETS.TRAIN ('shapes_seed3_4',)
    DATASETS.TEST ('shapes_seed4_3',) MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8
    MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 3 DATALOADER.NUM_WORKERS 0"""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "projects" / "DEQDet")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(tmp_path / "datasets"),
                   "PYTHONPATH": paths}  # fmt: skip

    def compare(kill: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "tools" / "compare.py"), *words.split()]
        return subprocess.run(
            command, cwd=tmp_path, env={**environment, "KILL": kill}, capture_output=True, text=True, timeout=600
        )

    folder = tmp_path / "out" / "deqdet_shapes-seed1"
    for name, iteration, code in (("SIGTERM", 1, 143), ("SIGINT", 2, 130)):
        done = compare(f"LAUNCHER-{name}@{iteration}")
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        lines = [line for line in done.stderr.splitlines() if line.startswith(("SIG", "interrupted", "Traceback"))]
        assert lines == [f"{name}: {CONFIRMATION}", "interrupted: run the same command again to continue"]
        assert (folder / f"model_{iteration:07d}.pth").is_file()
    done = compare("")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Starting training from iteration 3" in (folder / "log").read_text()
    assert "1/1] deqdet_shapes, seed 1: AP 0.0, " in done.stdout
