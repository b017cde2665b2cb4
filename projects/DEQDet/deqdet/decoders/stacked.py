"""The decoder of AdaMixer and Sparse R-CNN: a stack of layers that share no weights."""

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

from ..layers import RefinementLayer, build_refinement_layer
from ..structures import Decoded, Prediction, QueryState
from .base import DECODER_REGISTRY, Decoder, Execution, decode_last, run_layers


@DECODER_REGISTRY.register()
class StackedDecoder(Decoder):
    """T refinement layers with separate weights, all of them supervised (Eq. 1)."""

    @configurable
    def __init__(self, *, layers: list[RefinementLayer]):
        """
        Args:
            layers: the T layers, from first to last.

        Raises:
            ValueError: there are no layers.
        """
        super().__init__()
        if not layers:
            raise ValueError("MODEL.DEQDET.NUM_LAYERS must be at least 1")
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        count = cfg.MODEL.DEQDET.NUM_LAYERS
        return {"layers": [build_refinement_layer(cfg, input_shapes, initialization=i == 0) for i in range(count)]}

    def decode(self, initial: QueryState, features: list[Tensor]) -> Decoded:
        """The prediction of the last layer."""
        return decode_last(run_layers(self.layers, initial, features))

    def execution(self) -> Execution:
        """The first layer once, then T - 1 layers, which differ only in their weights."""
        return Execution(self.layers[0], self.layers[-1], len(self.layers) - 1)

    def supervise(self, initial: QueryState, features: list[Tensor]) -> dict[str, Prediction]:
        """The predictions of all layers: "layer1" to "layer<T>"."""
        states = enumerate(run_layers(self.layers, initial, features), start=1)
        return {f"layer{i}": layer.predict(state) for i, (layer, state) in states}
