"""Processes that torchrun, srun (by its environment variables) or two launchers of ours start."""

import socket
import subprocess
import sys
from collections.abc import Sequence

from helpers.toy_runs import environment

LIMIT = 240  # seconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(words: Sequence[str], *flags: str) -> list[str]:
    """The command that starts two processes of a Python command line, and looks often whether they live."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
    return [*launcher, "--master-port", str(free_port()), *flags, *words[1:]]


def slurm_step(rank: int, tasks: int = 2) -> dict[str, str]:
    """What srun sets for one of the tasks of a step on one machine."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_NTASKS": str(tasks), "SLURM_JOB_NODELIST": "node[03-04]", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "node03", "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
    }  # fmt: skip


def run_together(
    commands: Sequence[Sequence[str]], extra: Sequence[dict[str, str]], kill: str = ""
) -> list[subprocess.CompletedProcess]:
    """Start processes beside each other, each with variables of its own, and wait for all."""
    started = [
        subprocess.Popen(
            command, env={**environment(kill), **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command, more in zip(commands, extra, strict=True)
    ]
    done = []
    try:
        for process in started:
            printed, errors = process.communicate(timeout=LIMIT)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, printed, errors))
    finally:
        for process in started:
            process.kill()
    return done
