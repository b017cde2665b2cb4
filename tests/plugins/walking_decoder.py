"""A custom decoder with an equilibrium: no initialization layer, and training through three unrolled steps."""

from torch import Tensor

from detectron2.config import configurable

from deqdet.decoders import (
    DECODER_REGISTRY,
    Decoder,
    Execution,
    Trajectory,
    build_solver,
    iterate,
    packed_map,
    prepare_features,
)
from deqdet.equilibrium import Solver
from deqdet.layers import RefinementLayer, build_refinement_layer
from deqdet.structures import Decoded, Prediction, QueryState, packing_units


@DECODER_REGISTRY.register()
class WalkingDecoder(Decoder):
    """The fixed point of one layer f, which starts at the initial queries."""

    has_equilibrium = True

    @configurable
    def __init__(self, *, refinement: RefinementLayer, solver: Solver, test_steps: int, rtol: float):
        super().__init__()
        self.refinement = refinement
        self.solver, self.test_steps, self.rtol = solver, test_steps, rtol  # what the tools read

    @classmethod
    def from_config(cls, cfg, input_shapes):
        return {
            "refinement": build_refinement_layer(cfg, input_shapes, initialization=False),
            "solver": build_solver(cfg),
            "test_steps": cfg.MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS,
            "rtol": cfg.MODEL.DEQDET.SOLVER.RTOL,
        }

    def supervise(self, initial: QueryState, features: list[Tensor]) -> dict[str, Prediction]:
        features, state, predictions = prepare_features([self.refinement], features), initial, {}
        for step in (1, 2, 3):
            state = self.refinement(state.detach_position(), features)
            predictions[f"step{step}"] = self.refinement.predict(state)
        return predictions

    def walk(
        self, initial, features, *, steps=None, rtol=None, solver=None, record=(), record_iterates=False
    ) -> Trajectory:
        steps, rtol, solver = self.options(steps, rtol, solver)  # the decoder's own in place of None
        features, units = prepare_features([self.refinement], features), packing_units(features[0].device)
        recorded = {"record": record, "record_iterates": record_iterates}
        solution = iterate(self.refinement, initial, features, solver=solver, steps=steps, rtol=rtol, **recorded)
        return Trajectory(
            initial=initial,
            start=initial,
            solution=solution,
            refine=packed_map(self.refinement, features, initial.content.shape[1]),
            initialization=None,
            refinement=self.refinement,
            units=units,
        )

    def decode(self, initial: QueryState, features: list[Tensor]) -> Decoded:
        return self.walk(initial, features).decoded()

    def execution(self) -> Execution:
        return Execution(None, self.refinement, self.test_steps)
