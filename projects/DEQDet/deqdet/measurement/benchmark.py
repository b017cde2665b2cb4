"""Measure the time of a detector and its parts, and compare a step with the time of its matrix products alone.

The calls under comparison run alternately, so a change in the machine's speed affects all of them alike. Each call gets
fresh inputs, and the device is synchronised before and after it. The *floor* of a step is the time of its matrix
products alone, on operands of the same shapes, strides and precision.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detectron2.structures import Boxes, Instances

from ..boxes import encode_boxes
from ..decoders import (
    DecodingGraphs,
    EquilibriumDecoder,
    compile_refinement,
    iterate,
    prepare_features,
    record_cuda_graph,
)
from ..detector import DEQDet
from ..equilibrium import FixedPointIteration
from ..errors import UserError
from ..layers.mixing import split_matrices
from ..precision import autocast
from ..structures import Features, QueryState, packing_units
from .memory import training_memory
from .timing import peak_memory, timed

TASKS = ("step", "decoder", "inference", "training", "memory")
# The dtype of autocast; None: no autocast. With tf32, a GPU computes float32 matrix products with 10 mantissa bits.
PRECISIONS = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
STEPS = 5  # length of the solve in which a step is timed, unless the setting gives another
BOXES = 10  # per training image
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """The duration of one call in milliseconds, over all repeats."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @classmethod
    def of(cls, times: Sequence[float], parts: int = 1) -> "Timing":
        """Summarise durations in seconds of calls that consist of `parts` equal parts; the result is for one part."""
        low, _, high = quantiles(times, n=4, method="inclusive")  # never outside the measured range
        return cls(*(1e3 * x / parts for x in (median(times), low, high)))


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    task: str
    height: int  # image size in pixels, before the model pads it
    width: int
    batch: int
    precision: str
    # Steps of the decoder, or of the solve in which a step is timed. None: the decoder's own number, or STEPS.
    steps: int | None = None
    compiled: bool = False
    graph: bool = False  # replay a recorded CUDA graph, see DecodingGraphs; not in training
    compute: bool = True  # task memory: run both passes to measure the peak
    repeats: int = 20
    warm_up: int = 3


def interleave(
    calls: Mapping[str, Call], device: torch.device, *, repeats: int, warm_up: int
) -> dict[str, list[float]]:
    """Run calls alternately, and return the durations of each in seconds, without the first `warm_up` rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + repeats):
        for name, call in calls.items():
            times[name].append(timed(call, device)[1])
    return {name: found[warm_up:] for name, found in times.items()}


def benchmark(model: DEQDet, setting: Setting) -> dict[str, Any]:
    """Measure one task of a model.

    MODEL.DEQDET.CUDA_GRAPHS is ignored: `setting` alone decides whether a graph is replayed. Build the model without
    MODEL.DEQDET.COMPILE and with TEST.PRECISION float32, because `setting` decides on these as well.

    Returns:
        A dict for JSON with median_ms, low_ms and high_ms (quartiles) of the task, and peak_mb, the peak memory of
        tensors without the weights in MiB (None for a recorded graph). Further keys by task:

        - step: floor_ms; in eager mode, simple_ms, the same step on features that were not prepared; on CUDA, kernels,
          moved_mb and bandwidth_ms.
        - training: forward_ms, backward_ms, optimizer_ms.
        - memory: only `memory`, a list of dicts with points, recomputed, saved_mb and, if both passes were run, peak_mb
          (see TrainingMemory).

    Raises:
        UserError: the decoder cannot be recorded as a graph.
    """
    torch.manual_seed(0)
    if setting.compiled and setting.task != "step":  # _step records the eager step's products before it compiles
        compile_refinement(model.decoder)
    model.graphs = DecodingGraphs(1) if setting.graph else None  # all inputs have the same size
    run = {"step": _step, "decoder": _decoder, "inference": _inference, "training": _training, "memory": _memory}
    trains = setting.task in ("training", "memory")
    with torch.set_grad_enabled(trains), _matrix_precision(setting):
        return run[setting.task](model.train(trains), setting)


@contextmanager
def _matrix_precision(setting: Setting) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if setting.precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _autocast(model: DEQDet, setting: Setting) -> AbstractContextManager:
    return autocast(model.device.type, PRECISIONS[setting.precision])


def _images(model: DEQDet, setting: Setting) -> list[dict]:
    """Make a batch of noise images, with boxes for training."""
    batch = []
    for _ in range(setting.batch):
        image = torch.randint(0, 256, (3, setting.height, setting.width), dtype=torch.uint8)
        inputs: dict[str, Any] = {"image": image}
        if setting.task == "training":
            size = torch.tensor([setting.width, setting.height])
            corners = torch.rand(BOXES, 2) * 0.7 * size
            boxes = torch.cat([corners, corners + (0.05 + 0.25 * torch.rand(BOXES, 2)) * size], dim=1)
            classes = torch.randint(0, model.criterion.num_classes, (BOXES,))
            inputs["instances"] = Instances(image.shape[1:], gt_boxes=Boxes(boxes), gt_classes=classes)
        batch.append(inputs)
    return batch


def _encoded(model: DEQDet, setting: Setting) -> tuple[QueryState, Features]:
    """Compute the initial queries and the features of a batch of noise images."""
    with _autocast(model, setting):
        features, initial = model.encode(model.preprocess(_images(model, setting)))
    return initial, features


def _random_state(initial: QueryState, setting: Setting) -> QueryState:
    """Make a state with content of unit variance, and boxes all over the image of 1/20 to 3/5 of its sides."""
    batch, queries = initial.position.shape[:2]
    device = initial.content.device
    size = torch.tensor([setting.width, setting.height], device=device)
    center = torch.rand(batch, queries, 2, device=device) * size
    half = (0.025 + 0.275 * torch.rand(batch, queries, 2, device=device)) * size
    content = torch.randn_like(initial.content)
    return QueryState(encode_boxes(torch.cat([center - half, center + half], dim=2)), content)


def _step(model: DEQDet, setting: Setting) -> dict[str, Any]:
    layer, units = model.decoder.execution().refinement, packing_units(model.device)
    initial, plain = _encoded(model, setting)
    steps = STEPS if setting.steps is None else setting.steps
    states = cycle([_random_state(initial, setting) for _ in range(4)])
    with _autocast(model, setting):
        prepared = prepare_features([layer], plain)

    def walk(features: Features, count: int, start: QueryState) -> None:
        with _autocast(model, setting):
            iterate(layer, start, features, solver=FixedPointIteration(), steps=count, units=units)

    with _Operations() as seen:  # of the eager step: a compiled one hides its operators
        walk(prepared, 1, next(states))
    calls = {
        "step": lambda: walk(prepared, steps, next(states)),
        "floor": lambda: [seen.products() for _ in range(steps)],
    }
    if setting.compiled:
        compile_refinement(model.decoder)
    if setting.graph:
        state = next(states)
        kept = QueryState(state.position.clone(), state.content.clone())
        with _autocast(model, setting):
            replay = record_cuda_graph(lambda: walk(prepared, steps, kept), model.device)[1]

        def walk_again() -> None:
            state = next(states)
            kept.position.copy_(state.position)
            kept.content.copy_(state.content)
            replay()

        calls = {"step": walk_again, "floor": record_cuda_graph(calls["floor"], model.device)[1]}
    elif not setting.compiled:
        calls["simple"] = lambda: walk(plain, steps, next(states))
    times = interleave(calls, model.device, repeats=setting.repeats, warm_up=setting.warm_up)
    found = _report({name: Timing.of(x, parts=steps) for name, x in times.items()}, "step")
    found["peak_mb"] = _peak_mb(calls["step"], model, setting)
    if model.device.type == "cuda":
        bandwidth, kernels = _copy_bandwidth(model.device), _count_kernels(calls["step"], model.device) / steps
        found |= {"kernels": kernels, "moved_mb": seen.moved / 2**20, "bandwidth_ms": 1e3 * seen.moved / bandwidth}
    return found


def _decoder(model: DEQDet, setting: Setting) -> dict[str, Any]:
    inputs = cycle([_encoded(model, setting) for _ in range(2)])

    def decode() -> None:
        with _autocast(model, setting):
            model.decode_queries(*next(inputs), steps=setting.steps)

    return _time_one(decode, model, setting)


def _inference(model: DEQDet, setting: Setting) -> dict[str, Any]:
    inputs = cycle([_images(model, setting) for _ in range(2)])

    def infer() -> None:
        with _autocast(model, setting):
            model.infer(next(inputs), steps=setting.steps)

    return _time_one(infer, model, setting)


def _training(model: DEQDet, setting: Setting) -> dict[str, Any]:
    """Time the parts of a training iteration with AdamW, which is fused on CUDA."""
    inputs = cycle([_images(model, setting) for _ in range(2)])
    weights = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-7, fused=model.device.type == "cuda")
    losses: list[Tensor] = []

    def forward() -> None:
        with _autocast(model, setting):
            losses[:] = [sum(model(next(inputs)).values())]

    def backward() -> None:
        losses.pop().backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def iteration() -> None:
        forward()
        backward()
        update()

    calls = {"forward": forward, "backward": backward, "optimizer": update}
    times = interleave(calls, model.device, repeats=setting.repeats, warm_up=setting.warm_up)
    times["iteration"] = [sum(parts) for parts in zip(*times.values(), strict=True)]
    found = _report({name: Timing.of(x) for name, x in times.items()}, "iteration")
    return found | {"peak_mb": peak_memory(iteration, model.device) / 2**20}


def _memory(model: DEQDet, setting: Setting) -> dict[str, Any]:
    with torch.no_grad():
        initial, features = _encoded(model, setting)
    decoder = model.decoder
    counts = range(decoder.supervision.count + 1) if isinstance(decoder, EquilibriumDecoder) else ()
    with _autocast(model, setting):
        found = training_memory(decoder, initial, features, counts, compute=setting.compute)
    rows = []
    for x in found:
        peak = {} if x.peak is None else {"peak_mb": x.peak / 2**20}
        rows.append({"points": x.points, "recomputed": x.recomputed, "saved_mb": x.saved / 2**20, **peak})
    return {"memory": rows}


def _time_one(call: Call, model: DEQDet, setting: Setting) -> dict[str, Any]:
    times = interleave({"task": call}, model.device, repeats=setting.repeats, warm_up=setting.warm_up)
    if setting.graph and not model.graphs.replays:
        raise UserError("the decoder was not recorded as a graph: set MODEL.DEQDET.SOLVER.RTOL to 0 (no tolerance)")
    found = _report({"task": Timing.of(times["task"])}, "task")
    return found | {"peak_mb": _peak_mb(call, model, setting)}


def _peak_mb(call: Call, model: DEQDet, setting: Setting) -> float | None:
    """Measure the peak memory in MiB; None for a CUDA graph, which allocates its memory before the replay."""
    return None if setting.graph else peak_memory(call, model.device) / 2**20


def _report(timings: dict[str, Timing], main: str) -> dict[str, Any]:
    whole = timings.pop(main)
    found = {"median_ms": whole.median, "low_ms": whole.low, "high_ms": whole.high}
    return found | {f"{name}_ms": timing.median for name, timing in timings.items()}


class _Operations(TorchDispatchMode):
    """Records the matrix products that run within it, and counts the bytes that all operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.products_seen: list[tuple[Callable, tuple, dict]] = []
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func.overloadpacket)
        if name in PRODUCTS:
            self.products_seen.append((func, args, kwargs))
        elif "scaled_dot_product" in name:  # the two products of attention, without the softmax
            query, key, value = (x.flatten(0, 1) for x in args[:3])
            weights = query @ key.transpose(1, 2)
            self.products_seen += [(torch.bmm, (query, key.transpose(1, 2)), {}), (torch.bmm, (weights, value), {})]
        elif name == "deqdet.mix":  # the two products of adaptive mixing, without the norms
            samples, matrices, out_points = args
            points, channels = samples.shape[3:]
            split = split_matrices(matrices, points=points, out_points=out_points, channels=channels)
            x, m, s = (x.flatten(0, 2) for x in (samples, *split))
            self.products_seen += [(torch.bmm, (x, m), {}), (torch.bmm, (s, x @ m), {})]
        returns = func._schema.returns
        if returns and not all(x.alias_info is not None and not x.alias_info.is_write for x in returns):
            self.moved += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        return result

    def products(self) -> None:
        """Run the recorded matrix products alone."""
        for func, args, kwargs in self.products_seen:
            func(*args, **kwargs)


def _count_kernels(call: Call, device: torch.device) -> int:
    """Count the kernels that a call launches on a GPU, including copies on the device."""
    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiled.events())


def _copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Measure the bytes per second that a copy on the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, device, repeats=20, warm_up=3)
    return 2 * size / median(times["copy"])
