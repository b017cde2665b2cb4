"""solve(): the only iteration loop, which applies the map f, records iterates and residuals, and gives the verdict.

Symbols: y is an iterate, f(y) its output; B batch rows of D numbers each, T steps. What happens to one batch row never
depends on another one, so that an image's detections do not depend on the images beside it in the batch.
"""

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]  # (B, D) -> (B, D); no row of the result depends on another row of the argument


class Status:
    """How the iteration of a batch row ended.

    The values are plain ints and not members of an enum, so that comparing them with a tensor is an ordinary tensor
    operation under torch.compile too.
    """

    CONVERGED = 0  # the relative residual fell below rtol
    MAX_STEPS = 1  # all steps were used
    NONFINITE = 2  # f returned inf or nan; the row keeps its last finite output


class Solver(Protocol):
    """How the next iterate follows from an iterate and its output: a frozen record of the method's numbers.

    The solver itself never changes. What it must remember from step to step is its state: a tuple of tensors (B, ...),
    one row for each batch row. solve() hands it from each step to the next, and drops the rows that have stopped.
    """

    def init(self, iterate: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first step, for the first iterate (B, D)."""

    def step(self, iterate: Tensor, output: Tensor, state: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the next iterate and the next state.

        Args:
            iterate: (B, D) y.
            output: (B, D) f(y).
            state: what init() or the step before returned.
        """


@dataclass(frozen=True)
class Solution:
    """The result of the iteration for B batch rows of D numbers after at most T steps.

    `value` and `recorded` are outputs f(y). An iterate that a solver extrapolated, and to which f has not been applied,
    is never among them.
    """

    value: Tensor  # (B, D)  output of the last iterate, or with best=True of the iterate with the lowest residual
    # (B,)  relative residual of the iterate whose output `value` is: with best=True the lowest so far; in a row that
    # became non-finite that of its last usable step; inf where there was no usable step
    residual: Tensor
    status: Tensor  # (B,)  int64, constants of Status
    steps: Tensor  # (B,)  int64, applications of f that the row took part in
    # (t, B)  relative residual of the iterate of each step; a row that has stopped repeats its last one. t < T if all
    # rows stopped early
    residuals: Tensor
    recorded: dict[int, Tensor]  # step -> (B, D), what `value` was after that step; step 0 has the initial value
    # step >= 1 -> (B, D), the iterate y to which that step applied f; a row that has stopped has the iterate of the
    # last step that it took part in. Empty without record_iterates
    iterates: dict[int, Tensor]
    outputs: dict[int, Tensor]  # step >= 1 -> (B, D), f of that iterate; `recorded` differs from it with best=True


def relative_residual(iterate: Tensor, output: Tensor) -> Tensor:
    """Compute ||f(y) - y|| / ||f(y)|| of each batch row.

    The squares inside the norms do not overflow, although in float32 the square of 1e20 is already infinite.

    Args:
        iterate: (B, D) y.
        output: (B, D) f(y).

    Returns:
        (B,) float32, or float64 for a float64 state. It is 0 where y and f(y) are both 0, and very large or inf where
        only f(y) is 0.
    """
    change, size, _ = _norms(iterate, output)
    return _quotient(change, size, iterate.dtype)


def first_below(residuals: Tensor, rtol: float) -> Tensor:
    """Find the step at which solve() with this rtol would have stopped each batch row.

    Args:
        residuals: (T, B), row t - 1 that of step t, as solve() gives them with rtol = 0.

    Returns:
        (B,) int64, the first step whose residual is below rtol; T where there is none.
    """
    below = residuals < rtol  # False where NaN
    return torch.where(below.any(dim=0), below.int().argmax(dim=0) + 1, len(residuals))


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

    A batch row stops at the first iterate y whose relative residual is below rtol, and its result is f(y), which has
    been computed anyway. With rtol = 0 the host never waits for the device.

    Args:
        initial: (B, D) y_0.
        solver: the rule that makes the next iterate from y and f(y).
        max_steps: T, the largest number of applications of f.
        rtol: the relative residual below which a row has converged; 0 takes all steps.
        record: the steps t to record. The recorded tensor is what `value` would be with max_steps = t.
        record_iterates: record also to which iterate each of these steps applied f, and what f returned.
        best: return the output of the iterate with the lowest residual so far instead of the last one.
        residuals: compute them. A path of a fixed number of steps that only records states can do without: then they
            are inf.
        restrict: given the indices (b,) of some batch rows, return f for a batch of these rows alone. With it, rows
            that have stopped leave the batch and cost nothing any more.

    Raises:
        ValueError: max_steps or rtol is negative or not finite, a recorded step lies outside 0..max_steps, or rtol or
            best need the residuals.
    """
    _check(max_steps, rtol, record)
    if not residuals and (rtol > 0 or best):
        raise ValueError("a tolerance, and the choice of the best iterate, need the residuals")
    results = _Record(initial, rtol=rtol, best=best, keep_iterates=record_iterates, residuals=residuals)
    iterate, state = initial, solver.init(initial)
    for step in range(1, max_steps + 1):
        if rtol > 0 and step > 1:
            remaining = int(results.active.sum())  # the one place where the host waits for the device
            if remaining == 0:
                break
            if restrict is not None and remaining < len(results.active):
                kept = results.drop_stopped(remaining)
                function = restrict(results.rows)
                iterate, state = iterate[kept], tuple(part[kept] for part in state)
        output = function(iterate).to(iterate.dtype)
        with _full_precision(iterate.device):
            proposal, state = solver.step(iterate, output, state)
            iterate = results.add(iterate, output, proposal)
        if step in record:
            results.keep(step)
    return results.finish(record)


def _norms(iterate: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norms ||f(y) - y|| and ||f(y)||, and whether all entries of f(y) are finite, each (B,).

    Both norms of a row may be scaled by the same factor: only their quotient, the relative residual, is used.

    The squares of float32 numbers cannot overflow in float64. Where the numbers are float64 themselves, or the device
    has no float64, both vectors are divided by the largest entry of f(y) first, which leaves the quotient as it is.
    """
    dtype = torch.promote_types(iterate.dtype, torch.float32)
    change, wide = output - iterate, torch.float64
    if dtype == torch.float64 or iterate.device.type == "mps":
        largest = torch.linalg.vector_norm(output, ord=torch.inf, dim=1, keepdim=True, dtype=dtype)
        scale = largest.clamp(min=torch.finfo(dtype).tiny)
        change, output, wide = change / scale, output / scale, dtype
        finite = largest[:, 0] < torch.inf
        size = torch.linalg.vector_norm(output, dim=1)
    else:
        size = torch.linalg.vector_norm(output, dim=1, dtype=wide)
        finite = size < torch.inf  # False for NaN too
    return torch.linalg.vector_norm(change, dim=1, dtype=wide), size, finite


def _quotient(change: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """The relative residual for the norms of _norms and the dtype of the state."""
    residual = change / size.clamp(min=torch.finfo(size.dtype).tiny)
    return residual.to(torch.promote_types(dtype, torch.float32))


def _check(max_steps: int, rtol: float, record: Collection[int]) -> None:
    if max_steps < 0 or not 0 <= rtol < math.inf:
        raise ValueError(f"max_steps and rtol must be finite and not negative, got {max_steps} and {rtol}")
    if outside := [t for t in record if not 0 <= t <= max_steps]:
        raise ValueError(f"recorded steps must lie in 0..{max_steps} (max_steps), got {sorted(outside)}")


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Switch autocast off, so that a solver computes in the precision that it asks for."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _Record:
    """Collects what becomes the Solution, for all B batch rows, also those that have left the batch."""

    def __init__(self, initial: Tensor, *, rtol: float, best: bool, keep_iterates: bool, residuals: bool):
        self.rows: Tensor | None = None  # (b,) int64, the batch rows that are still computed; None: all
        self.active = torch.ones_like(initial[:, 0], dtype=torch.bool)  # (b,) those of them that have not stopped
        self._rtol, self._best, self._with_residuals = rtol, best, residuals
        # Without a tolerance and a choice, what each step found is put together at the end, not in every step.
        self._fixed = rtol == 0 and not best
        self._found: list[tuple[Tensor, ...]] = []  # of each step what _norms returns, (B,) each
        self._value = initial
        self._steps = torch.zeros_like(self.active, dtype=torch.int64)
        self._converged = torch.zeros_like(self.active)
        self._nonfinite = torch.zeros_like(self.active)
        precise = torch.promote_types(initial.dtype, torch.float32)  # the dtype of relative_residual
        self._residual = torch.full_like(initial[:, 0], torch.inf, dtype=precise)  # of the last step
        # Of the value. NaN as long as that is the initial one: no comparison with NaN holds, so that with best=True the
        # first output is taken whatever its residual is.
        self._residual_of_value = torch.full_like(self._residual, torch.nan)
        self._residuals: list[Tensor] = []
        self._recorded = {0: initial}
        # The last iterate of each row and f of it, and the pairs of the recorded steps.
        self._application = (initial, initial) if keep_iterates else None
        self._applications: dict[int, tuple[Tensor, Tensor]] = {}

    def drop_stopped(self, remaining: int) -> Tensor:
        """Go on with the `remaining` active rows alone. Returns their indices among the rows so far."""
        # The active ones first, in their order. Since their number is known, the host need not wait for it again.
        kept = self.active.int().argsort(descending=True, stable=True)[:remaining]
        self.rows = kept if self.rows is None else self.rows[kept]
        self.active = self.active[kept]
        return kept

    def add(self, iterate: Tensor, output: Tensor, proposal: Tensor) -> Tensor:
        """Take in one step of the b rows that are computed, and return the next iterate (b, D).

        Args:
            iterate: (b, D) y.
            output: (b, D) f(y).
            proposal: (b, D) what the solver makes of them. A row whose output is not finite stays at its iterate.
        """
        if self._with_residuals:
            *norms, finite = _norms(iterate, output)
        else:
            norms = ()
            finite = torch.linalg.vector_norm(output, ord=torch.inf, dim=1) < torch.inf  # False for NaN too
        if self._fixed:
            return self._add_fixed(iterate, output, proposal, (*norms, finite))
        active, residual = self.active, _quotient(*norms, iterate.dtype)
        taken = usable = active & finite
        if self._application is not None:
            self._application = tuple(
                self._put(kept, torch.where(active[:, None], new, self._get(kept)))
                for kept, new in zip(self._application, (iterate, output), strict=True)
            )
        if self._best:
            taken = usable & ~(residual >= self._get(self._residual_of_value))
        value = torch.where(taken[:, None], output, self._get(self._value))
        self._value = self._put(self._value, value)
        self._add_numbers(active, usable, taken, residual)
        return torch.where(usable[:, None], proposal, iterate)

    def _add_fixed(self, iterate: Tensor, output: Tensor, proposal: Tensor, found: tuple[Tensor, ...]) -> Tensor:
        """Take in one step of a solve with a fixed number of steps, where every row takes part in every step.

        Only what the next step needs is computed here; `_collect` computes the residuals of all steps at the end. A
        row whose output is not finite keeps its iterate. It needs no mark, since f, applied to the same iterate again,
        fails again.
        """
        finite = found[-1][:, None]
        self._found.append(found)
        if self._application is not None:
            self._application = iterate, output
        self._value = torch.where(finite, output, self._value)
        if proposal is output:
            return self._value  # plain iteration: every iterate is the output before it
        return torch.where(finite, proposal, iterate)

    def _add_numbers(self, active: Tensor, usable: Tensor, taken: Tensor, residual: Tensor) -> None:
        """Take in the numbers of one step, (b,) each, where some rows may stop before others."""
        self._steps = self._put(self._steps, self._get(self._steps) + active)
        self._residual = self._put(self._residual, torch.where(active, residual, self._get(self._residual)))
        self._residuals.append(self._residual)
        of_value = self._get(self._residual_of_value)
        self._residual_of_value = self._put(self._residual_of_value, torch.where(taken, residual, of_value))
        converged = usable & (residual < self._rtol)
        self._converged = self._put(self._converged, self._get(self._converged) | converged)
        self._nonfinite = self._put(self._nonfinite, self._get(self._nonfinite) | (active & ~usable))
        self.active = usable & ~converged

    def _collect(self) -> None:
        """Put the numbers of a fixed number of steps together."""
        *norms, finite = (torch.stack(x) for x in zip(*self._found, strict=True))  # (T, B) each
        residuals = _quotient(*norms, self._value.dtype) if norms else self._residual.expand_as(finite)
        usable = finite.int().cumprod(dim=0)  # up to the step at which the row became non-finite, if it did
        good = usable.sum(dim=0)  # (B,)
        self._steps = (good + 1).clamp(max=len(usable))
        rows = torch.arange(len(usable), device=good.device)[:, None]
        # A row that has stopped repeats its last residual.
        self._residuals = list(residuals.gather(0, rows.minimum(self._steps - 1)))
        last = residuals.gather(0, (good - 1).clamp(min=0)[None])[0]
        self._residual_of_value = torch.where(good > 0, last, torch.inf)
        self._nonfinite = good < len(usable)

    def _get(self, whole: Tensor) -> Tensor:
        """The rows that are computed, of a tensor of all rows."""
        return whole if self.rows is None else whole[self.rows]

    def _put(self, whole: Tensor, rows: Tensor) -> Tensor:
        """A tensor of all rows with new values in those that are computed."""
        return rows if self.rows is None else whole.index_copy(0, self.rows, rows)

    def keep(self, step: int) -> None:
        """Record the values, and the iterates if they are wanted, as they are after this step."""
        self._recorded[step] = self._value
        if self._application is not None:
            self._applications[step] = self._application

    def finish(self, record: Collection[int]) -> Solution:
        """Return the Solution. Recorded steps that were not reached have the last value and the last iterate."""
        pairs = {}
        if self._application is not None:
            pairs = {t: self._applications.get(t, self._application) for t in sorted(record) if t >= 1}
        if self._found:
            self._collect()
        status = torch.full_like(self._steps, Status.MAX_STEPS)
        status = status.masked_fill(self._converged, Status.CONVERGED).masked_fill(self._nonfinite, Status.NONFINITE)
        return Solution(
            value=self._value,
            residual=self._residual_of_value.nan_to_num(nan=torch.inf, posinf=torch.inf),
            status=status,
            steps=self._steps,
            residuals=torch.stack(self._residuals) if self._residuals else self._residual[None][:0],
            recorded={t: self._recorded.get(t, self._value) for t in sorted(record)},
            iterates={t: iterate for t, (iterate, _) in pairs.items()},
            outputs={t: output for t, (_, output) in pairs.items()},
        )
