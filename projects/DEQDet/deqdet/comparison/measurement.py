"""Size, cost and speed of a trained model at inference, measured in a process of its own."""

import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model

from ..analysis import count_multiply_adds, count_parameters
from ..detector import DEQDet
from ..engine import argument_parser, load_config
from ..engine.configuration import adapt_device, check_run
from ..engine.launcher import count_cores
from ..errors import UserError
from ..timing import timed

WARM_UP = 2  # images that the memory is measured on, before the clock counts
IMAGES = 20  # that are timed


@dataclass(frozen=True)
class Measurement:
    """Of one model on one machine."""

    parameters: int
    multiply_adds: int  # of convolutions and linear layers on an image of image_size, see deqdet.analysis
    image_size: list[int]  # height and width of the first image as the model gets it, pixels
    ms_per_image: float  # median, one image at a time, without loading it
    inference_memory_mb: float  # the most that tensors took for one image, weights included; MiB


def measure_apart(arguments: Sequence[str], weights: Path, log: Path) -> Measurement:
    """`measure` in a fresh process, where nothing of a training or of another model is left.

    Args:
        arguments: of tools/train_net.py.
        weights: a checkpoint of that training.
        log: what the process prints is added to this file.

    Raises:
        UserError: the process was killed.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure_checkpoint, arguments, weights, log).result()
    except BrokenProcessPool as error:
        raise UserError(f"the measurement of {weights} was killed: free memory and try again") from error


def _measure_checkpoint(arguments: Sequence[str], weights: Path, log: Path) -> Measurement:
    with open(log, "a") as output:
        for descriptor in (1, 2):  # the profiler's library writes to them directly
            os.dup2(output.fileno(), descriptor)
    model, batches = build_trained(arguments, weights)
    return measure(model, batches)


def build_trained(arguments: Sequence[str], weights: Path) -> tuple[DEQDet, Iterable[list[dict]]]:
    """The model with the weights of a checkpoint, in eval mode, and the loader of its first test set."""
    args = argument_parser().parse_args(arguments)
    cfg = load_config(args)
    adapt_device(cfg)
    check_run(cfg, args)
    model = build_model(cfg).eval()
    # The optimizer's state stays on the disk, and the weights take the place of the random ones.
    state = torch.load(weights, map_location="cpu", mmap=True, weights_only=True)["model"]
    model.load_state_dict(state, assign=True)
    return model.to(cfg.MODEL.DEVICE), build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])


@torch.no_grad()
def measure(model: DEQDet, batches: Iterable[list[dict]]) -> Measurement:
    """
    Args:
        model: in eval mode.
        batches: of detectron2's inputs, of one image each; the first WARM_UP + IMAGES are used.

    Raises:
        ValueError: there are not more images than WARM_UP.
    """
    sizes, peaks, times = [], [], []
    for batch in islice(batches, WARM_UP + IMAGES):
        sizes.append(list(batch[0]["image"].shape[-2:]))
        if len(peaks) < WARM_UP:
            peaks.append(peak_memory(partial(model, batch), model.device))
        else:
            times.append(timed(partial(model, batch), model.device)[1])
    if not times:
        raise ValueError(f"{len(sizes)} image(s) are too few to time a model: give more than {WARM_UP}")
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
    """The most bytes that tensors on `device` take during a call, beside those that are there before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as profiled:
        call()
    # One event for each allocation, and for each release with a negative size.
    events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == DeviceType.CPU]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes), default=0)


def describe_machine() -> str:
    """Processor, cores, GPUs and the version of torch, in one line."""
    name = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    parts = [name, f"{count_cores()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, f"torch {torch.__version__}"])
