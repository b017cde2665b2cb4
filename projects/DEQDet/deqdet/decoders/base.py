"""The interface of a decoder, and the registry in which configs name one."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from ..contract import check_equilibrium, construct
from ..equilibrium import Solver
from ..errors import UserError
from ..layers import RefinementLayer, compile_layer, look_up
from ..structures import Decoded, Features, Prediction, QueryState
from .trajectory import Trajectory

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders, subclasses of Decoder, called as `obj(cfg, input_shapes)` with the ShapeSpecs of the pyramid's levels, finest
first. docs/extending.md has a complete example.
"""


@dataclass(frozen=True)
class Execution:
    """The layers that run at test time: `initialization` once, if there is one, then `refinement` `steps` times."""

    initialization: RefinementLayer | None
    refinement: RefinementLayer  # the last one where each step has its own weights
    steps: int


class Decoder(nn.Module, ABC):
    """Turns initial queries and features into predictions: `supervise` in training, `decode` at test time.

    `initial` is a QueryState of B rows; `features` are the pyramid's levels (B, C, H_l, W_l), finest first.

    A decoder with `has_equilibrium = True` also implements `walk`, with steps, rtol and solver to be chosen at test
    time. Its attributes `test_steps`, `rtol`, `solver` and `return_best` are the defaults of `walk`, and the tools read
    them. `build_decoder` checks that they exist.
    """

    has_equilibrium = False
    test_steps: int  # the most applications of f, at least 1
    rtol: float  # the relative residual at which an image stops; 0 takes all steps
    solver: Solver
    return_best = False  # True: the result is the output for the iterate with the smallest residual, not for the last

    @abstractmethod
    def supervise(self, initial: QueryState, features: list[Tensor]) -> dict[str, Prediction]:
        """Return every supervised prediction, under the name that its losses get."""

    @abstractmethod
    def decode(self, initial: QueryState, features: list[Tensor]) -> Decoded:
        """Return the final prediction, from which detections are made."""

    @abstractmethod
    def execution(self) -> Execution:
        """Return the layers that `decode` runs and how often, for computing the cost of an image."""

    def options(
        self, steps: int | None = None, rtol: float | None = None, solver: Solver | None = None
    ) -> tuple[int, float, Solver]:
        """Replace each None by the decoder's own value. Only decoders with an equilibrium have these values."""
        return (
            self.test_steps if steps is None else steps,
            self.rtol if rtol is None else rtol,
            self.solver if solver is None else solver,
        )

    def walk(
        self,
        initial: QueryState,
        features: list[Tensor],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: Solver | None = None,
        record: Collection[int] = (),
        record_iterates: bool = False,
    ) -> Trajectory:
        """Iterate towards the fixed point; see EquilibriumDecoder.walk.

        Raises:
            UserError: this decoder has no equilibrium.
        """
        raise UserError(
            f"MODEL.DEQDET.DECODER is {type(self).__name__}, whose number of steps is fixed: steps, tolerance, solver "
            "and trajectory need a model with the EquilibriumDecoder"
        )


def build_decoder(cfg: CfgNode, input_shapes: list[ShapeSpec]) -> Decoder:
    """Build the decoder that MODEL.DEQDET.DECODER names.

    Raises:
        UserError: a user's decoder does not fit the interface; see `construct` and `check_equilibrium`.
    """
    decoder = look_up(DECODER_REGISTRY, "MODEL.DEQDET.DECODER", cfg.MODEL.DEQDET.DECODER)
    built = construct(decoder, (cfg, input_shapes), Decoder, {"supervise": 2, "decode": 2, "execution": 0})
    if built.has_equilibrium:
        check_equilibrium(built, Decoder)
    return built


def compile_refinement(decoder: Decoder) -> None:
    """Compile all layers of a decoder but the first, which runs only once for an image; see `compile_layer`."""
    first = decoder.execution().initialization
    for module in decoder.modules():
        if isinstance(module, RefinementLayer) and module is not first:
            compile_layer(module)


def prepare_features(layers: Iterable[RefinementLayer | None], features: Features) -> Features:
    """Let the layers precompute what they read from the features of a batch, once for all steps.

    Each layer is given the result of the one before it. Layers of the same kind return it unchanged and so share it.
    """
    for layer in layers:
        if layer is not None:
            features = layer.prepare(features)
    return features


def run_layers(
    layers: Collection[RefinementLayer], initial: QueryState, features: Features
) -> Iterator[tuple[RefinementLayer, QueryState]]:
    """Run layers one after the other, and yield each layer with the state that it returned.

    Positions are detached between layers, as in the whole R-CNN family: a layer learns to refine the boxes it is given,
    and its gradient does not reach the layers that predicted them.
    """
    state, features = initial, prepare_features(layers, features)
    for layer in layers:
        state = layer(state, features)
        yield layer, state
        state = state.detach_position()


def decode_last(states: Iterable[tuple[RefinementLayer, QueryState]]) -> Decoded:
    """Run a fixed number of layers, and read the prediction out of the last state."""
    *earlier, (layer, state) = states
    return Decoded(
        prediction=layer.predict(state),
        steps=torch.full_like(state.content[:, 0, 0], len(earlier), dtype=torch.int64),
        finite=torch.cat([state.position, state.content], dim=2).isfinite().flatten(1).all(dim=1),
        state=state,
    )
