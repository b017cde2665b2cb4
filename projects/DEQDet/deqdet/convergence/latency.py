"""How long an image takes, from the time of one step."""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median

import torch
from tqdm import tqdm

from detectron2.modeling import detector_postprocess

from ..detector import DEQDet
from ..equilibrium import Solver
from ..inference import top_detections
from ..structures import QueryState
from ..timing import timed

WARM_UP = 2  # runs before the clock counts
RUNS = 10  # that are timed
STEPS = 10  # of a run; a solver's memory is full for most of them


@dataclass(frozen=True)
class Latency:
    """Seconds for one image, without loading it."""

    fixed: float  # preprocessing, backbone and neck, initialization layer, read-out, postprocessing
    per_step: float  # one application of f, and what the solver does beside it

    def of(self, steps: int) -> float:
        """Of the whole detector with that many steps."""
        return self.fixed + steps * self.per_step


@torch.no_grad()
def measure_latencies(
    model: DEQDet, batches: Iterable[list[dict]], solvers: Mapping[str, Solver]
) -> dict[str, Latency]:
    """The medians of RUNS runs, by the solver's name.

    Args:
        model: with an EquilibriumDecoder, in eval mode.
        batches: of detectron2's inputs, of one image each: at least one; the first RUNS are used in turn.
    """
    fixed: list[float] = []
    per_step: dict[str, list[float]] = {name: [] for name in solvers}
    images = cycle(list(islice(batches, RUNS)))
    for batch in tqdm(islice(images, WARM_UP + RUNS), desc="latency", total=WARM_UP + RUNS, disable=None):
        (features, start), before = timed(partial(_start, model, batch), model.device)
        for name, solver in solvers.items():
            solve = partial(model.decoder.solve, start, features, steps=STEPS, solver=solver)
            per_step[name].append(timed(solve, model.device)[1] / STEPS)
        after = timed(partial(_read_out, model, batch, start), model.device)[1]
        fixed.append(before + after)
    return {name: Latency(median(fixed[WARM_UP:]), median(times[WARM_UP:])) for name, times in per_step.items()}


def describe_device(device: torch.device) -> str:
    """For the reader of a latency."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU ({platform.machine()}, {torch.get_num_threads()} thread(s))"


def _start(model: DEQDet, batch: list[dict]) -> tuple[list[torch.Tensor], QueryState]:
    features, initial = model.encode(model.preprocess(batch))
    return features, model.decoder.initialize(initial, features)


def _read_out(model: DEQDet, batch: list[dict], state: QueryState) -> None:
    sizes = [tuple(inputs["image"].shape[-2:]) for inputs in batch]
    detections = top_detections(model.decoder.refinement.predict(state), sizes, model.max_detections)
    for found, inputs in zip(detections, batch, strict=True):
        detector_postprocess(found, inputs["height"], inputs["width"])
