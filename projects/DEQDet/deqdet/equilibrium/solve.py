"""The only iteration loop: it applies the map, counts, records, measures residuals and gives the verdict."""

import enum
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]  # (B, D) -> (B, D), each row for itself


class Status(enum.IntEnum):
    """How a sample's iteration ended."""

    CONVERGED = 0  # the relative residual fell below rtol
    MAX_STEPS = 1  # all steps were used
    NONFINITE = 2  # the map returned inf or nan; the sample keeps its last finite value


class Solver(Protocol):
    """A frozen record of a solver's numbers. `memory` is what one step hands to the next: tensors (B, ...)."""

    def init(self, value: Tensor) -> tuple[Tensor, ...]:
        """The memory before the first step, for value (B, D)."""

    def step(self, value: Tensor, image: Tensor, memory: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next iterate from value (B, D) and image = map(value) (B, D), and the next memory."""


@dataclass(frozen=True)
class Solution:
    """Where the iteration came to, for B samples of D numbers after at most T steps.

    What it gives, also at the recorded steps, are images f(y): a solver's extrapolation is never given unapplied.
    """

    value: Tensor  # (B, D)  f of the last iterate, or of the one with the smallest residual
    status: Tensor  # (B,)  int64, of Status
    steps: Tensor  # (B,)  int64, applications of the map that the sample took part in
    # (t, B)  relative residual of each step's input, of a sample that has stopped the last one; t < T if all stopped
    residuals: Tensor
    recorded: dict[int, Tensor]  # step -> (B, D); step 0 is the initial value


def relative_residual(value: Tensor, image: Tensor) -> Tensor:
    """||f(y) - y|| / ||f(y)|| per sample.

    Args:
        value: (B, D) y.
        image: (B, D) f(y).

    Returns:
        (B,) in float32, or float64 if the state is; 0 where both are 0, very large or inf where f(y) alone is.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    unit = image.abs().amax(dim=1, keepdim=True).to(dtype).clamp(min=torch.finfo(dtype).tiny)  # lest squares overflow
    change = torch.linalg.vector_norm((image - value) / unit, dim=1)
    size = torch.linalg.vector_norm(image / unit, dim=1)
    return change / size.clamp(min=torch.finfo(dtype).tiny)


def first_below(residuals: Tensor, rtol: float) -> Tensor:
    """(B,) int64: the first step whose residual is below rtol, as solve() with that rtol stops; T where none is.

    Args:
        residuals: (T, B), row t - 1 of step t, as solve() gives them with rtol = 0.
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
    best: bool = False,
    restrict: Callable[[Tensor], Map] | None = None,
) -> Solution:
    """Iterate towards y* = f(y*) (Eq. 6), f being `function`.

    A sample stops at its first residual below rtol, with f(y) taken in. With rtol = 0 nothing waits for the device.

    Args:
        initial: (B, D) y_0.
        solver: how the next iterate follows from y and f(y).
        max_steps: T, the most applications of f.
        rtol: relative residual at which a sample has converged; 0: all steps are taken.
        record: the steps t to record: what the result would be with max_steps = t.
        best: give f(y) of the iterate y with the smallest residual so far, not of the last one.
        restrict: gives f for some samples, by their indices (b,) in the batch: those that stopped leave the batch.

    Raises:
        ValueError: max_steps or rtol is negative or not finite, or a recorded step lies outside 0..max_steps.
    """
    _check(max_steps, rtol, record)
    books = _Books(initial, rtol, best)
    value, memory, rows = initial, solver.init(initial), slice(None)
    for step in range(1, max_steps + 1):
        active = books.status[rows] == Status.MAX_STEPS
        if rtol > 0:
            if not active.any():
                break
            if restrict is not None and not active.all():
                rows = (books.status == Status.MAX_STEPS).nonzero()[:, 0]
                function = restrict(rows)
                value, memory, active = value[active], tuple(part[active] for part in memory), active[active]
        image = function(value).to(value.dtype)
        with _full_precision(value.device):
            proposal, memory = solver.step(value, image, memory)
        usable = active & image.isfinite().all(dim=1)
        books.enter(rows, active, usable, image, relative_residual(value, image))
        value = torch.where(usable[:, None], proposal, value)
        if step in record:
            books.record(step)
    return books.close(record)


def _check(max_steps: int, rtol: float, record: Collection[int]) -> None:
    if max_steps < 0 or not 0 <= rtol < math.inf:
        raise ValueError(f"max_steps and rtol must be finite and not negative, got {max_steps} and {rtol}")
    if outside := [t for t in record if not 0 <= t <= max_steps]:
        raise ValueError(f"recorded steps must lie in 0..{max_steps} (max_steps), got {sorted(outside)}")


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast is off within it: a solver computes in the precision that it asks for."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _Books:
    """What becomes a Solution. `rows` are the samples that a step computed."""

    def __init__(self, initial: Tensor, rtol: float, best: bool):
        self.status = torch.full_like(initial[:, 0], Status.MAX_STEPS, dtype=torch.int64)
        self._rtol, self._best = rtol, best
        self._value = initial.clone()
        self._steps = torch.zeros_like(self.status)
        precise = torch.promote_types(initial.dtype, torch.float32)  # as relative_residual's
        self._residual = torch.full_like(initial[:, 0], torch.inf, dtype=precise)
        self._lowest = torch.full_like(self._residual, torch.nan)  # of the value; NaN: that is still the initial one
        self._residuals: list[Tensor] = []
        self._recorded = {0: initial}

    def enter(
        self, rows: Tensor | slice, active: Tensor, usable: Tensor, image: Tensor, residual: Tensor
    ) -> None:
        """One step.

        Args:
            active: (b,) samples that had not stopped before it.
            usable: (b,) those of them whose image is finite.
            image: (b, D).
            residual: (b,).
        """
        self._steps[rows] += active
        self._residual[rows] = torch.where(active, residual, self._residual[rows])
        self._residuals.append(self._residual.clone())
        status = self.status[rows].masked_fill(active & ~usable, Status.NONFINITE)
        self.status[rows] = status.masked_fill(usable & (residual < self._rtol), Status.CONVERGED)
        if self._best:
            usable = usable & ~(residual >= self._lowest[rows])
            self._lowest[rows] = torch.where(usable, residual, self._lowest[rows])
        self._value[rows] = torch.where(usable[:, None], image, self._value[rows])

    def record(self, step: int) -> None:
        """Keep the value as it is after this step."""
        self._recorded[step] = self._value.clone()

    def close(self, record: Collection[int]) -> Solution:
        """The result; recorded steps that were not reached have the last value."""
        return Solution(
            value=self._value,
            status=self.status,
            steps=self._steps,
            residuals=torch.stack(self._residuals) if self._residuals else self._residual[None][:0],
            recorded={t: self._recorded.get(t, self._value) for t in sorted(record)},
        )
