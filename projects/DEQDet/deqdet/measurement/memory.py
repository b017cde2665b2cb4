"""How much memory training keeps for the backward pass, against the number of supervised states |Omega|.

Counted are the tensors that autograd saves, each storage once and without parameters, as torch hands them to the hooks
of saved tensors. This is a property of the graph, the same on a CPU and on a GPU up to what their kernels save; the
peak of the whole pass is measured beside it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..decoders import EquilibriumDecoder
from ..errors import UserError
from ..structures import Features, QueryState
from .timing import peak_memory


@dataclass(frozen=True)
class TrainingMemory:
    """What one forward and backward pass of the decoder takes, beside weights and features."""

    points: int  # |Omega|
    recomputed: bool  # CHECKPOINT_SEGMENTS
    saved: int  # bytes that are kept between the forward and the backward pass
    peak: int  # bytes, the most at any time of both passes


def saved_bytes(call: Callable[[], Any], without: Collection[Tensor] = ()) -> int:
    """The bytes that autograd saves during a call, each storage once.

    Args:
        call: computes something with gradient, and returns it, so that its graph lives until all is counted.
        without: tensors that do not count, such as parameters.
    """
    known = {x.untyped_storage().data_ptr() for x in without}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(sizes.values())


def training_memory(
    decoder: EquilibriumDecoder, initial: QueryState, features: Features, counts: Collection[int]
) -> list[TrainingMemory]:
    """Measure a decoder with and without CHECKPOINT_SEGMENTS, for several SUPERVISION_COUNTs.

    Args:
        decoder: in training mode. It is as before afterwards.
        initial, features: as for its `supervise`; their gradients are discarded.
        counts: the m of Omega = {1, C, 2C, ..., mC, T}.

    Raises:
        UserError: the decoder has no equilibrium.
    """
    if not isinstance(decoder, EquilibriumDecoder):
        raise UserError(
            f"MODEL.DEQDET.DECODER is {type(decoder).__name__}, which has no |Omega|: --task memory needs the "
            "EquilibriumDecoder"
        )
    before, found = (decoder.supervision, decoder.checkpoint_segments), []
    outside = [*decoder.parameters(), *features, initial.position, initial.content]
    features = [x.detach().requires_grad_() for x in features]

    def forward() -> Tensor:
        return sum(x.logits.sum() + x.boxes.sum() for x in decoder.supervise(initial, features).values())

    try:
        for recomputed in (False, True):
            for count in counts:
                decoder.supervision, decoder.checkpoint_segments = replace(before[0], count=count), recomputed
                saved = saved_bytes(forward, without=outside)
                peak = peak_memory(lambda: forward().backward(), features[0].device)
                decoder.zero_grad()
                found.append(TrainingMemory(len(decoder.supervision.steps), recomputed, saved, peak))
    finally:
        decoder.supervision, decoder.checkpoint_segments = before
    return found
