"""Measure size, cost, speed and memory of a checkpoint, in a process of its own."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from detectron2.config import CfgNode

from ..data import build_test_loader
from ..detector import DEQDet
from ..engine import argument_parser, check_run, load_config, parse_arguments
from ..errors import UserError, plural
from ..predictor import Predictor
from .accuracy import Evaluation
from .cost import count_multiply_adds, count_parameters
from .duplicates import DuplicateCounter, Duplicates, see_images
from .timing import WARM_UP, peak_memory, timed

IMAGES = 20  # images that `measure` times, after WARM_UP others, which give the peak memory


@dataclass(frozen=True)
class Measurement:
    """Size, cost and speed of one model on one machine."""

    parameters: int
    multiply_adds: int  # "linear" in `cost`, for an image of image_size
    image_size: list[int]  # height and width of the first image after resizing, pixels
    ms_per_image: float  # median, one image at a time, without loading it
    inference_memory_mb: float  # peak memory of tensors for one image, including the weights; MiB
    duplicates: Duplicates | None = None  # on the whole test set; None if they were not counted
    steps: int | None = None  # maximum applications of f to an image; None if an earlier version measured the model

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
        steps=model.decoder.execution().steps,
    )
