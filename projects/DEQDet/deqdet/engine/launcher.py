"""Starts one process per GPU, or several processes on the CPU, for a command line."""

import argparse
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils.logger import setup_logger

from ..errors import UserError
from .arguments import add_data_arguments, add_model_arguments, exit_on_user_error
from .cluster import Place, find_place
from .configuration import check_run, load_config
from .determinism import explained_determinism
from .joined import run_joined
from .options import check_processes
from .ranks import Group, run_ranks
from .signals import handled_by

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Return detectron2's parser with our flags added; on one machine, each run takes a free port.

    Parse with `parse_arguments`.
    """
    # Flags that are defined again replace detectron2's, whose help texts do not hold here.
    parser = argparse.ArgumentParser(
        parents=[default_argument_parser()],
        add_help=False,
        conflict_handler="resolve",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="continue the training in OUTPUT_DIR from its last checkpoint, or start one if there is none",
    )  # fmt: skip
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N",
        help="processes on each machine, one per GPU, or on the CPU if there is no CUDA (default: 1; with --data on a "
        "CPU, up to 4, depending on its cores)",
    )  # fmt: skip
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="number of machines (default: 1)")
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="N", help="number of this machine, counted from 0 (default: 0)"
    )
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL",
        help="tcp://HOST:PORT at which the processes meet; needed with several machines (default: auto, a free port of "
        "this machine)",
    )  # fmt: skip
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the training in OUTPUT_DIR and start a new one"
    )
    parser.add_argument(
        "--rank-timeout", type=_seconds, default=600.0, metavar="SECONDS",
        help="stop all processes if one does not respond, or makes no progress in an iteration, for this long "
        "(default: 600)",
    )  # fmt: skip
    return parser


def run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call main(args) in args.num_gpus processes, or in those that torchrun or srun has started.

    There is one process per GPU, with NCCL as the backend. If CUDA is missing or MODEL.DEVICE is "cpu", the processes
    run on the CPU, with gloo. A UserError in any of them ends the program with a one-line message and exit code 1.
    Under torchrun and srun, this process becomes one rank, and exits at the end of main.

    Args:
        main: a module-level function, since new processes import it by name.
    """
    logging.raiseExceptions = False  # if the disk is full, log lines are lost without a traceback
    with exit_on_user_error():
        check_processes(args)
        place = find_place(os.environ)
        if place is not None:
            _check_launch(place, args)
            if place.world_size > 1:
                _run_joined(main, args, place)
        if args.num_gpus * args.num_machines == 1:
            with _sigterm_exits():
                _work(main, args)
            return
        on_cpu = _check_processes(args).MODEL.DEVICE == "cpu"
        group = Group(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args.rank_timeout)
        with _hidden_gpus() if on_cpu else nullcontext():
            run_ranks(_work, (main, args), group)


def _run_joined(main: Callable[[argparse.Namespace], object], args: argparse.Namespace, place: Place) -> None:
    machines, machine_rank = place.world_size // place.local_size, place.rank // place.local_size
    sizes = {"num_gpus": place.local_size, "num_machines": machines, "machine_rank": machine_rank}
    args = argparse.Namespace(**{**vars(args), **sizes})

    def check() -> bool:
        cfg = load_config(args)
        if place.rank == 0:
            with _logging():
                check_run(cfg, args)
        return cfg.MODEL.DEVICE == "cpu" or not torch.cuda.is_available()

    cores = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if place.launcher == "srun" and cores.isdigit() and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = cores
        torch.set_num_threads(max(1, int(cores)))
    run_joined(check, lambda: _work(main, args), place=place, rank_timeout=args.rank_timeout)


@contextmanager
def _logging() -> Iterator[None]:
    """Show deqdet's log messages before `setup` configures its logger."""
    log = logging.getLogger("deqdet")
    before, propagate = list(log.handlers), log.propagate
    setup_logger(name="deqdet")
    try:
        yield
    finally:
        log.handlers, log.propagate = before, propagate


def _check_launch(place: Place, args: argparse.Namespace) -> None:
    """Check that the flags do not conflict with torchrun or srun, which has started the processes."""
    given = {
        f"--num-gpus {args.num_gpus}": args.num_gpus > 1,
        f"--num-machines {args.num_machines}": args.num_machines > 1,
        f"--dist-url {args.dist_url}": args.dist_url != "auto",
    }
    for flag, is_given in given.items():
        if is_given:
            raise UserError(
                f"{flag} asks for processes besides the {place.world_size} that {place.launcher} has started: leave it "
                f"out, and let {place.launcher} start as many as you need"
            )
    if place.restarts and not (args.resume or args.eval_only):
        raise UserError(
            f"torchrun --max-restarts {place.restarts} starts the same command again after a failure, which then finds "
            "a training to continue: add --resume, which also starts a new one if there is none"
        )


def share_cores(processes: int) -> None:
    """Divide the cores among CPU processes; by default, torch would start one thread per core in every process.

    If OMP_NUM_THREADS is set, it takes precedence.
    """
    if processes > 1 and not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count_cores() // processes))


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    # macOS and Windows have no sched_getaffinity.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _work(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    logging.raiseExceptions = False
    share_cores(args.num_gpus)
    with explained_determinism(), _disk_errors_of_threads():
        main(args)


@contextmanager
def _disk_errors_of_threads() -> Iterator[None]:
    """Log one line instead of a traceback when a thread that writes a file (TensorBoard's) fails, as on a full disk.

    The main thread tells the user: the next checkpoint cannot be written either, which ends the run with one line.
    """

    def report(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError):
            name = args.thread.name if args.thread else "unknown"
            logger.warning("the thread %s, which writes a file, has ended: %s", name, args.exc_value)
        else:
            before(args)

    before, threading.excepthook = threading.excepthook, report
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM end the process with one line and exit code 143; during training, another handler replaces this."""

    def stop(number: int, frame: object) -> None:
        print("stopped by SIGTERM", file=sys.stderr)
        sys.exit(128 + number)

    with handled_by(stop, [signal.SIGTERM]):
        yield


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """Hide the GPUs from processes started in the block, so that they use gloo: NCCL does not support CPU tensors."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _check_processes(args: argparse.Namespace) -> CfgNode:
    """Check the run before the processes start, so that a mistake is reported once; return its config."""
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("several machines need --dist-url, the same tcp://HOST:PORT on each")
    cfg = load_config(args)
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and 0 < gpus < args.num_gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {gpus}")
    setup_logger(name="deqdet")
    check_run(cfg, args)
    return cfg
