"""unroll(): plain iteration of a fixed number of steps, in little more time than f alone.

Symbols as in solve.py: y is an iterate, f(y) its output; B batch rows of D numbers each, T steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .records import STEPS_AT_ONCE, Solution, numbers_of_fixed, numbers_of_no_step
from .residuals import norms, quotient
from .solve import full_precision

State = TypeVar("State")


@dataclass(frozen=True)
class Path:
    """What is known after t steps."""

    value: Tensor  # (B, D)  the last finite output, or y_0
    good: Tensor  # (t, B)  int64, 1 for the steps before a row's first output that is not finite, 0 from then on
    residuals: Tensor  # (t, B)  relative residual of each step


def unroll(
    function: Callable[[State], State],
    initial: State,
    *,
    steps: int,
    pack: Callable[[Sequence[State]], Tensor],
    finish: Callable[[Tensor, Path | None], Solution] | None = None,
) -> Solution:
    """Apply f, which is `function`, again and again. f must accept inf and nan.

    The Solution is that of solve() with FixedPointIteration(), without recorded steps. Between two steps nothing is
    done: 16 of them are packed and tested at once. So f is applied to iterates that are not finite, too; what it makes
    of them is ignored.

    Args:
        initial: y_0, in any form that f and `pack` understand.
        steps: T, at least 0.
        pack: makes of t states one tensor (t, B, D).
        finish: computes the same as `conclude`, and is called in its place: compiled, for example.
    """
    chain, path = [initial], None
    if steps == 0:
        value = pack(chain)[0]
        return Solution(value=value, recorded={}, iterates={}, outputs={}, **numbers_of_no_step(value))
    for step in range(1, steps):
        chain.append(function(chain[-1]))
        if step % STEPS_AT_ONCE == 0:
            path = extend(pack(chain), path)
            chain = chain[-1:]
    chain.append(function(chain[-1]))
    return (conclude if finish is None else finish)(pack(chain), path)


def conclude(states: Tensor, earlier: Path | None) -> Solution:
    """Make the Solution after the last t steps.

    Args:
        states: (1 + t, B, D) the first of their iterates, and their outputs; it may be overwritten.
        earlier: of the steps before these, if there are any.
    """
    path = extend(states, earlier)
    numbers = numbers_of_fixed(path.good, path.residuals, path.value.dtype)
    return Solution(value=path.value, recorded={}, iterates={}, outputs={}, **numbers)


def extend(states: Tensor, earlier: Path | None) -> Path:
    """The path after t more steps; for the arguments see `conclude`."""
    with full_precision(states.device):
        change, size, finite = norms(states[:-1], states[1:])
        residuals = quotient(change, size, states.dtype)
        if earlier is not None:
            finite = finite * earlier.good[-1]  # once a row has failed, it stays out
            states[0] = earlier.value
        good = finite.cumprod(dim=0)
        last = good.sum(dim=0)
        value = states[last, torch.arange(len(last), device=last.device)]
    if earlier is not None:
        good, residuals = torch.cat([earlier.good, good]), torch.cat([earlier.residuals, residuals])
    return Path(value, good, residuals)
