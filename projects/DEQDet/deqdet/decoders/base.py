"""What the detector asks of a decoder, and the registry that config names choose from."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from ..layers import RefinementLayer, look_up
from ..structures import QueryState

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders, called as `obj(cfg, input_shapes)` with the pyramid's ShapeSpecs, finest first. Methods:
`supervise(initial, features) -> dict[str, Prediction]`, every prediction to be supervised by its name;
`decode(initial, features) -> Prediction`.
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
