"""A whole decode as one CUDA graph: recorded once for each image size, then replayed with a single launch.

A replay runs the recorded kernels on the recorded memory. Therefore the inputs of each image are copied into the
tensors of the recording, and the results are copied out. The sequence of kernels must not depend on their results: the
decoder takes a fixed number of steps, or is a stack of layers.
"""

import dataclasses
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..structures import Decoded, Features, QueryState

logger = logging.getLogger(__name__)

WARM_UP = 3  # runs before the recording, in which libraries select their kernels and f is compiled

Result = TypeVar("Result")
Replay = Callable[[], None]  # computes the outputs of a recording from the current values of its inputs
Recorder = Callable[[Callable[[], Decoded]], tuple[Decoded, Replay]]


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    outputs: Decoded
    replay: Replay


class DecodingGraphs:
    """Recordings of a decoder, one for each of the first few image sizes.

    Further sizes, and all sizes on a device without CUDA graphs, are decoded without a recording. A recording reads the
    weights at fixed addresses: move the model to its device before the first image.
    """

    def __init__(self, most: int, record: Recorder | None = None):
        """
        Args:
            most: the number of sizes to record; each recording keeps its own memory on the GPU.
            record: makes a recording; by default `record_cuda_graph`.
        """
        self._most = most
        self._record = record
        self._recordings: dict[Hashable, _Recording] = {}
        self._usable = True
        self.replays = 0  # the calls that replayed a recording

    def __call__(
        self,
        decode: Callable[[QueryState, Features], Decoded],
        initial: QueryState,
        features: list[Tensor],
        options: Hashable = (),
    ) -> Decoded:
        """Decode by replaying the recording for this image size, making it first if there is none.

        Args:
            decode: the function to record. It records no gradient and never waits for the device.
            initial, features: as for Decoder.decode.
            options: everything else that `decode` depends on, such as its number of steps.
        """
        inputs = [initial.position, initial.content, *features]
        device = inputs[0].device
        if self._record is None and device.type != "cuda":
            self._give_up("CUDA graphs do not exist on the device %s", device.type)
        key = (options, torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
               *((x.shape, x.dtype, x.device) for x in inputs))  # fmt: skip
        if self._usable and key not in self._recordings and len(self._recordings) < self._most:
            self._add(key, decode, inputs)
        if not self._usable or key not in self._recordings:
            return decode(initial, features)
        recording = self._recordings[key]
        for kept, new in zip(recording.inputs, inputs, strict=True):
            kept.copy_(new)
        recording.replay()
        self.replays += 1
        return _map_tensors(recording.outputs, Tensor.clone)

    def __reduce__(self) -> tuple[type["DecodingGraphs"], tuple[int, Recorder | None]]:
        """Make a copy or a pickle of the settings without the recordings, which read the weights of this detector."""
        return DecodingGraphs, (self._most, self._record)

    def _add(self, key: Hashable, decode: Callable[[QueryState, Features], Decoded], inputs: list[Tensor]) -> None:
        # Tensors made in inference mode cannot be written to outside of it, where a later call may run.
        with torch.inference_mode(False):
            kept = [x.clone() for x in inputs]
        record = partial(record_cuda_graph, device=inputs[0].device) if self._record is None else self._record
        try:
            outputs, replay = record(lambda: decode(QueryState(*kept[:2]), kept[2:]))
        except RuntimeError as error:  # torch and CUDA raise it for operations that cannot be recorded
            self._give_up("the decoder could not be recorded: %s", str(error).strip().split("\n")[0])
            return
        self._recordings[key] = _Recording(kept, outputs, replay)

    def _give_up(self, reason: str, *args: object) -> None:
        if self._usable:
            logger.warning("MODEL.DEQDET.CUDA_GRAPHS has no effect: " + reason, *args)
        self._usable = False


def record_cuda_graph(function: Callable[[], Result], device: torch.device) -> tuple[Result, Replay]:
    """Record a function as a CUDA graph, after WARM_UP runs on a separate stream.

    Under autocast, each weight is cast once, and all steps of the function read the cast copy. The casts are part of
    the recording, so that a replay uses the current values of the weights.

    Args:
        device: the GPU on which the function computes, which need not be the current one. What the function does on
            another GPU is not recorded.

    Returns:
        The function's result, in tensors that a replay overwrites; and the replay.

    Raises:
        RuntimeError: an operation cannot be recorded.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Autocast caches its cast copies of the weights. Copies from before the recording would be freed while replays
        # still read them, and copies made during the recording have no values until it is replayed.
        torch.clear_autocast_cache()
        try:
            # By default, torch would use one stream for all recordings of the process, on the GPU of the first.
            with torch.cuda.graph(graph, stream=stream):
                outputs = function()
        finally:
            torch.clear_autocast_cache()
    return outputs, graph.replay


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor of a dataclass, whose fields are tensors, such dataclasses, or None."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    parts = {x.name: _map_tensors(getattr(value, x.name), function) for x in dataclasses.fields(value)}
    return dataclasses.replace(value, **parts)
