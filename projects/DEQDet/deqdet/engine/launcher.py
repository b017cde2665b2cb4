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
from .configuration import check_run, load_config


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
    several = args.num_gpus * args.num_machines > 1
    try:
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


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """Processes started within it see no CUDA, so that gloo joins them: NCCL would not take CPU tensors."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _check_processes(args: argparse.Namespace) -> CfgNode:
    """Check the run once, lest every process reports the same mistake; returns its config."""
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("several machines need --dist-url, the same tcp://HOST:PORT on each")
    cfg = load_config(args)
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and 0 < gpus < args.num_gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {gpus}")
    setup_logger(name="deqdet")
    check_run(cfg, args)
    return cfg
