"""solve(): the iteration of a map f, with any solver, and with or without a tolerance.

Symbols: y is an iterate, f(y) its output; B batch rows of D numbers each, T steps. Batch rows never influence each
other, so that the detections of an image do not depend on the other images of its batch.
"""

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .records import FixedRecord, Solution, StoppingRecord

# (B, D) -> (B, D); no row of the result depends on another row of the argument. Each call returns a new tensor: solve()
# keeps the outputs of several steps and reads them later.
Map = Callable[[Tensor], Tensor]


# Computed at import, since not every release of torch can trace is_autocast_available for torch.compile.
_AUTOCAST_DEVICES = frozenset(x for x in ("cpu", "cuda", "mps") if torch.amp.is_autocast_available(x))


class Solver(Protocol):
    """The rule that computes the next iterate from an iterate and its output, as a frozen record of its parameters.

    A solver is immutable. Whatever it remembers from step to step is its state: a tuple of tensors (B, ...), with one
    row for each batch row. solve() passes the state from each step to the next, and drops the rows that have stopped.
    """

    def init(self, iterate: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first step, for the first iterate (B, D)."""

    def step(self, iterate: Tensor, output: Tensor, state: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the next iterate and the next state.

        Args:
            iterate: (B, D) y.
            output: (B, D) f(y).
            state: the state that init() or the previous step returned.
        """


def is_solver(value: object) -> bool:
    """Whether a value is an object with the methods of Solver; a class or a name is not."""
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in ("init", "step"))


def solve(
    function: Map,
    initial: Tensor,
    *,
    solver: Solver,
    max_steps: int,
    rtol: float = 0.0,
    record: Collection[int] = (),
    record_iterates: bool = False,
    best: bool = False,
    residuals: bool = True,
    restrict: Callable[[Tensor], Map] | None = None,
) -> Solution:
    """Iterate towards the fixed point y* = f(y*) (Eq. 6), where f is `function`.

    A batch row stops at the first iterate y whose relative residual is below rtol. Its result is f(y), which is already
    known. With rtol = 0 the host never waits for the device.

    Args:
        initial: (B, D) y_0.
        solver: the rule that computes the next iterate from y and f(y).
        max_steps: T, the largest number of applications of f.
        rtol: the relative residual below which a row has converged; 0 takes all steps.
        record: the steps t to record. The recorded tensor is the `value` that max_steps = t would give.
        record_iterates: also record, for each of these steps, the iterate to which f was applied, and its output.
        best: return the output for the iterate with the lowest residual instead of the last output.
        residuals: whether to compute residuals. False saves time if only states are wanted; all residuals are then
            inf.
        restrict: given the indices (b,) of some batch rows, return f for a batch of these rows alone. With it, rows
            that have stopped leave the batch and take no more time.

    Raises:
        TypeError: the solver is not an object such as Anderson(), or initial holds no floating-point numbers.
        ValueError: initial is not (B, D), or f or the solver returned another shape, dtype or object; max_steps or rtol
            is negative or not finite, a recorded step lies outside 0..max_steps, or residuals is False although rtol or
            best needs them.
    """
    _check_solver(solver)
    _check_start(initial)
    _check(max_steps, rtol, record)
    if rtol == 0 and not best:
        results = FixedRecord(initial, keep_iterates=record_iterates, residuals=residuals)
    elif residuals:
        results = StoppingRecord(initial, keep_iterates=record_iterates, rtol=rtol, best=best)
    else:
        raise ValueError("a tolerance, and the choice of the best iterate, need the residuals")
    iterate, state, in_own_precision = initial, solver.init(initial), without_autocast(initial.device)
    _check_state(solver, "init", state, iterate)
    for step in range(1, max_steps + 1):
        if rtol > 0 and step > 1:
            remaining = int(results.active.sum())  # the one place where the host waits for the device
            if remaining == 0:
                break
            if restrict is not None and remaining < len(results.active):
                kept = results.drop_stopped(remaining)
                function = restrict(results.rows)
                iterate, state = iterate[kept], tuple(part[kept] for part in state)
        output = function(iterate)
        _check_output(output, iterate)
        output = output.to(iterate.dtype)
        with in_own_precision:
            proposal, state = _checked(solver, solver.step(iterate, output, state), iterate)
            iterate = results.add(iterate, output, proposal)
        if step in record:
            results.keep(step)
    return results.finish(record)


def _check_solver(solver: object) -> None:
    """Check that a solver is an object with the methods of Solver.

    Raises:
        TypeError: it is not; the message says what it is.
    """
    if not is_solver(solver):
        what = f"the class {solver.__name__}" if isinstance(solver, type) else repr(solver)
        raise TypeError(f"solver must be an object with the methods init and step, such as Anderson(), not {what}")


def _check_start(initial: object) -> None:
    """Check that y_0 is a floating-point tensor with one row for each problem.

    Raises:
        TypeError: it is not a tensor, or its dtype is not a floating-point type.
        ValueError: it does not have two dimensions.
    """
    if not isinstance(initial, Tensor) or not initial.is_floating_point():
        what = f"a tensor of {initial.dtype}" if isinstance(initial, Tensor) else f"a {type(initial).__name__}"
        raise TypeError(f"initial must be a tensor of floating-point numbers (B, D), not {what}")
    if initial.ndim != 2:
        raise ValueError(f"initial must have the shape (B, D), got {tuple(initial.shape)}")


def _check_output(output: Tensor, iterate: Tensor) -> None:
    """Check that f returned the shape of its argument; the solvers would silently broadcast any other shape.

    Raises:
        ValueError: it did not; the message says what it returned.
    """
    # Not while compiling, where the comparison of sizes would become a condition of the graph.
    if not torch.compiler.is_compiling() and output.shape != iterate.shape:
        raise ValueError(f"f was given {tuple(iterate.shape)} and must return that shape, got {tuple(output.shape)}")


def _checked(solver: Solver, result: Any, iterate: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Check the result of a solver's `step`, and return it.

    The next iterate must have the shape, dtype and device of the last one: another shape could be broadcast without an
    error, and another dtype would reach f.

    Raises:
        ValueError: it did not; the message names the solver.
    """
    if torch.compiler.is_compiling():
        return result
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{_name(solver)}.step must return the pair of the next iterate and the next state")
    proposal, state = result
    fits = isinstance(proposal, Tensor) and proposal.shape == iterate.shape
    if not fits or (proposal.dtype, proposal.device) != (iterate.dtype, iterate.device):
        raise ValueError(
            f"{_name(solver)}.step must return the next iterate in the shape, dtype and device of the one that it got"
        )
    _check_state(solver, "step", state, iterate)
    return result


def _check_state(solver: Solver, method: str, state: object, iterate: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    rows = iterate.shape[:1]
    if not isinstance(state, tuple) or not all(isinstance(part, Tensor) and part.shape[:1] == rows for part in state):
        raise ValueError(
            f"{_name(solver)}.{method} must return as state a tuple of tensors with one row for each of the iterate's"
        )


def _name(solver: Solver) -> str:
    return f"{type(solver).__module__}.{type(solver).__qualname__}"


def _check(max_steps: int, rtol: float, record: Collection[int]) -> None:
    if max_steps < 0 or not 0 <= rtol < math.inf:
        raise ValueError(f"max_steps and rtol must be finite and not negative, got {max_steps} and {rtol}")
    if outside := [t for t in record if not 0 <= t <= max_steps]:
        raise ValueError(f"recorded steps must lie in 0..{max_steps} (max_steps), got {sorted(outside)}")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast, in which a solver computes in the precision that it asks for."""
    if device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
