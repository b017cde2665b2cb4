"""Measure the time and memory of a call and the latency of a detector, and describe the machine."""

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle, islice
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile
from tqdm import tqdm

from ..detector import DEQDet
from ..engine.launcher import count_cores
from ..equilibrium import Solver
from ..errors import plural

WARM_UP = 2  # untimed images at the beginning of every measurement
RUNS = 10  # walks of which a Latency is the median
STEPS = 10  # steps of such a walk; a solver's history is full for most of them

Result = TypeVar("Result")


def timed(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Call, and return the result and the duration in seconds. The device is synchronised before and after the call."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def describe_machine(device: torch.device | None = None) -> str:
    """Describe the machine in one line, or only one of its devices, and the version of torch."""
    version = f"torch {torch.__version__}"
    if device is not None and device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {version}"
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    parts = [name, f"{count_cores()} cores"]
    if device is not None:
        parts.append(plural(torch.get_num_threads(), "thread"))
    elif torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, version])


@dataclass(frozen=True)
class Latency:
    """Seconds for one image, without loading it."""

    fixed: float  # preprocessing, backbone and neck, initialization layer, read-out, postprocessing
    per_step: float  # one application of f, with the work of the solver

    def of(self, steps: int) -> float:
        """Return the seconds for the whole detector with this number of steps."""
        return self.fixed + steps * self.per_step


def measure_latencies(
    model: DEQDet, batches: Iterable[list[dict]], solvers: Mapping[str, Solver]
) -> dict[str, Latency]:
    """Measure the latency with each solver, by the solver's name, as medians of RUNS walks.

    The fixed cost is that of a walk without steps and its read-out. A walk of STEPS steps takes longer by STEPS
    applications of f. All walks of an image run in succession, so a change in the machine's speed affects all solvers
    alike.

    Args:
        model: in evaluation mode.
        batches: detectron2's inputs, at least one, each of one image. The first RUNS images are used in turn.

    Raises:
        UserError: the decoder has no equilibrium.
    """
    fixed: list[float] = []
    per_step: dict[str, list[float]] = {name: [] for name in solvers}
    images = cycle(list(islice(batches, RUNS)))
    for batch in tqdm(islice(images, WARM_UP + RUNS), desc="latency", total=WARM_UP + RUNS, disable=None):
        start, before = timed(partial(model.walk, batch, steps=0, rtol=0.0), model.device)
        fixed.append(before + timed(start.detections, model.device)[1])
        for name, solver in solvers.items():
            walk = partial(model.walk, batch, steps=STEPS, rtol=0.0, solver=solver)
            per_step[name].append((timed(walk, model.device)[1] - before) / STEPS)
    return {name: Latency(median(fixed[WARM_UP:]), median(times[WARM_UP:])) for name, times in per_step.items()}


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Measure the peak memory of tensors on `device` during a call, in bytes, beyond that before the call."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as profiled:
        call()
    # There is one event for each allocation, and one with a negative size for each release.
    events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == DeviceType.CPU]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes), default=0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
