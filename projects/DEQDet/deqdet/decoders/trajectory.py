"""The trajectory of a batch, from the initial queries to the fixed points.

`EquilibriumDecoder.walk` returns a Trajectory. Everything that looks at the solving path uses it: detections at test
time, residuals, tables of AP against steps, latencies, pictures of the refinement.

B: images, N: queries, D = N * (4 + C): numbers of a packed state.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..equilibrium import Map, Solution, Status, relative_residual
from ..layers import RefinementLayer
from ..structures import Decoded, Prediction, QueryState


@dataclass(frozen=True)
class ResidualParts:
    """How much one application of f changed the states of B images, by part."""

    content: Tensor  # (B,)  relative, ||f(q) - q|| / ||f(q)|| over all queries
    position: Tensor  # (B,)  relative, of the position in packing units
    content_norm: Tensor  # (B,)  ||f(q) - q||, absolute


@dataclass(frozen=True)
class Trajectory:
    """The states of B images along their solving path y_0, f(y_0), ...

    Step 0 is y_0 = g(x, y_0-), the output of the initialization layer. Step t is the output of the t-th application of
    f, or with return_best the output with the smallest residual so far. Steps other than the last one are only there if
    they were recorded.
    """

    initial: QueryState  # y_0-: the learned queries, before g
    start: QueryState  # y_0
    solution: Solution  # on packed states
    refine: Map  # f on packed states (B, D), with these images' features
    initialization: RefinementLayer | None  # g
    refinement: RefinementLayer  # f
    units: Tensor  # (4,)  the result of packing_units

    def state(self, step: int | None = None) -> QueryState:
        """The state after `step` applications of f, or after the last one.

        Raises:
            KeyError: that step was not recorded.
        """
        if step == 0:
            return self.start
        flat = self.solution.value if step is None else _recorded(self.solution.recorded, step, "record")
        return QueryState.unpack(flat, self.start.content.shape[1], self.units)

    def predict(self, step: int | None = None) -> Prediction:
        """Read out the state of a step, by default the last one, with f; y_0 is read out with g if there is a g.

        If already the first output of f is infinite or NaN, the image stays at y_0; its last state is then still read
        out with f, because all images of a batch are read out together.
        """
        at_start = step == 0 or (step is None and len(self.solution.residuals) == 0)
        layer = self.initialization if at_start and self.initialization is not None else self.refinement
        return layer.predict(self.state(step))

    def decoded(self) -> Decoded:
        """The result of the whole walk, in the form that Decoder.decode returns."""
        solution, state = self.solution, self.state()
        finite = solution.status != Status.NONFINITE
        return Decoded(self.predict(), solution.steps, finite, solution.residual, state)

    def initialization_residual(self) -> Tensor:
        """(B,) the relative change from the initial queries to y_0."""
        return relative_residual(self.initial.pack(self.units), self.start.pack(self.units))

    def application(self, step: int) -> tuple[QueryState, QueryState]:
        """The iterate to which f was applied in a step, and its output.

        For an image that stopped before this step, they are those of its last step.

        Raises:
            ValueError: the step is below 1. Step 0 is y_0, to which f has not been applied.
            KeyError: that step was not recorded, or the walk was made without record_iterates=True.
        """
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}: step 1 is the first application of f")
        queries = self.start.content.shape[1]
        needed = "record_iterates=True and record"
        iterate = _recorded(self.solution.iterates, step, needed)
        output = _recorded(self.solution.outputs, step, needed)
        return QueryState.unpack(iterate, queries, self.units), QueryState.unpack(output, queries, self.units)

    def residual_parts(self, step: int) -> ResidualParts:
        """How much a step changed content and position; `application` describes the argument and the errors."""
        iterate, output = self.application(step)
        before, after = iterate.content.flatten(1), output.content.flatten(1)
        positions = (QueryState(x.position, x.content[..., :0]).pack(self.units) for x in (iterate, output))
        return ResidualParts(
            content=relative_residual(before, after),
            position=relative_residual(*positions),
            content_norm=torch.linalg.vector_norm(after - before, dim=1),
        )


def _recorded(tensors: Mapping[int, Tensor], step: int, needed: str) -> Tensor:
    if step not in tensors:
        raise KeyError(f"step {step} was not recorded: walk with {needed}=[{step}, ...]")
    return tensors[step]
