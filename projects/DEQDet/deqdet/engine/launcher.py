"""From the command line to one process per GPU, or to several on the CPU."""

import argparse
import os
import sys
from collections.abc import Callable

import torch
from torch.multiprocessing import ProcessExitedException

from detectron2.engine import default_argument_parser, launch

from .configuration import UserError, check_run, load_config


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's parser, but on one machine every run takes a free port of its own."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")
    return parser


def run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call main(args) in args.num_gpus processes: one per GPU (NCCL), or on the CPU (gloo) where CUDA is
    missing or MODEL.DEVICE is "cpu".

    A UserError, there or here, ends the program with its one line and exit code 1.

    Args:
        main: importable by name, since new processes look it up.
    """
    try:
        if args.num_gpus * args.num_machines > 1:
            _check_processes(args)
        launch(
            _work,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    except ProcessExitedException as error:
        if error.exit_code != 1:
            raise
        sys.exit(1)  # The process has said why.


def share_cores(processes: int) -> None:
    """Divide the cores among the CPU processes of this machine: torch would start as many threads in each.

    OMP_NUM_THREADS, where it is set, decides instead.
    """
    if processes > 1 and not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count_cores() // processes))


def count_cores() -> int:
    """The cores that this process may use."""
    # Not every system (macOS, Windows) tells a process its own.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _work(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    share_cores(args.num_gpus)
    try:
        main(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def _check_processes(args: argparse.Namespace) -> None:
    """Check the run once, lest every process reports the same mistake; choose between GPU and CPU."""
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("several machines need --dist-url, the same tcp://HOST:PORT on each")
    cfg = load_config(args)
    check_run(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":
        # The new processes then see no CUDA, and detectron2 joins them by gloo: NCCL takes no CPU tensors.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs")
