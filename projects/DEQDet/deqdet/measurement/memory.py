"""Measure the memory that training keeps for the backward pass, against the number of supervised states |Omega|.

Saved-tensor hooks report the tensors that autograd saves; each storage is counted once, and parameters are left out.
The count is a property of the graph, the same on a CPU and a GPU except for what their kernels save. It depends only on
the sizes of the tensors, so FakeTensorMode can determine it without computing anything. The peak has to be measured.
"""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, UntypedStorage
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..decoders import EquilibriumDecoder
from ..errors import UserError
from ..structures import Features, QueryState
from .timing import peak_memory


@dataclass(frozen=True)
class TrainingMemory:
    """Memory for one forward and backward pass of the decoder, without weights and features."""

    points: int  # |Omega|
    recomputed: bool  # CHECKPOINT_SEGMENTS
    saved: int  # bytes that are kept between the forward and the backward pass
    peak: int | None  # bytes, the maximum during both passes; None if nothing was computed


def saved_bytes(call: Callable[[], Any], without: Collection[Tensor] = ()) -> int:
    """Count the bytes that autograd saves during a call, each storage once.

    Args:
        call: runs with gradients, and returns its result, which keeps the graph alive until everything is counted.
        without: tensors to leave out, such as parameters.
    """
    known = [x.untyped_storage() for x in without]
    # Compared by id(), since a fake tensor's storage has no address. Ids are unique while `known` keeps the storages.
    outside = {id(x) for x in known}
    saved: dict[int, UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in outside:
            saved[id(storage)] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(x.nbytes() for x in saved.values())


def training_memory(
    decoder: EquilibriumDecoder,
    initial: QueryState,
    features: Features,
    counts: Collection[int],
    *,
    compute: bool = True,
) -> list[TrainingMemory]:
    """Measure a decoder with and without CHECKPOINT_SEGMENTS, for several SUPERVISION_COUNTs.

    Args:
        decoder: in training mode; its settings are restored afterwards.
        initial, features: the arguments of its `supervise`; their gradients are discarded.
        counts: the m of Omega = {1, C, 2C, ..., mC, T}.
        compute: run both passes to measure the peak. If False, the saved tensors are counted from their sizes alone,
            which takes seconds for a model of any size.

    Raises:
        UserError: the decoder has no equilibrium.
    """
    if not isinstance(decoder, EquilibriumDecoder):
        raise UserError(
            f"MODEL.DEQDET.DECODER is {type(decoder).__name__}, which has no |Omega|: --task memory needs the "
            "EquilibriumDecoder"
        )
    before, found = (decoder.supervision, decoder.checkpoint_segments), []
    mode = nullcontext() if compute else FakeTensorMode(allow_non_fake_inputs=True)
    if not compute:
        features = [mode.from_tensor(x) for x in features]
        initial = QueryState(mode.from_tensor(initial.position), mode.from_tensor(initial.content))
    parameters = [x if compute else mode.from_tensor(x) for x in decoder.parameters()]
    outside = [*parameters, *features, initial.position, initial.content]
    features = [x.detach().requires_grad_() for x in features]

    def forward() -> Tensor:
        return sum(x.logits.sum() + x.boxes.sum() for x in decoder.supervise(initial, features).values())

    try:
        for recomputed in (False, True):
            for count in counts:
                decoder.supervision, decoder.checkpoint_segments = replace(before[0], count=count), recomputed
                with mode:
                    saved = saved_bytes(forward, without=outside)
                peak = peak_memory(lambda: forward().backward(), features[0].device) if compute else None
                decoder.zero_grad()
                found.append(TrainingMemory(len(decoder.supervision.steps), recomputed, saved, peak))
    finally:
        decoder.supervision, decoder.checkpoint_segments = before
    return found
