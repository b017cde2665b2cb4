"""Measure the latency and memory of a trained model for one image, and describe the machine."""

import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, cycle, islice
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile
from tqdm import tqdm

from detectron2.config import CfgNode

from ..data import build_test_loader
from ..detector import DEQDet
from ..engine import argument_parser, check_run, load_config, parse_arguments
from ..engine.launcher import count_cores
from ..equilibrium import Solver
from ..errors import UserError, plural
from ..predictor import Predictor
from .accuracy import Evaluation
from .cost import count_multiply_adds, count_parameters
from .duplicates import DuplicateCounter, Duplicates, see_images

WARM_UP = 2  # untimed images; `measure` takes the peak memory from them
IMAGES = 20  # images that `measure` times
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


@dataclass(frozen=True)
class Measurement:
    """Size, cost and speed of one model on one machine."""

    parameters: int
    multiply_adds: int  # "linear" in `cost`, for an image of image_size
    image_size: list[int]  # height and width of the first image after resizing, pixels
    ms_per_image: float  # median, one image at a time, without loading it
    inference_memory_mb: float  # peak memory of tensors for one image, including the weights; MiB
    duplicates: Duplicates | None = None  # on the whole test set; None if they were not counted

    @classmethod
    def from_dict(cls, known: dict) -> "Measurement":
        """Invert dataclasses.asdict."""
        duplicates = known.get("duplicates")
        return cls(**{**known, "duplicates": None if duplicates is None else Duplicates(**duplicates)})


def measure_apart(arguments: Sequence[str], weights: Path, log: Path) -> Measurement:
    """Run `measure` and count duplicates in a fresh process, so that no earlier model affects the results.

    If this process is interrupted, it kills the other one, which has nothing to save.

    Args:
        arguments: those of tools/train_net.py.
        weights: a checkpoint of that training.
        log: the file to which the output of the process is appended.

    Raises:
        UserError: the process was killed.
    """
    before = multiprocessing.active_children()
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                with _without_ctrl_c():
                    future = pool.submit(_measure_checkpoint, arguments, weights, log)
                return future.result()
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    if child not in before:
                        child.kill()  # otherwise the pool would wait for it to finish
                raise
    except BrokenProcessPool as error:
        raise UserError(f"the measurement of {weights} was killed: free memory and try again") from error


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Block SIGINT in processes that are started within it; in this process the signal is only delayed.

    Ctrl-C sends SIGINT to all processes of a terminal, and one that is still importing its libraries would print a
    traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _measure_checkpoint(arguments: Sequence[str], weights: Path, log: Path) -> Measurement:
    with open(log, "a") as output:
        for descriptor in (1, 2):  # the profiler's library writes to these directly
            os.dup2(output.fileno(), descriptor)
    model, cfg = build_trained(arguments, weights)
    dataset = cfg.DATASETS.TEST[0]
    measurement = measure(model, build_test_loader(cfg, dataset, WARM_UP + IMAGES))
    count = DuplicateCounter(dataset, Evaluation(dataset, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE))
    return replace(measurement, duplicates=count(list(see_images(model, build_test_loader(cfg, dataset))), 0))


def build_trained(arguments: Sequence[str], weights: Path) -> tuple[DEQDet, CfgNode]:
    """Load the model of a training run in evaluation mode, and its config."""
    args = parse_arguments(argument_parser(), arguments)
    cfg = load_config(args)
    check_run(cfg, args)
    return Predictor.from_config(cfg, weights).model, cfg


@torch.no_grad()
def measure(model: DEQDet, batches: Iterable[list[dict]]) -> Measurement:
    """Measure a model on the first WARM_UP + IMAGES images.

    Args:
        model: in evaluation mode.
        batches: detectron2's inputs, of one image each.

    Raises:
        UserError: there are no more than WARM_UP images.
    """
    sizes, peaks, times = [], [], []
    for batch in islice(batches, WARM_UP + IMAGES):
        sizes.append(list(batch[0]["image"].shape[-2:]))
        if len(peaks) < WARM_UP:
            peaks.append(peak_memory(partial(model, batch), model.device))
        else:
            times.append(timed(partial(model, batch), model.device)[1])
    if not times:
        images = plural(len(sizes), "image")
        raise UserError(f"timing a model needs more than {WARM_UP} images, but the set has {images}: use a larger set")
    height, width = sizes[0]
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return Measurement(
        parameters=count_parameters(model).total,
        multiply_adds=count_multiply_adds(model, height=height, width=width).total.linear,
        image_size=sizes[0],
        ms_per_image=1e3 * median(times),
        inference_memory_mb=(weights + max(peaks)) / 2**20,
    )


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
