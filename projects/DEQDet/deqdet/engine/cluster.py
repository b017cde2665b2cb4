"""Reads from environment variables which rank this process has in a run that torchrun or Slurm's srun has started."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError

_LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """The position of one process in a run that an external launcher has started."""

    launcher: str  # "torchrun" or "srun"
    rank: int  # among all processes; the ranks of one machine are consecutive
    world_size: int  # all processes
    local_rank: int  # among the processes on this machine
    local_size: int  # processes on each machine
    host: str  # of rank 0
    port: int
    restarts: int = 0  # how often torchrun may restart the processes after a failure
    attempt: int = 0  # the number of restarts so far


def find_place(environ: Mapping[str, str]) -> Place | None:
    """Return the place that torchrun or srun gives this process, or None if neither has started it.

    Slurm also sets its variables when it starts a single process: in an sbatch script, in the shell of salloc or of
    `srun --pty`, and with `srun -n 1`. Such a process joins no group, and --num-gpus works as usual.

    Args:
        environ: os.environ.

    Raises:
        UserError: a variable is missing or invalid, or the machines have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in environ or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys():
        return _checked(_torchrun_place(environ))
    interactive = "SLURM_PTY_PORT" in environ and sys.stdin is not None and sys.stdin.isatty()
    if "SLURM_PROCID" in environ and _step_tasks(environ) > 1 and not interactive:
        return _checked(_slurm_place(environ))
    if "RANK" in environ and _integer(environ, "WORLD_SIZE", "1") > 1:
        raise UserError(
            "RANK and WORLD_SIZE are set in the environment, but LOCAL_RANK is not: start the processes with torchrun, "
            "or unset RANK and WORLD_SIZE to run this process alone"
        )
    return None


def check_alone(environ: Mapping[str, str]) -> None:
    """Check that a single-process tool has not been started in several processes, which would write the same files.

    Args:
        environ: os.environ.

    Raises:
        UserError: torchrun or srun has started several processes; raised on rank 0 only.
        SystemExit: the same on every other rank, which exits silently.
    """
    place = find_place(environ)
    if place is None or place.world_size == 1:
        return
    if place.rank > 0:
        sys.exit(1)
    marks = "SLURM_STEP_NUM_TASKS" if place.launcher == "srun" else "RANK, WORLD_SIZE, LOCAL_RANK, TORCHELASTIC_RUN_ID"
    raise UserError(
        f"this command runs in one process, but {place.launcher} has started {place.world_size}: start it without "
        f"{place.launcher}, or unset {marks} if the processes are independent of each other"
    )


def first_host(nodes: str) -> str:
    """Return the first host of a node list in Slurm's syntax: "node[03-07,9],other" gives "node03".

    Raises:
        UserError: the list cannot be parsed.
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
    """Return the number of processes in this process's job step, itself included.

    Slurm gives it in SLURM_STEP_NUM_TASKS. Within a job, SLURM_NTASKS is no substitute: an sbatch script has it too,
    although it runs alone. It is used only without a job (no SLURM_JOB_ID), when some program imitates srun on one
    machine.
    """
    alone = environ.get("SLURM_NTASKS", "1") if "SLURM_JOB_ID" not in environ else "1"
    return _integer(environ, "SLURM_STEP_NUM_TASKS", alone)


def _slurm_place(environ: Mapping[str, str]) -> Place:
    world_size = _step_tasks(environ)
    local_size = _tasks_per_node(environ) if "SLURM_JOB_ID" in environ else world_size
    local_rank = _integer(environ, "SLURM_LOCALID")
    rank = _integer(environ, "SLURM_PROCID")
    if "SLURM_NODEID" in environ:  # with --distribution=cyclic, srun's own ranks alternate between machines
        rank = _integer(environ, "SLURM_NODEID") * local_size + local_rank
    host = _LOCAL
    if local_size < world_size:
        host = first_host(environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST"))
    # Different ports for job steps that share a machine, below the range from which the system assigns ports.
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
    """Read Slurm's "4(x2)" or "4,4" as 4. "4(x2),3" is an error: the last of three machines has fewer processes."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or _text(environ, "SLURM_NTASKS_PER_NODE")
    counts = {part.partition("(")[0] for part in text.split(",")}
    if len(counts) > 1:
        raise UserError(
            f"srun has started {text} processes on the machines: use --ntasks-per-node to start the same number on each"
        )
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
        raise UserError(f"{name} is missing in the environment, where torchrun and srun set it: start with one of them")
    return environ[name]


def _integer(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name) or default or _text(environ, name)
    if not re.fullmatch(r"\d{1,18}", text):
        raise UserError(f"{name} is {text!r} in the environment: it must be an integer of at least 0")
    return int(text)
