"""DEQDet's decoder: the fixed point of one refinement layer."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

from ..contract import check_read_out
from ..equilibrium import FixedPointIteration, Phantom, Solver, solve
from ..layers import RefinementLayer, build_refinement_layer
from ..perturbation import Perturbation
from ..structures import Decoded, Features, Prediction, QueryState, packing_units
from .base import DECODER_REGISTRY, Decoder, Execution, prepare_features, run_layers
from .iteration import iterate, packed_map
from .solvers import build_solver
from .trajectory import Trajectory


@dataclass(frozen=True)
class Supervision:
    """Which states of the solving path are supervised in training (Sec. 3.3, Eq. 12)."""

    train_steps: int  # T_train
    extra: int  # h
    count: int  # m
    interval: int  # C

    def __post_init__(self) -> None:
        if min(self.train_steps, self.interval) < 1 or min(self.extra, self.count) < 0:
            raise ValueError(
                "TRAIN_STEPS and SUPERVISION_INTERVAL must be at least 1, EXTRA_SUPERVISION and SUPERVISION_COUNT "
                f"at least 0, got {self.train_steps}, {self.interval}, {self.extra}, {self.count}"
            )
        if self.count * self.interval > self.train_steps:
            raise ValueError(
                f"Omega reaches step m C = {self.count} * {self.interval}, beyond TRAIN_STEPS = {self.train_steps}: "
                "lower SUPERVISION_COUNT or SUPERVISION_INTERVAL of MODEL.DEQDET.EQUILIBRIUM, or raise TRAIN_STEPS"
            )

    @property
    def steps(self) -> list[int]:
        """Omega = {1, C, 2C, ..., mC, T_train} (Eq. 12), ascending."""
        return sorted({1, *(i * self.interval for i in range(1, self.count + 1)), self.train_steps})


@DECODER_REGISTRY.register()
class EquilibriumDecoder(Decoder):
    """An initialization layer g, then the fixed point of one refinement layer f (Sec. 3.2, Algorithm 2).

    At test time `walk` iterates f from y_0 = g(x, y_0-) with any solver, and `decode` reads out the last state. In
    training `supervise` always uses plain iteration: the perturbation is defined on its steps (Algorithm 1), and the
    refinement-aware gradient expands f around the states that it visits.
    """

    has_equilibrium = True

    @configurable
    def __init__(
        self,
        *,
        initialization: RefinementLayer | None,
        refinement: RefinementLayer,
        solver: Solver,
        test_steps: int,
        rtol: float = 0.0,
        return_best: bool = False,
        supervision: Supervision,
        estimator: Phantom,
        perturbation: Perturbation,
        checkpoint_segments: bool,
    ):
        """
        Args:
            initialization: g. If None, f starts at the initial queries.
            solver: the default solver of `walk` and `decode`.
            test_steps: T_infer, the most applications of f at test time.
            rtol: the relative residual at which an image stops at test time; 0 takes all steps.
            return_best: return the output for the iterate with the smallest residual, not for the last one.
            estimator: takes k steps with gradient from each state in Omega.
            checkpoint_segments: recompute these steps in the backward pass, which saves memory and costs time.

        Raises:
            ValueError: test_steps is below 1, rtol is negative or infinite, or nothing would train the initial queries.
        """
        super().__init__()
        if test_steps < 1:
            raise ValueError(f"MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS must be at least 1, got {test_steps}")
        if not 0 <= rtol < math.inf:
            raise ValueError(f"MODEL.DEQDET.SOLVER.RTOL must not be negative or infinite, got {rtol}")
        if initialization is None and supervision.extra == 0:
            raise ValueError(
                "without an initialization layer, MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION must be at least 1: "
                "the solving path carries no gradient to the initial queries"
            )
        self.initialization = initialization
        self.refinement = refinement
        self.solver = solver
        self.test_steps = test_steps
        self.rtol = rtol
        self.return_best = return_best
        self.supervision = supervision
        self.estimator = estimator
        self.perturbation = perturbation
        self.checkpoint_segments = checkpoint_segments
        self.register_buffer("units", packing_units(torch.device("cpu")), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        equilibrium, noise = cfg.MODEL.DEQDET.EQUILIBRIUM, cfg.MODEL.DEQDET.PERTURBATION
        initialization = None
        if equilibrium.USE_INIT_LAYER:
            initialization = build_refinement_layer(cfg, input_shapes, initialization=True)
        return {
            "initialization": initialization,
            "refinement": build_refinement_layer(cfg, input_shapes, initialization=False),
            "solver": build_solver(cfg),
            "rtol": cfg.MODEL.DEQDET.SOLVER.RTOL,
            "return_best": cfg.MODEL.DEQDET.SOLVER.RETURN_BEST,
            "test_steps": equilibrium.TEST_STEPS,
            "supervision": Supervision(
                train_steps=equilibrium.TRAIN_STEPS,
                extra=equilibrium.EXTRA_SUPERVISION,
                count=equilibrium.SUPERVISION_COUNT,
                interval=equilibrium.SUPERVISION_INTERVAL,
            ),
            "estimator": Phantom(steps=equilibrium.GRADIENT_STEPS, damping=equilibrium.GRADIENT_DAMPING),
            "perturbation": Perturbation(
                kind=noise.KIND,
                probability=noise.PROBABILITY,
                content_size=noise.CONTENT_SIZE,
                position_size=noise.POSITION_SIZE,
            ),
            "checkpoint_segments": equilibrium.CHECKPOINT_SEGMENTS,
        }

    def initialize(self, initial: QueryState, features: Features) -> QueryState:
        """y_0 = g(x, y_0-) (Eq. 7); without a g, the initial queries themselves."""
        return initial if self.initialization is None else self.initialization(initial, features)

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
        """Iterate f from y_0, without noise, until every image has converged or all steps are taken.

        With a tolerance, an image that has converged leaves the batch and takes no more time.

        Args:
            steps: the largest number of applications of f; by default T_infer. With 0, the trajectory ends at y_0.
            rtol: the relative residual at which an image stops; by default the decoder's.
            solver: the solver; by default the decoder's.
            record: the steps whose states the trajectory keeps.
            record_iterates: also keep, for each recorded step, the iterate to which f was applied, and its output.
        """
        features = prepare_features([self.initialization, self.refinement], features)
        start = self.initialize(initial, features)
        steps, rtol, solver = self.options(steps, rtol, solver)
        solution = iterate(
            self.refinement,
            start,
            features,
            solver=solver,
            steps=steps,
            rtol=rtol,
            best=self.return_best,
            record=record,
            record_iterates=record_iterates,
            units=self.units,
        )
        refine = packed_map(self.refinement, features, start.content.shape[1], units=self.units)
        return Trajectory(initial, start, solution, refine, self.initialization, self.refinement, self.units)

    def decode(self, initial: QueryState, features: list[Tensor]) -> Decoded:
        """The predictions at the end of the walk.

        An image whose iteration becomes infinite or NaN is predicted from its last finite state.
        """
        return self.walk(initial, features).decoded()

    def execution(self) -> Execution:
        """g once, then f T_infer times, the largest number of steps of an image."""
        return Execution(self.initialization, self.refinement, self.test_steps)

    def supervise(self, initial: QueryState, features: list[Tensor]) -> dict[str, Prediction]:
        """The supervised predictions: "init" of g, "init+i" for i = 1..h, and "step<t>" for t in Omega (Eq. 12)."""
        predictions = {}
        features = prepare_features([self.initialization, self.refinement], features)
        start = self.initialize(initial, features)
        if self.initialization is not None:
            predictions["init"] = self.initialization.predict(start)
            start = start.detach_position()
        extra = run_layers([self.refinement] * self.supervision.extra, start, features)
        predictions |= {f"init+{i}": layer.predict(state) for i, (layer, state) in enumerate(extra, start=1)}
        return predictions | self._supervise_path(start.detach(), features)

    def _supervise_path(self, start: QueryState, features: Features) -> dict[str, Prediction]:
        """Solve without gradient, then take k steps with gradient from the state at each step in Omega (Eq. 11).

        The last of the k states is read out and supervised. The states of all steps in Omega run as one batch of S * B
        rows, or with checkpoint_segments one after the other, to be recomputed in the backward pass.
        """
        num_queries = start.content.shape[1]
        with torch.no_grad():
            points = self._perturbed_points(start, features)
        if self.supervision.extra == 0:
            # Until here f has only run without a gradient. Autocast keeps a cast copy of each weight, and in older
            # releases of torch no gradient flows through a copy that was made without one. So f casts them again.
            torch.clear_autocast_cache()
        refine = packed_map(self.refinement, features, num_queries, units=self.units)

        def segment(flat: Tensor) -> Prediction:
            state = QueryState.unpack(self.estimator(refine, flat), num_queries, self.units)
            return check_read_out(self.refinement, self.refinement.predict(state), len(flat))

        names = [f"step{t}" for t in self.supervision.steps]
        if self.checkpoint_segments:
            predictions = [checkpoint(segment, x, use_reentrant=False) for x in points]
        else:
            batch = segment(torch.cat(points))
            predictions = map(Prediction, batch.logits.chunk(len(points)), batch.boxes.chunk(len(points)))
        return dict(zip(names, predictions, strict=True))

    def _perturbed_points(self, start: QueryState, features: Features) -> list[Tensor]:
        """The states of the solving path at the steps in Omega, perturbed, each (B, N * (4 + C)) packed."""
        kind, steps, num_queries = self.perturbation.kind, self.supervision.steps, start.content.shape[1]
        refine = packed_map(self.refinement, features, num_queries, units=self.units)
        perturb_and_refine = packed_map(
            self.refinement, features, num_queries, perturbation=self.perturbation, units=self.units
        )

        def perturb(flat: Tensor) -> Tensor:
            return self.perturbation(QueryState.unpack(flat, num_queries, self.units)).pack(self.units)

        # Eq. 15, multi-step: noise enters before every application of f, and travels on with the path.
        function = perturb_and_refine if kind == "multi-step" else refine
        record = [t - 1 for t in steps] if kind == "one-step" else steps
        plain = FixedPointIteration()
        first = start.pack(self.units)
        path = solve(function, first, solver=plain, max_steps=record[-1], record=record, residuals=False)
        points = [path.recorded[t] for t in record]
        if kind == "one-step":  # Eq. 14: the path stays clean; noise passes f once, right before the supervised state
            points = [perturb_and_refine(x) for x in points]
        elif kind == "zero-step":  # Eq. 13: the path stays clean; noise is added to the supervised state itself
            points = [perturb(x) for x in points]
        return points
