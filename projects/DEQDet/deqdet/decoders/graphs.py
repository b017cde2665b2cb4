"""A whole decode as one CUDA graph: recorded once for each size of images, then replayed with a single launch.

A replay runs the same kernels on the same memory as the recording did. So each image's inputs are copied into the
tensors that were recorded, and the results are copied out. The host must not have to read a result to know what comes
next: the decoder takes a fixed number of steps, or is a stack of layers.
"""

import dataclasses
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..structures import Decoded, Features, QueryState

logger = logging.getLogger(__name__)

WARM_UP = 3  # runs before the recording, in which libraries choose their kernels and f is compiled

Result = TypeVar("Result")
Replay = Callable[[], None]  # computes the outputs of a recording anew, from what its inputs hold now
Recorder = Callable[[Callable[[], Decoded]], tuple[Decoded, Replay]]


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    outputs: Decoded
    replay: Replay


class DecodingGraphs:
    """Recordings of a decoder for the sizes of images that it has met first.

    A size beyond the chosen number, and any size on a device without CUDA graphs, is decoded as usual. A
    recording reads the weights where they were in memory: move the model to its device before the first image.
    """

    def __init__(self, most: int, record: Recorder | None = None):
        """
        Args:
            most: how many sizes to record; each keeps its own memory on the GPU.
            record: makes a recording; by default that of CUDA.
        """
        self._most = most
        self._record = record
        self._recordings: dict[Hashable, _Recording] = {}
        self._usable = True
        self.replays = 0  # calls that were answered by a recording

    def __call__(
        self,
        decode: Callable[[QueryState, Features], Decoded],
        initial: QueryState,
        features: list[Tensor],
        options: Hashable = (),
    ) -> Decoded:
        """Decode by replaying the recording for this size, if there is or can be one.

        Args:
            decode: records no gradient, and needs no result on the host to know what comes next.
            initial, features: as for Decoder.decode.
            options: what else decode depends on, such as its number of steps.
        """
        inputs = [initial.position, initial.content, *features]
        device = inputs[0].device
        if self._record is None and device.type != "cuda":
            self._give_up("there is no CUDA graph on the device %s", device.type)
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

    def _add(self, key: Hashable, decode: Callable[[QueryState, Features], Decoded], inputs: list[Tensor]) -> None:
        # A tensor made in inference mode could not be written to outside of it, as a later call may have to.
        with torch.inference_mode(False):
            kept = [x.clone() for x in inputs]
        record = record_cuda_graph if self._record is None else self._record
        try:
            outputs, replay = record(lambda: decode(QueryState(*kept[:2]), kept[2:]))
        except RuntimeError as error:  # what torch and CUDA raise, for an operation that cannot be recorded
            self._give_up("the decoder could not be recorded: %s", str(error).strip().split("\n")[0])
            return
        self._recordings[key] = _Recording(kept, outputs, replay)

    def _give_up(self, reason: str, *args: object) -> None:
        if self._usable:
            logger.warning("MODEL.DEQDET.CUDA_GRAPHS has no effect: " + reason, *args)
        self._usable = False


def record_cuda_graph(function: Callable[[], Result]) -> tuple[Result, Replay]:
    """Record a function as a CUDA graph, after it has run WARM_UP times on a stream of its own.

    Under autocast, each weight is cast once, and all steps of the function read the copy. The casts are part of the
    recording, so that a replay reads the values that the weights have then.

    Returns:
        What the function returned, in tensors that a replay overwrites; and the replay.

    Raises:
        RuntimeError: an operation cannot be recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Autocast keeps the copies of the weights that it has cast. Those from before the recording would be freed while
    # replays still read them. Those of the recording have no values until it is replayed.
    torch.clear_autocast_cache()
    try:
        with torch.cuda.graph(graph):
            outputs = function()
    finally:
        torch.clear_autocast_cache()
    return outputs, graph.replay


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass of tensors, of such dataclasses and of None, with a function applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    parts = {x.name: _map_tensors(getattr(value, x.name), function) for x in dataclasses.fields(value)}
    return dataclasses.replace(value, **parts)
