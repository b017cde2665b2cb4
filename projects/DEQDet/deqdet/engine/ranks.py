"""Starts the ranks of one machine, and ends all of them when one fails, dies or hangs."""

import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..errors import UserError, one_line

LOST_PEER = 70  # exit code of a rank that failed because another one was gone
STOPPED = (130, 143)  # exit codes after SIGINT and SIGTERM
START = 120.0  # least timeout in seconds while a process imports its libraries or starts its dataloader workers
_GRACE = 1.0  # seconds in which the other ranks may end by themselves
_FIELDS = 5  # of a rank on the board: times of last heartbeat and last progress, iteration, phase, iterations done
OUTSIDE, BEFORE_DATA, IN_FORWARD, AFTER_FORWARD = -1.0, 0.0, 1.0, 2.0  # phases

_board: tuple[object, int] | None = None  # in a rank: the shared board, and the offset of the rank's fields


@dataclass(frozen=True)
class Group:
    """The size of a process group and how its ranks meet."""

    per_machine: int
    machines: int
    machine_rank: int
    dist_url: str  # "auto": one machine, any free port
    rank_timeout: float  # seconds without a heartbeat, or without progress in an iteration, that mean a hang

    @property
    def first_rank(self) -> int:
        """The global rank of this machine's first process."""
        return self.machine_rank * self.per_machine


def take_board(board: object, place: int) -> None:
    """Let `mark` write to a shared board, from index `place` on, where this rank's watcher reads its progress."""
    global _board
    _board = board, place


def mark(iteration: int, phase: float) -> None:
    """Record this rank's iteration and phase for its watcher. Without a watcher, do nothing."""
    if _board is not None:
        board, place = _board
        board[place + 1 : place + 4] = [time.monotonic(), iteration, phase]
        board[place + 4] += phase == OUTSIDE


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error is that of a failed collective operation, which all ranks raise after one has died."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def run_ranks(main: Callable[..., object], args: tuple, group: Group) -> None:
    """Run main(*args) in group.per_machine processes, with NCCL as the backend if CUDA is available, else gloo.

    SIGINT and SIGTERM are forwarded to all ranks.

    Raises:
        UserError: a rank raised a UserError, died, failed, or stopped responding; the others have been ended.
        SystemExit: the ranks were stopped by a signal.
    """
    store, address = _open_store(group)
    context = multiprocessing.get_context("spawn")
    board = context.Array("d", [0.0, 0.0, 0.0, OUTSIDE, 0.0] * group.per_machine, lock=False)
    messages = Path(tempfile.mkdtemp(prefix="deqdet-ranks-"))
    try:
        started = multiprocessing.start_processes(
            _rank, (main, args, group, address, board, str(messages)), nprocs=group.per_machine, join=False
        )
        _Watch(started.processes, board, messages, group).wait()
    finally:
        shutil.rmtree(messages, ignore_errors=True)
        del store  # kept until here, since it serves the ranks while they run


def _open_store(group: Group) -> tuple[dist.TCPStore | None, str]:
    """Open a store in this process, on a free port, at which the ranks of one machine meet.

    Returns:
        The store and its "host:port"; with several machines, None and group.dist_url.
    """
    if group.machines > 1:
        return None, group.dist_url
    host, _, port = group.dist_url.removeprefix("tcp://").rpartition(":")
    if group.dist_url != "auto":
        try:
            store = dist.TCPStore(host, int(port), is_master=True, wait_for_workers=False)
            return store, f"{host}:{store.port}"
        except (RuntimeError, ValueError) as error:
            print(f"--dist-url {group.dist_url} cannot be used ({one_line(error)[:80]}): another port is used instead",
                  file=sys.stderr)  # fmt: skip
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, f"127.0.0.1:{store.port}"


def _rank(
    local_rank: int, main: Callable[..., object], args: tuple, group: Group, address: str, board: object, messages: str
) -> None:
    """Run one rank, and exit; the message of an error goes to the launcher as a file in the folder `messages`."""
    gc.freeze()  # as in parse_arguments
    take_board(board, local_rank * _FIELDS)
    threading.Thread(target=_show_life, args=(board, local_rank * _FIELDS, group.rank_timeout), daemon=True).start()
    try:
        _join(local_rank, group, address)
        main(*args)
        comm.synchronize()  # a rank that is done must not exit while another one still needs it
    except UserError as error:
        Path(messages, str(local_rank)).write_text(one_line(error))
        end_process(1)
    except KeyboardInterrupt:  # before or after the iterations
        if local_rank == 0:
            print("interrupted", file=sys.stderr)
        end_process(130)
    except Exception as error:
        if is_lost_peer(error):
            end_process(LOST_PEER)
        traceback.print_exc()
        Path(messages, str(local_rank)).write_text(
            f"rank {group.first_rank + local_rank} failed with {type(error).__name__}: {one_line(error)} "
            "(see the traceback)"
        )
        end_process(1)
    end_process(0)


def end_process(code: int) -> None:
    """End this process and its dataloader workers, without the interpreter's teardown.

    The teardown would wait for threads of libraries, which may in turn wait for a rank that is gone. Besides, a gloo
    thread that is still running occasionally aborts the process.
    """
    for child in multiprocessing.active_children():  # dataloader workers
        child.terminate()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(local_rank: int, group: Group, address: str) -> None:
    """Join the process group with the ranks of this launcher and of those on other machines."""
    rank, world_size = group.first_rank + local_rank, group.per_machine * group.machines
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if group.machines == 1:
        store = dist.TCPStore(host, int(port), is_master=False)
    elif address.startswith("tcp://"):
        store = meet(host, port, rank=rank, world_size=world_size, seconds=group.rank_timeout)
    else:  # file://, which detectron2 allows
        store, _, _ = next(dist.rendezvous(address, rank, world_size))
    join(store, rank=rank, world_size=world_size, per_machine=group.per_machine, rank_timeout=group.rank_timeout,
         gpu=local_rank if torch.cuda.is_available() else None)  # fmt: skip


def meet(host: str, port: str | int, *, rank: int, world_size: int, seconds: float) -> dist.Store:
    """Wait until all ranks have connected to a store that rank 0 opens at host:port, and return it.

    Raises:
        UserError: the port is in use, the host is unknown, or a rank has not connected after `seconds`.
    """
    where = f"{host}:{port}"
    try:
        return dist.TCPStore(host, int(port), world_size, is_master=rank == 0, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError, TypeError) as error:  # a store's errors are RuntimeErrors
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"rank 0 cannot open {where}, where the ranks are to meet, because the port is in use: choose another "
                "by --dist-url, or by MASTER_PORT under srun"
            ) from error
        raise UserError(
            f"rank {rank} has waited {seconds:g} s (--rank-timeout) at {where} for all {world_size} ranks "
            f"({one_line(error)[:120]}): check that each machine has started its ranks, with the same address, and can "
            "reach it"
        ) from error


def join(
    store: dist.Store, *, rank: int, world_size: int, per_machine: int, rank_timeout: float, gpu: int | None
) -> None:
    """Join the process group as detectron2's own launcher does. A collective operation.

    Args:
        per_machine: number of ranks on each machine; they are consecutive.
        gpu: index of this rank's GPU, for NCCL; None for gloo.
    """
    # A long timeout, since the others may wait for an evaluation on one rank; hangs in training are detected earlier.
    timeout = max(DEFAULT_TIMEOUT, timedelta(seconds=rank_timeout))
    backend = "gloo" if gpu is None else "nccl"
    dist.init_process_group(backend, store=store, world_size=world_size, rank=rank, timeout=timeout)
    comm.create_local_process_group(per_machine)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    comm.synchronize()


def _show_life(board: object, place: int, timeout: float) -> None:
    while True:
        board[place] = time.monotonic()
        time.sleep(min(1.0, timeout / 10))


class _Watch:
    """Waits for the ranks, and ends all of them when one is lost."""

    def __init__(self, processes: list[BaseProcess], board: object, messages: Path, group: Group):
        self._processes = processes
        self._board = board
        self._messages = messages
        self._timeout = group.rank_timeout
        self._first = group.first_rank
        self._begin = time.monotonic()
        self._signal = 0
        self._signals = 0

    def wait(self) -> None:
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._wait()
        finally:
            self._kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _wait(self) -> None:
        poll = min(0.5, self._timeout / 10)
        while running := [process for process in self._processes if process.exitcode is None]:
            connection.wait([process.sentinel for process in running], timeout=poll)
            codes = [process.exitcode for process in self._processes]
            if any(code not in (None, 0, *STOPPED) for code in codes) and not self._signal:
                self._wait_a_moment()
                raise UserError(self._describe_death())
            if lost := self._find_hung():
                raise UserError(lost)
        codes = [process.exitcode for process in self._processes]
        if any(codes):
            if self._signal and not self._said():
                # A rank that has saved its state prints that itself; another may lose its connection as that one exits.
                if not set(codes) & set(STOPPED):
                    print(f"stopped by {signal.Signals(self._signal).name}", file=sys.stderr)
                sys.exit(128 + self._signal)
            if set(codes) <= {0, *STOPPED}:  # the ranks received the signals directly
                sys.exit(max(codes))
            raise UserError(self._describe_death())

    def _hand_on(self, number: int, frame: object) -> None:
        self._signal = number
        self._signals += 1
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid, number)
        if self._signals > 1:  # a rank that waits for another one cannot react
            self._wait_a_moment()
            self._kill()

    def _wait_a_moment(self) -> None:
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and any(process.exitcode is None for process in self._processes):
            time.sleep(0.02)

    def _kill(self) -> None:
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
        for process in self._processes:
            process.join()

    def _said(self) -> str:
        """Return the message of the lowest rank that raised an error; "" if none did."""
        files = sorted(self._messages.iterdir(), key=lambda path: int(path.name))
        return files[0].read_text() if files else ""

    def _describe_death(self) -> str:
        if said := self._said():
            return said
        for rank, process in enumerate(self._processes):
            code = process.exitcode
            if code not in (None, 0, LOST_PEER, *STOPPED):
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                name = self._name(rank)
                return f"{name} died ({how}){self._where(rank)}: the others were stopped too; --resume continues"
        rank = min(range(len(self._processes)), key=self._progress)
        name = f"{self._name(rank)}{self._where(rank)}"
        return f"a collective operation failed, probably because of {name}; --resume continues"

    def _find_hung(self) -> str:
        """Return a message that names a rank without heartbeat, or one that all others wait for; "" if none hangs."""
        now = time.monotonic()
        running = [rank for rank, process in enumerate(self._processes) if process.exitcode is None]
        for rank in running:
            alive = self._field(rank, 0)  # 0 while the process starts
            limit = self._timeout if alive else max(self._timeout, START)
            if now - (alive or self._begin) > limit:
                return self._describe_hung(rank)
        inside = running and all(self._field(rank, 3) != OUTSIDE for rank in running)
        limit = self._timeout if all(self._field(rank, 4) for rank in running) else max(self._timeout, START)
        if inside and all(now - self._field(rank, 1) > limit for rank in running):
            return self._describe_hung(min(running, key=self._progress))
        return ""

    def _describe_hung(self, rank: int) -> str:
        where = self._where(rank)
        return (
            f"{self._name(rank)} stopped responding for {self._timeout:g} s{where} (--rank-timeout): all ranks were "
            "stopped; --resume continues"
        )

    def _name(self, rank: int) -> str:
        return f"rank {self._first + rank}"

    def _where(self, rank: int) -> str:
        return f" in iteration {self._field(rank, 2):.0f}" if self._field(rank, 3) != OUTSIDE else ""

    def _progress(self, rank: int) -> tuple[float, float]:
        return self._field(rank, 2), self._field(rank, 3)

    def _field(self, rank: int, field: int) -> float:
        return self._board[rank * _FIELDS + field]
