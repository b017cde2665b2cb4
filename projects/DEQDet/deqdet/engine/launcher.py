"""From the command line to one process per GPU, or to several on the CPU."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.multiprocessing import ProcessExitedException

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.utils.logger import setup_logger

from ..errors import UserError
from .arguments import add_model_arguments, exit_on_user_error
from .configuration import check_run, load_config
from .options import check_processes


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's parser with --model and --plugin; on one machine, every run takes a free port of its own.

    Parse with `parse_arguments`.
    """
    parser = default_argument_parser()
    add_model_arguments(parser)
    parser.set_defaults(dist_url="auto")
    return parser


def run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call main(args) in args.num_gpus processes.

    There is one process for each GPU, joined by NCCL; where CUDA is missing or MODEL.DEVICE is "cpu", the processes run
    on the CPU and gloo joins them. A UserError, in any of them, ends the program with its one line and exit code 1.

    Args:
        main: a function of a module, since new processes import it by its name.
    """
    try:
        with exit_on_user_error():
            check_processes(args)
            several = args.num_gpus * args.num_machines > 1
            on_cpu = several and _check_processes(args).MODEL.DEVICE == "cpu"
            with _hidden_gpus() if on_cpu else nullcontext():
                launch(
                    _work,
                    args.num_gpus,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(main, args),
                )
    except ProcessExitedException as error:
        if error.exit_code not in (1, 130):
            raise
        sys.exit(error.exit_code)  # The process has said why.


def share_cores(processes: int) -> None:
    """Give each CPU process its share of the cores; by default torch would start as many threads in each as there are.

    Where OMP_NUM_THREADS is set, it decides instead.
    """
    if processes > 1 and not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count_cores() // processes))


def count_cores() -> int:
    """How many cores this process may use."""
    # Not every system (macOS, Windows) tells a process its own.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _work(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    share_cores(args.num_gpus)
    with exit_on_user_error():
        main(args)


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """Hide the GPUs from processes that start within it, so that gloo joins them: NCCL does not take CPU tensors."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _check_processes(args: argparse.Namespace) -> CfgNode:
    """Check the run before the processes start, so that a mistake is reported once; returns its config."""
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("several machines need --dist-url, the same tcp://HOST:PORT on each")
    cfg = load_config(args)
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and 0 < gpus < args.num_gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {gpus}")
    setup_logger(name="deqdet")
    check_run(cfg, args)
    return cfg
