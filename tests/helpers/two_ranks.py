"""A function in two processes on the CPU, joined by gloo as detectron2 joins them."""

from collections.abc import Callable
from datetime import timedelta

from detectron2.engine import launch
from detectron2.utils import comm

from deqdet.engine.ranks import end_process


def run_two_ranks(work: Callable[..., None], *args: object) -> None:
    """Call work(*args) in two processes, and wait for both; an error in one of them is raised here.

    Args:
        work: a function of a module, since new processes import it by its name.
    """
    launch(_work, 2, dist_url="auto", args=(work, args), timeout=timedelta(seconds=60))


def _work(work: Callable[..., None], args: tuple) -> None:
    work(*args)
    comm.synchronize()
    end_process(0)  # a thread of gloo that still runs at the interpreter's teardown aborts the process now and then
