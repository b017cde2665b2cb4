"""A function in two processes on the CPU, joined by gloo as detectron2 joins them."""

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import torch

from detectron2.engine import launch
from detectron2.utils import comm

from deqdet.engine.ranks import end_process

multiprocessing.set_forkserver_preload(["deqdet"])
_START = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Within the block, start processes by forking a server that has already imported the package.

    This saves eight seconds per process. Their environment variables are those of the server, which starts with the
    first process.
    """
    with mock.patch.object(torch.multiprocessing, "start_processes", _START):
        yield


def run_two_ranks(work: Callable[..., None], *args: object) -> None:
    """Call work(*args) in two processes with one thread each, and wait for both; their errors are raised here.

    Args:
        work: a function of a module, since new processes import it by its name.
    """
    with forked_ranks():
        launch(_work, 2, dist_url="auto", args=(work, args), timeout=timedelta(seconds=60))


def _work(work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    work(*args)
    comm.synchronize()
    end_process(0)  # a thread of gloo that still runs at the interpreter's teardown aborts the process now and then
