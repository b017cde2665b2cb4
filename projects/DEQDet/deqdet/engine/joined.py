"""Runs this process as one rank of a run that torchrun or srun has started.

We have no parent process that could watch these ranks. Instead, each rank watches itself, and ends when it makes no
progress, so that the launcher notices. Only one rank prints a message; a counter in the store decides which.
"""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..errors import UserError, one_line
from .cluster import Place
from .ranks import (
    AFTER_FORWARD,
    BEFORE_DATA,
    IN_FORWARD,
    LOST_PEER,
    OUTSIDE,
    START,
    end_process,
    is_lost_peer,
    join,
    meet,
    take_board,
)

_GRACE = 1.0  # seconds that the other ranks have to learn of an error before the store ends with rank 0
_WAITS = {BEFORE_DATA: "while it loaded data", IN_FORWARD: "in the forward pass",
          AFTER_FORWARD: "in the backward pass, where it waits for the other ranks"}  # fmt: skip


def run_joined(
    check: Callable[[], bool], main: Callable[[], object], *, place: Place, rank_timeout: float
) -> None:
    """Join the process group, call main() on every rank, and end the process; this function does not return.

    The exit code is 0, 1 after an error, LOST_PEER if another rank is gone, or that of a signal.

    Args:
        check: checks the run, on rank 0 first and then on every other rank. Returns whether the run is on the CPU, and
            the backend therefore gloo.
        rank_timeout: seconds to wait for the other ranks at the start, and seconds without progress in an iteration
            after which this rank gives up.
    """
    voice = _Voice(place)
    signal.signal(signal.SIGTERM, voice.stop)
    board = [0.0, 0.0, 0.0, OUTSIDE, 0.0]
    take_board(board, 0)
    threading.Thread(target=_watch, args=(board, rank_timeout, voice), daemon=True).start()
    try:
        voice.store = store = _meet(place, rank_timeout)
        on_cpu = _check_in_turn(check, store, place)
        gpu = None if on_cpu else _choose_gpu(place)
        join(dist.PrefixStore("ranks", store), rank=place.rank, world_size=place.world_size,
             per_machine=place.local_size, rank_timeout=rank_timeout, gpu=gpu)  # fmt: skip
        main()
        comm.synchronize()  # a rank that is done must not exit while another one still needs it
    except UserError as error:
        voice.say(f"error: {one_line(error)}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(_GRACE if place.rank == 0 else 0)
        end_process(1)
    except KeyboardInterrupt:  # before or after the iterations
        voice.say("interrupted")
        end_process(130)
    except SystemExit as error:  # a signal
        end_process(error.code if isinstance(error.code, int) else 1)
    except Exception as error:
        if is_lost_peer(error):
            where = f" in iteration {board[2]:.0f}" if board[3] != OUTSIDE else ""
            voice.say(
                f"error: a collective operation failed{where}, probably because another rank is gone: "
                "--resume continues"
            )
            end_process(LOST_PEER)
        traceback.print_exc()
        voice.say(f"error: rank {place.rank} failed with {type(error).__name__}: {one_line(error)} (see the traceback)")
        end_process(1)
    end_process(0)


class _Voice:
    """Prints messages from a single rank only: the first one that has any."""

    def __init__(self, place: Place):
        self.rank = place.rank
        self.store: dist.Store | None = None  # once the ranks have met

    def say(self, line: str) -> None:
        """Print a line on stderr unless another rank has printed one.

        If the store does not answer, because its rank has ended or hangs, the line is printed.
        """
        counts = []

        def count() -> None:
            with suppress(RuntimeError):
                counts.append(self.store.add("said", 1))

        if self.store is not None:
            thread = threading.Thread(target=count, daemon=True)
            thread.start()
            thread.join(_GRACE)
        if counts in ([], [1]):
            print(line, file=sys.stderr, flush=True)

    def stop(self, number: int, frame: object) -> None:
        """Handle SIGTERM outside of a training, which has its own handler."""
        self.say("stopped by SIGTERM")
        end_process(128 + number)


def _meet(place: Place, seconds: float) -> dist.Store:
    if place.launcher == "srun":
        return meet(place.host, place.port, rank=place.rank, world_size=place.world_size, seconds=seconds)
    # torchrun's agents have already met, and provide a store.
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timedelta(seconds=seconds)))
    return dist.PrefixStore(f"deqdet-{place.attempt}", store)


def _check_in_turn(check: Callable[[], bool], store: dist.Store, place: Place) -> bool:
    """Run the check on rank 0 first, so that a mistake is reported once, and data sets are drawn or cached once.

    The other ranks poll the store, since a signal could not interrupt a blocking wait in torch.
    """
    if place.rank == 0:
        try:
            on_cpu = check()
        except BaseException:
            store.set("checked", "wrong")
            raise
        store.set("checked", "well")
        return on_cpu
    end = time.monotonic() + DEFAULT_TIMEOUT.total_seconds()
    while not store.check(["checked"]):
        if time.monotonic() > end:
            raise UserError(f"rank {place.rank} has waited {DEFAULT_TIMEOUT} for rank 0 to check the run")
        time.sleep(0.05)
    if store.get("checked") == b"wrong":
        time.sleep(2 * _GRACE)  # let the launcher see rank 0 fail first, since that rank knows the reason
        end_process(1)
    return check()


def _choose_gpu(place: Place) -> int:
    """Return the index of this rank's GPU: its local rank, or 0 if srun makes only one GPU visible to it."""
    gpus = torch.cuda.device_count()
    if place.launcher == "srun" and gpus == 1:
        return 0
    if place.local_size > gpus:
        raise UserError(
            f"{place.launcher} has started {place.local_size} processes on a machine with {gpus} GPUs: start one for "
            "each GPU, or set MODEL.DEVICE cpu"
        )
    return place.local_rank


def _watch(board: list[float], timeout: float, voice: _Voice) -> None:
    """End this process when it makes no progress in an iteration (see `ranks.mark`)."""
    while True:
        time.sleep(min(0.5, timeout / 10))
        _, progress, iteration, phase, finished = board
        limit = timeout if finished else max(timeout, START)
        if phase != OUTSIDE and time.monotonic() - progress > limit:
            voice.say(
                f"error: rank {voice.rank} has made no progress for {timeout:g} s in iteration {iteration:.0f} "
                f"{_WAITS[phase]} (--rank-timeout): --resume continues"
            )
            end_process(1)
