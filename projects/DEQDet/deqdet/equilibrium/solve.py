"""The only iteration loop: it applies the map, counts, records, measures residuals and gives the verdict."""

import enum
from collections.abc import Callable, Collection
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
    """A frozen record of a solver's numbers. `memory` is what one step hands to the next."""

    def init(self, value: Tensor) -> Any:
        """The memory before the first step, for value (B, D)."""

    def step(self, value: Tensor, image: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """The next iterate from value (B, D) and image = map(value) (B, D), and the next memory."""


@dataclass(frozen=True)
class Solution:
    """Where the iteration came to, for B samples of D numbers after at most T steps."""

    value: Tensor  # (B, D)
    status: Tensor  # (B,)  int64, of Status
    steps: Tensor  # (B,)  int64, applications of the map that the sample took part in
    residuals: Tensor  # (t, B)  relative residual of each step's input; t < T if all samples stopped early
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
    change = torch.linalg.vector_norm(image - value, dim=1, dtype=dtype)
    size = torch.linalg.vector_norm(image, dim=1, dtype=dtype)
    return change / size.clamp(min=torch.finfo(dtype).tiny)


def solve(
    function: Map, initial: Tensor, *, solver: Solver, max_steps: int, rtol: float = 0.0, record: Collection[int] = ()
) -> Solution:
    """Iterate towards y* = f(y*) (Eq. 6), f being `function`.

    A sample stops at its first residual below rtol, with f(y) taken in, and keeps its value while the others go on.
    With rtol = 0 all steps are taken and nothing waits for the device.

    Args:
        initial: (B, D) y_0.
        solver: how the next iterate follows from y and f(y).
        max_steps: T, the most applications of f.
        rtol: relative residual at which a sample has converged.
        record: the steps t whose iterate y_t to keep; a sample that stopped before t gives its last value.

    Raises:
        ValueError: max_steps or rtol is negative, or a recorded step lies outside 0..max_steps.
    """
    if max_steps < 0 or rtol < 0:
        raise ValueError(f"max_steps and rtol must not be negative, got {max_steps} and {rtol}")
    if outside := [t for t in record if not 0 <= t <= max_steps]:
        raise ValueError(f"recorded steps must lie in 0..{max_steps} (max_steps), got {sorted(outside)}")

    value, memory = initial, solver.init(initial)
    status = torch.full_like(initial[:, 0], Status.MAX_STEPS, dtype=torch.int64)
    steps = torch.zeros_like(status)
    residuals: list[Tensor] = []
    recorded = {0: initial} if 0 in record else {}
    for step in range(1, max_steps + 1):
        active = status == Status.MAX_STEPS
        if rtol > 0 and not active.any():
            break
        image = function(value)
        residual = relative_residual(value, image)
        proposal, memory = solver.step(value, image, memory)
        finite = image.isfinite().all(dim=1)
        value = torch.where((active & finite)[:, None], proposal, value)
        status = status.masked_fill(active & ~finite, Status.NONFINITE)
        status = status.masked_fill(active & (residual < rtol), Status.CONVERGED)
        steps = steps + active
        residuals.append(residual if not residuals else torch.where(active, residual, residuals[-1]))
        if step in record:
            recorded[step] = value
    return Solution(
        value=value,
        status=status,
        steps=steps,
        residuals=torch.stack(residuals) if residuals else relative_residual(value, value)[None][:0],
        recorded={t: recorded.get(t, value) for t in sorted(record)},
    )
