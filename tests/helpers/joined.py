"""Trainings of the toy detector that torchrun, srun (by its environment variables) or two launchers of ours start."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.toy_runs import environment

LIMIT = 240  # seconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(words: Sequence[str], *flags: str, kill: str = "") -> list[str]:
    """The command that starts two processes of a Python command line, and looks at them often."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
    return [*launcher, "--master-port", str(free_port()), *flags, *words[1:]]


def slurm_step(rank: int, tasks: int = 2, nodes: str = "localhost") -> dict[str, str]:
    """What srun sets for one of the tasks of a step on one machine; the port is free rather than the job's."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_NTASKS": str(tasks), "SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": "2",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
    }  # fmt: skip


def run_together(commands: Sequence[Sequence[str]], extra: Sequence[dict[str, str]], kill: str = "") -> list:
    """Start processes beside each other, wait for all, and return them as subprocess.run does."""
    started = [
        subprocess.Popen(command, env={**environment(kill), **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for command, more in zip(commands, extra, strict=True)
    ]  # fmt: skip
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=LIMIT)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return done
