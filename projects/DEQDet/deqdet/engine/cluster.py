"""The place of this process in a run that torchrun or Slurm's srun has started, from their environment variables."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError

_LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """One process among those that a launcher other than ours has started."""

    launcher: str  # "torchrun" or "srun"
    rank: int  # among all processes; those of one machine follow each other
    world_size: int  # all processes
    local_rank: int  # among those of this machine
    local_size: int  # processes of this machine, the same number on every one
    host: str  # of rank 0
    port: int
    restarts: int = 0  # how often torchrun may start the processes again after one has failed
    attempt: int = 0  # how often it has done so


def find_place(environ: Mapping[str, str]) -> Place | None:
    """The place that torchrun or srun gives this process; None where neither has started it.

    Slurm sets variables also where it starts a single process: in the script of sbatch, in the shell of salloc or of
    `srun --pty`, and by `srun -n 1`. None of these joins anything, and --num-gpus works there as everywhere.

    Args:
        environ: os.environ.

    Raises:
        UserError: a variable is missing or makes no sense, or the machines have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in environ or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys():
        return _checked(_torchrun_place(environ))
    interactive = "SLURM_PTY_PORT" in environ and sys.stdin is not None and sys.stdin.isatty()
    if "SLURM_PROCID" in environ and _step_tasks(environ) > 1 and not interactive:
        return _checked(_slurm_place(environ))
    if "RANK" in environ and _integer(environ, "WORLD_SIZE", "1") > 1:
        raise UserError(
            "RANK and WORLD_SIZE are set in the environment, but LOCAL_RANK is not: start the processes by torchrun, "
            "or unset RANK and WORLD_SIZE for a run of its own"
        )
    return None


def check_alone(environ: Mapping[str, str]) -> None:
    """See that a tool which works in one process is not started in several: they would write the same files.

    Args:
        environ: os.environ.

    Raises:
        UserError: torchrun or srun has started several.
        SystemExit: the same in a process other than the first, which stays silent.
    """
    place = find_place(environ)
    if place is None or place.world_size == 1:
        return
    if place.rank > 0:
        sys.exit(1)
    marks = "SLURM_STEP_NUM_TASKS" if place.launcher == "srun" else "RANK, WORLD_SIZE, LOCAL_RANK, TORCHELASTIC_RUN_ID"
    raise UserError(
        f"this command works in one process, but {place.launcher} has started {place.world_size}: start it without "
        f"{place.launcher}, or unset {marks} for processes that have nothing to do with each other"
    )


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's syntax: "node[03-07,9],other" gives "node03".

    Raises:
        UserError: it is no such list.
    """
    found = re.fullmatch(r"((?:[^,\[\]\s]|\[\w+(?:[-,]\w+)*\])+)(?:,.*)?", nodes.strip())
    if not found:
        raise UserError(f"Slurm's list of nodes {nodes!r} cannot be read: set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[1])


def _torchrun_place(environ: Mapping[str, str]) -> Place:
    return Place(
        launcher="torchrun",
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        host=_text(environ, "MASTER_ADDR"),
        port=_integer(environ, "MASTER_PORT"),
        restarts=_integer(environ, "TORCHELASTIC_MAX_RESTARTS", "0"),
        attempt=_integer(environ, "TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _step_tasks(environ: Mapping[str, str]) -> int:
    """The number of processes that srun has started together with this one.

    Slurm's job steps say it in SLURM_STEP_NUM_TASKS. SLURM_NTASKS does not say it within a job, where the script of
    sbatch has it too, although it runs alone. Only without a job (no SLURM_JOB_ID) is it taken: then some program
    imitates srun on one machine.
    """
    alone = environ.get("SLURM_NTASKS", "1") if "SLURM_JOB_ID" not in environ else "1"
    return _integer(environ, "SLURM_STEP_NUM_TASKS", alone)


def _slurm_place(environ: Mapping[str, str]) -> Place:
    world_size = _step_tasks(environ)
    local_size = _tasks_per_node(environ) if "SLURM_JOB_ID" in environ else world_size
    local_rank = _integer(environ, "SLURM_LOCALID")
    rank = _integer(environ, "SLURM_PROCID")
    if "SLURM_NODEID" in environ:  # srun's own numbers go round the machines with --distribution=cyclic
        rank = _integer(environ, "SLURM_NODEID") * local_size + local_rank
    host = _LOCAL
    if local_size < world_size:
        host = first_host(environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST"))
    # Two steps that share a machine get ports of their own, below those that the system gives away.
    job, step = _integer(environ, "SLURM_JOB_ID", "0"), _integer(environ, "SLURM_STEP_ID", "0")
    port = 20_000 + (16 * job + step) % 12_000
    return Place(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        host=environ.get("MASTER_ADDR") or host,
        port=_integer(environ, "MASTER_PORT", str(port)),
    )


def _tasks_per_node(environ: Mapping[str, str]) -> int:
    """Read Slurm's "4(x2)" or "4,4" as 4; "4(x2),3", where the last of three machines has fewer, is an error."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or _text(environ, "SLURM_NTASKS_PER_NODE")
    counts = {part.partition("(")[0] for part in text.split(",")}
    if len(counts) > 1:
        raise UserError(f"srun has started {text} processes on the machines: give all the same by --ntasks-per-node")
    return _integer({"SLURM_STEP_TASKS_PER_NODE": counts.pop()}, "SLURM_STEP_TASKS_PER_NODE")


def _checked(place: Place) -> Place:
    machine, rest = divmod(place.rank, max(place.local_size, 1))
    even = place.local_size > 0 and place.world_size % place.local_size == 0
    if not even or rest != place.local_rank or not 0 <= machine < place.world_size // place.local_size:
        raise UserError(
            f"{place.launcher} gives this process rank {place.rank} of {place.world_size}, and on its machine rank "
            f"{place.local_rank} of {place.local_size}: start the same number of processes on every machine"
        )
    return place


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UserError(f"{name} is missing in the environment, which torchrun and srun set: start by one of them")
    return environ[name]


def _integer(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name) or default or _text(environ, name)
    if not re.fullmatch(r"\d{1,18}", text):
        raise UserError(f"{name} is {text!r} in the environment: it must be an integer of at least 0")
    return int(text)
