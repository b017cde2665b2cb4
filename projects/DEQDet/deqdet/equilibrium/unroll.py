"""unroll(): plain iteration for a fixed number of steps, with little overhead beyond f itself.

Symbols as in solve.py: y is an iterate, f(y) its output; B batch rows of D numbers each, T steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .records import STEPS_AT_ONCE, Solution, count_usable, statistics, statistics_without_steps
from .residuals import norms, quotient
from .solve import without_autocast

State = TypeVar("State")


@dataclass(frozen=True)
class Progress:
    """The state of B batch rows after t steps."""

    value: Tensor  # (B, D)  the last finite output, or y_0
    count: Tensor  # (B,)  int64, the steps before a row's first output that is not finite
    residuals: Tensor  # (t, B)  relative residual of each step


def unroll(
    function: Callable[[State], State],
    initial: State,
    *,
    steps: int,
    pack: Callable[[Sequence[State]], Tensor],
    finish: Callable[[Tensor, Progress | None], Solution] | None = None,
) -> Solution:
    """Apply f, which is `function`, T times. f must accept inf and nan.

    The Solution is that of solve() with FixedPointIteration(), without recorded steps. Nothing is computed between two
    steps: the states of 16 steps are packed and checked together. So f may be applied to iterates that are not finite;
    such outputs are ignored.

    Args:
        initial: y_0, in any form that f and `pack` understand.
        steps: T.
        pack: stacks t states into one tensor (t, B, D).
        finish: called in place of `conclude`, for example a compiled version of it.

    Raises:
        ValueError: steps is negative.
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    states, progress = [initial], None
    for step in range(1, steps):
        states.append(function(states[-1]))
        if step % STEPS_AT_ONCE == 0:
            packed = pack(states)
            with without_autocast(packed.device):
                progress = extend(packed, progress)
            states = states[-1:]
    if steps > 0:
        states.append(function(states[-1]))
    packed = pack(states)
    with without_autocast(packed.device):
        if steps == 0:
            return _solution(packed[0], statistics_without_steps(packed[0]))
        return (conclude if finish is None else finish)(packed, progress)


def conclude(states: Tensor, earlier: Progress | None) -> Solution:
    """Compute the Solution from the last t steps and the progress before them.

    Args:
        states: (1 + t, B, D) the iterate y of the first of these t steps, then the t outputs.
        earlier: the progress before these steps; None if there were none.
    """
    progress = extend(states, earlier)
    return _solution(progress.value, statistics(progress.count, progress.residuals))


def extend(states: Tensor, earlier: Progress | None) -> Progress:
    """Compute the progress after t more steps. The arguments are those of `conclude`."""
    change, size, finite = norms(states[:-1], states[1:])
    residuals = quotient(change, size, states.dtype)
    if earlier is not None:
        finite = finite & (earlier.count == len(earlier.residuals))  # a row that has failed stays failed
        states = torch.cat([earlier.value[None], states[1:]])
    count = count_usable(finite)
    value = states[count, torch.arange(len(count), device=count.device)]
    if earlier is not None:
        count, residuals = earlier.count + count, torch.cat([earlier.residuals, residuals])
    return Progress(value, count, residuals)


def _solution(value: Tensor, numbers: dict[str, Tensor]) -> Solution:
    return Solution(value=value, recorded={}, iterates={}, outputs={}, **numbers)
