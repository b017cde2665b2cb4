"""A custom decoder: the initialization layer, then the refinement layer twice; only the last pass is supervised."""

from torch import Tensor

from detectron2.config import configurable

from deqdet.decoders import DECODER_REGISTRY, Decoder, Execution
from deqdet.layers import RefinementLayer, build_refinement_layer
from deqdet.structures import Decoded, Prediction, QueryState


@DECODER_REGISTRY.register()
class TwoPassDecoder(Decoder):
    """Two refinements by one layer, with gradient through both."""

    @configurable
    def __init__(self, *, initialization: RefinementLayer, refinement: RefinementLayer):
        super().__init__()
        self.initialization = initialization
        self.refinement = refinement

    @classmethod
    def from_config(cls, cfg, input_shapes):
        return {
            "initialization": build_refinement_layer(cfg, input_shapes, initialization=True),
            "refinement": build_refinement_layer(cfg, input_shapes, initialization=False),
        }

    def supervise(self, initial: QueryState, features: list[Tensor]) -> dict[str, Prediction]:
        first = self.initialization(initial, features)
        return {
            "first": self.initialization.predict(first),
            "last": self.refinement.predict(self.refine_twice(first.detach_position(), features)),
        }

    def decode(self, initial: QueryState, features: list[Tensor]) -> Decoded:
        state = self.refine_twice(self.initialization(initial, features), features)
        return Decoded(
            prediction=self.refinement.predict(state),
            steps=state.content.new_full((len(state.content),), 2).long(),
            finite=state.pack().isfinite().all(dim=1),
        )

    def execution(self) -> Execution:
        return Execution(self.initialization, self.refinement, steps=2)

    def refine_twice(self, state: QueryState, features: list[Tensor]) -> QueryState:
        for _ in range(2):
            state = self.refinement(state.detach_position(), features)
        return state
