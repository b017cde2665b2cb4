"""What the detector asks of a decoder, and the registry that config names choose from."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from ..layers import RefinementLayer, look_up
from ..structures import Decoded, QueryState

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders, called as `obj(cfg, input_shapes)` with the pyramid's ShapeSpecs, finest first. Methods:
`supervise(initial, features) -> dict[str, Prediction]`, every prediction to be supervised by its name;
`decode(initial, features) -> Decoded`.
"""


def build_decoder(cfg: CfgNode, input_shapes: list[ShapeSpec]) -> nn.Module:
    """The decoder that MODEL.DEQDET.DECODER names."""
    return look_up(DECODER_REGISTRY, "MODEL.DEQDET.DECODER", cfg.MODEL.DEQDET.DECODER)(cfg, input_shapes)


def run_layers(
    layers: Iterable[RefinementLayer], initial: QueryState, features: list[Tensor]
) -> Iterator[tuple[RefinementLayer, QueryState]]:
    """Each layer and the state that it returned, one after the other; positions are detached between them."""
    state = initial
    for layer in layers:
        state = layer(state, features)
        yield layer, state
        state = state.detach_position()


def decode_last(states: Iterable[tuple[RefinementLayer, QueryState]]) -> Decoded:
    """What the last layer of a fixed number of them reads out of its own state."""
    *earlier, (layer, state) = states
    return Decoded(
        prediction=layer.predict(state),
        steps=torch.full_like(state.content[:, 0, 0], len(earlier), dtype=torch.int64),
        finite=state.pack().isfinite().all(dim=1),
    )
