"""Iterate a refinement layer f from a state y_0, with the solvers of the equilibrium package.

B: images, N: queries, C: channels.
"""

import functools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..equilibrium import FixedPointIteration, Map, Solution, Solver, conclude, solve, unroll
from ..layers import CompiledFunction, RefinementLayer, cast_once, is_compiled
from ..perturbation import Perturbation
from ..structures import Features, QueryState, count_images, packing_units, select_images


def packed_map(
    layer: RefinementLayer,
    features: Features,
    num_queries: int,
    *,
    perturbation: Perturbation | None = None,
    units: Tensor | None = None,
) -> Map:
    """Wrap f as a map of packed states, (S * B, N * (4 + C)), for the features of B images, prepared or not.

    The position is detached first, as between any two layers, so that this map's Jacobian is taken along the content.

    Args:
        layer: f.
        perturbation: perturbs each state before f.
        units: the result of `packing_units`, if the caller has kept it.
    """
    units = packing_units(features[0].device) if units is None else units

    def function(flat: Tensor) -> Tensor:
        state = QueryState.unpack(flat, num_queries, units).detach_position()
        if perturbation is not None:
            state = perturbation(state)
        return layer.refine_segments(state, features).pack(units)

    return function


def iterate(
    layer: RefinementLayer,
    start: QueryState,
    features: Features,
    *,
    solver: Solver,
    steps: int,
    rtol: float = 0.0,
    best: bool = False,
    record: Collection[int] = (),
    record_iterates: bool = False,
    units: Tensor | None = None,
) -> Solution:
    """Iterate f from y_0, without noise; the Solution holds packed states.

    Plain iteration for a fixed number of steps uses unroll(), which computes nothing but f between two steps, if only
    the last state is wanted, no gradient is recorded, and f accepts inf and nan. All else uses solve().

    Args:
        layer: f. A copy with cast weights may be applied in its place (see `cast_once`).
        start: y_0.
        features: as `prepare_features` returns them.
        solver, rtol, best, record, record_iterates: as for solve().
        steps: the largest number of applications of f.
        units: as for packed_map.
    """
    device = start.content.device
    units = packing_units(device) if units is None else units
    compiled = is_compiled(layer) and not torch.compiler.is_compiling()
    layer = cast_once(layer, device)
    plain = solver == FixedPointIteration() and rtol == 0 and not best and len(record) == 0
    if plain and layer.accepts_nonfinite and not torch.is_grad_enabled():
        # Give the first state the layout and dtype of the others, so that a compiled f is compiled only once.
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in (start.position, start.content, units)))
        start = QueryState(start.position.contiguous(), start.content.contiguous()).to(dtype).detach()
        apply = layer if len(start.content) == count_images(features) else layer.refine_segments

        def refine(state: QueryState) -> QueryState:
            return apply(state, features).to(dtype)

        def pack(states: Sequence[QueryState]) -> Tensor:
            return QueryState.stack(states).pack(units)

        return unroll(refine, start, steps=steps, pack=pack, finish=_compiled_conclude() if compiled else None)

    def restrict(rows: Tensor) -> Map:
        return packed_map(layer, select_images(features, rows), num_queries, units=units)

    num_queries = start.content.shape[1]
    return solve(
        packed_map(layer, features, num_queries, units=units),
        start.pack(units),
        solver=solver,
        max_steps=steps,
        rtol=rtol,
        record=record,
        record_iterates=record_iterates,
        best=best,
        restrict=restrict,
    )


@functools.cache
def _compiled_conclude() -> CompiledFunction:
    return CompiledFunction(conclude, "the computation of the residuals")
