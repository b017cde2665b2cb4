"""Trainings in processes of their own that are killed, stopped and frozen. tests/soak/kill_resume.py has many more."""

import argparse
import fcntl
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from soak.kill_resume import same

from deqdet.checkpoints.files import read_torch
from deqdet.engine import run
from deqdet.engine.resume import CLOCK_FIGURES
from deqdet.engine.signals import CONFIRMATION
from deqdet.tools.train_net import work

from helpers.engine_toy import IN_PROCESS, loggers_as_before, parse, write_dataset
from helpers.toy_runs import command, environment, read_lines, run_toy, said
from helpers.two_ranks import forked_ranks

pytestmark = IN_PROCESS
LONG = (
    "SOLVER.MAX_ITER", 23, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 8, "DATASETS.TEST", "()",
    "SOLVER.EMA.ENABLED", True,
)  # fmt: skip


def end_of(out: Path) -> dict:
    """All of the last checkpoint, and the metrics that are not the clock's."""
    metrics = [{k: v for k, v in line.items() if k not in CLOCK_FIGURES} for line in read_lines(out)]
    final = read_torch(out / "model_final.pth")
    del final["trainer"]["progress"]["complete"]  # a checkpoint after a signal comes later in its iteration
    return {"checkpoint": final, "metrics": metrics}


def train(processes: int, config: str, *words) -> None:
    """Train without an interruption, with as few imports as possible: they take most of the time."""
    args = parse(config, "--num-gpus", processes, *words)
    with loggers_as_before(), forked_ranks():
        work(args) if processes == 1 else run(train_in_rank, args)


def train_in_rank(args: argparse.Namespace) -> None:
    """Train in a new process, which imports this module, and so the toy detector."""
    work(args)


def train_despite_taken_port(config: str, *words) -> None:
    """Train in two processes that are told to meet at a port that is taken, and must find another one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = run_toy(config, "--num-gpus", 2, "--dist-url", url, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "another port is used instead" in done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config, and for each number of processes the end of an uninterrupted training."""
    root = tmp_path_factory.mktemp("whole")
    config = write_dataset(root, "whole")
    train(1, config, *LONG, "OUTPUT_DIR", root / "out1")
    train_despite_taken_port(config, *LONG, "OUTPUT_DIR", root / "out2")
    return config, {processes: end_of(root / f"out{processes}") for processes in (1, 2)}


@pytest.mark.parametrize("processes, kill, code", [
    (1, "HALF:model_0000007.pth", -signal.SIGKILL),
    (1, "SIGTERM@9", 143),
    (2, "LAUNCHER-SIGINT@9", 130),
    (2, "SIGKILL@10:1", 1),
])  # fmt: skip
def test_a_resumed_training_ends_as_the_uninterrupted_one(whole, tmp_path, processes, kill, code):
    config, ends = whole
    words = [*LONG, "OUTPUT_DIR", tmp_path / "out"]
    killed = run_toy(config, "--num-gpus", processes, *words, kill=kill)
    assert killed.returncode == code
    lines = said(killed)
    if code == 1:
        assert lines == ["error: rank 1 died (killed by SIGKILL) in iteration 10: the others were stopped too; "
                         "--resume continues"]  # fmt: skip
    elif code > 0:
        name = "SIGTERM" if code == 143 else "SIGINT"
        path = tmp_path / "out" / "model_0000009.pth"
        assert lines == [
            f"{name}: {CONFIRMATION}",
            f"stopped by {name} after iteration 9: saved {path}; --resume continues from there",
        ]
    train(processes, config, "--resume", *words, "DATALOADER.NUM_WORKERS", 2 if processes == 1 else 0)
    assert same(end_of(tmp_path / "out"), ends[processes])
    assert not list((tmp_path / "out").glob(".unfinished*"))


@pytest.mark.parametrize("kill, rank", [("STOP@5:1", 1), ("SLEEP@5:0", 0)])
def test_a_rank_that_hangs_ends_the_others(toy_config, kill, rank):
    done = run_toy(toy_config, "--num-gpus", 2, "--rank-timeout", 8, *LONG, kill=kill)
    assert done.returncode == 1
    assert said(done) == [f"error: rank {rank} stopped responding for 8 s in iteration 5 (--rank-timeout): all ranks "
                          "were stopped; --resume continues"]  # fmt: skip


@pytest.fixture
def asleep(toy_config, tmp_path):
    """A training in its third iteration, where it stays, and the file with what it prints."""
    printed = tmp_path / "printed"
    with printed.open("w") as output:
        process = subprocess.Popen(command(toy_config, *LONG), env=environment("SLEEP@2"), stdout=output, stderr=output)
    deadline = time.monotonic() + 240
    while "asleep" not in printed.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    yield process, printed
    process.kill()
    process.wait()


def test_the_lock_ends_with_its_process(asleep, toy_config, tmp_path):
    process, _ = asleep
    out = tmp_path / "out"
    second = run_toy(toy_config, "--resume", *LONG)
    assert second.returncode == 1
    assert said(second) == [f"error: OUTPUT_DIR {out} is in use by another training (process {process.pid}): wait "
                            "until it ends, or choose another folder"]  # fmt: skip
    process.kill()
    process.wait()
    with open(out / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is held


def test_a_second_signal_ends_the_training_at_once(asleep):
    process, printed = asleep
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert "stopped at once by a second signal" in printed.read_text()
