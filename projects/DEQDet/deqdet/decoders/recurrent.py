"""RNNDet's decoder: an initialization layer, then one layer unrolled."""

from collections.abc import Iterator

from torch import Tensor

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

from ..layers import RefinementLayer, build_refinement_layer, cast_once
from ..structures import Decoded, Prediction, QueryState
from .base import DECODER_REGISTRY, Decoder, Execution, decode_last, run_layers


@DECODER_REGISTRY.register()
class RecurrentDecoder(Decoder):
    """The initialization layer g, then T - 1 applications of one refinement layer f (RNNDet, Sec. 3.2).

    Training supervises every step and back-propagates through all of them. The parameters have the same names as those
    of EquilibriumDecoder, so that either decoder can start from a checkpoint of the other.
    """

    @configurable
    def __init__(self, *, initialization: RefinementLayer, refinement: RefinementLayer, num_layers: int):
        """
        Args:
            initialization: g.
            refinement: f.
            num_layers: T, the number of steps, including g.

        Raises:
            ValueError: num_layers is below 2, which would leave f unused.
        """
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"MODEL.DEQDET.NUM_LAYERS of a RecurrentDecoder must be at least 2, got {num_layers}")
        self.initialization = initialization
        self.refinement = refinement
        self.num_layers = num_layers

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        return {
            "initialization": build_refinement_layer(cfg, input_shapes, initialization=True),
            "refinement": build_refinement_layer(cfg, input_shapes, initialization=False),
            "num_layers": cfg.MODEL.DEQDET.NUM_LAYERS,
        }

    def decode(self, initial: QueryState, features: list[Tensor]) -> Decoded:
        """The prediction of the last step."""
        states = self._run(cast_once(self.refinement, initial.content.device), initial, features)
        return decode_last((self.refinement, state) for _, state in states)

    def execution(self) -> Execution:
        """g once, then f T - 1 times."""
        return Execution(self.initialization, self.refinement, self.num_layers - 1)

    def supervise(self, initial: QueryState, features: list[Tensor]) -> dict[str, Prediction]:
        """The predictions of all steps: "init" of g, then "step1" to "step<T - 1>"."""
        states = enumerate(self._run(self.refinement, initial, features))
        return {f"step{i}" if i else "init": layer.predict(state) for i, (layer, state) in states}

    def _run(
        self, refinement: RefinementLayer, initial: QueryState, features: list[Tensor]
    ) -> Iterator[tuple[RefinementLayer, QueryState]]:
        return run_layers([self.initialization] + [refinement] * (self.num_layers - 1), initial, features)
