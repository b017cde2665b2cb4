"""What solve() keeps of an iteration, and the verdict on each batch row.

Symbols as in solve.py: y is an iterate, f(y) its output; B batch rows of D numbers each, T steps.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .residuals import is_finite, norms, quotient

# Where no step needs the residuals of the steps before it, the residuals of this many steps are computed at once. Until
# then, the iterates and outputs of these steps are kept in memory.
STEPS_AT_ONCE = 16


class Status:
    """How the iteration of a batch row ended.

    The values are plain ints and not members of an enum, so that comparing them with a tensor is an ordinary tensor
    operation under torch.compile too.
    """

    CONVERGED = 0  # the relative residual fell below rtol
    MAX_STEPS = 1  # all steps were used
    NONFINITE = 2  # f returned inf or nan; the row keeps its last finite output


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
    # (t, B)  relative residual of the iterate of each step; inf from the first output on that is not finite. A row that
    # has stopped at the tolerance repeats its last one. t < T if all rows stopped early
    residuals: Tensor
    recorded: dict[int, Tensor]  # step -> (B, D), what `value` was after that step; step 0 has the initial value
    # step >= 1 -> (B, D), the iterate y to which that step applied f; a row that has stopped has the iterate of the
    # last step that it took part in. Empty without record_iterates
    iterates: dict[int, Tensor]
    outputs: dict[int, Tensor]  # step >= 1 -> (B, D), f of that iterate; `recorded` differs from it with best=True


class _Record:
    """What both kinds of record have: the value of all B batch rows after each recorded step."""

    def __init__(self, initial: Tensor, keep_iterates: bool):
        self._value = initial
        self._recorded = {0: initial}
        # The last iterate of each row and f of it, and the pairs of the recorded steps.
        self._application = (initial, initial) if keep_iterates else None
        self._applications: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, step: int) -> None:
        """Record the values, and the iterates if they are wanted, as they are after this step."""
        self._recorded[step] = self._value
        if self._application is not None:
            self._applications[step] = self._application

    def _solution(self, record: Collection[int], **numbers: Tensor) -> Solution:
        """The Solution. Recorded steps that were not reached have the last value and the last iterate."""
        pairs = {}
        if self._application is not None:
            pairs = {t: self._applications.get(t, self._application) for t in sorted(record) if t >= 1}
        return Solution(
            value=self._value,
            recorded={t: self._recorded.get(t, self._value) for t in sorted(record)},
            iterates={t: iterate for t, (iterate, _) in pairs.items()},
            outputs={t: output for t, (_, output) in pairs.items()},
            **numbers,
        )


class FixedRecord(_Record):
    """The record of a solve with a fixed number of steps, in which every row takes part in every step."""

    def __init__(self, initial: Tensor, *, keep_iterates: bool, residuals: bool):
        """
        Args:
            initial: (B, D) y_0.
            keep_iterates, residuals: see solve().
        """
        super().__init__(initial, keep_iterates)
        self._with_residuals = residuals
        self._pending: list[tuple[Tensor, Tensor]] = []  # iterates and outputs of the steps that have no residual yet
        self._finite: list[Tensor] = []  # of each step, (B,) whether its output is finite
        self._residuals: list[Tensor] = []  # each entry stands for t successive steps, (t, B)

    def add(self, iterate: Tensor, output: Tensor, proposal: Tensor) -> Tensor:
        """Take in one step, and return the next iterate (B, D).

        A row whose output is not finite keeps its iterate. Nothing marks the row as failed: a deterministic f fails
        again at the same iterate. With noise, as in training, the next step may succeed, and the row goes on.

        Args:
            iterate: (B, D) y.
            output: (B, D) f(y).
            proposal: (B, D) what the solver makes of them.
        """
        finite = is_finite(output)
        self._finite.append(finite)
        self._value = torch.where(finite[:, None], output, self._value)
        if self._with_residuals:
            self._pending.append((iterate, output))
            if len(self._pending) == STEPS_AT_ONCE:
                self._catch_up()
        if self._application is not None:
            self._application = iterate, output
        if proposal is output:
            return self._value  # plain iteration: every iterate is the output before it
        return torch.where(finite[:, None], proposal, iterate)

    def _catch_up(self) -> None:
        """Compute the residuals of the pending steps."""
        iterates, outputs = map(torch.stack, zip(*self._pending, strict=True))
        change, size, _ = norms(iterates, outputs)
        self._residuals.append(quotient(change, size, outputs.dtype))
        self._pending = []

    def finish(self, record: Collection[int]) -> Solution:
        """Return the Solution after the last step."""
        if self._pending:
            self._catch_up()
        if not self._finite:
            return self._solution(record, **statistics_without_steps(self._value))
        count = count_usable(torch.stack(self._finite))
        if self._with_residuals:
            residuals = torch.cat(self._residuals)
        else:
            dtype = torch.promote_types(self._value.dtype, torch.float32)
            residuals = torch.full_like(count, torch.inf, dtype=dtype).expand(len(self._finite), -1)
        return self._solution(record, **statistics(count, residuals))


def count_usable(finite: Tensor) -> Tensor:
    """Count the steps of each batch row before its first output that is not finite.

    Args:
        finite: (t, B) whether the output of each of t >= 1 steps is finite.

    Returns:
        (B,) int64, t where every output is finite.
    """
    return torch.where(finite, len(finite), torch.arange(len(finite), device=finite.device)[:, None]).amin(dim=0)


def statistics(count: Tensor, residuals: Tensor) -> dict[str, Tensor]:
    """Compute residual, status, steps and residuals of a Solution after T steps without a tolerance.

    Args:
        count: (B,) int64, the steps of each row before its first output that is not finite.
        residuals: (T, B) the relative residuals; those after a failure do not matter.
    """
    total = len(residuals)
    failed = torch.arange(total, device=count.device)[:, None] >= count
    residuals = residuals.masked_fill(failed, torch.inf)
    from_start = F.pad(residuals, (0, 0, 1, 0), value=torch.inf)  # (1 + T, B)  row 0: no step was usable
    return {
        "residual": from_start.gather(0, count[None])[0],
        "status": torch.where(count < total, Status.NONFINITE, Status.MAX_STEPS),
        "steps": (count + 1).clamp(max=total),
        "residuals": residuals,
    }


def statistics_without_steps(value: Tensor) -> dict[str, Tensor]:
    """Compute the `statistics` of a Solution with T = 0, whose value is y_0, (B, D)."""
    count = torch.zeros_like(value[:, 0], dtype=torch.int64)
    return statistics(count, value.new_empty(0, len(value), dtype=torch.promote_types(value.dtype, torch.float32)))


class StoppingRecord(_Record):
    """The record of an iteration whose rows may stop one after the other, and may leave the batch then."""

    def __init__(self, initial: Tensor, *, keep_iterates: bool, rtol: float, best: bool):
        """
        Args:
            initial: (B, D) y_0.
            keep_iterates, rtol, best: see solve().
        """
        super().__init__(initial, keep_iterates)
        self.rows: Tensor | None = None  # (b,) int64, the batch rows that are still computed; None: all
        self.active = torch.ones_like(initial[:, 0], dtype=torch.bool)  # (b,) those of them that have not stopped
        self._rtol, self._best = rtol, best
        self._steps = torch.zeros_like(self.active, dtype=torch.int64)
        self._converged = torch.zeros_like(self.active)
        self._nonfinite = torch.zeros_like(self.active)
        precise = torch.promote_types(initial.dtype, torch.float32)  # the dtype of relative_residual
        self._residual = torch.full_like(initial[:, 0], torch.inf, dtype=precise)  # of the last step
        # Of the value. NaN as long as that is the initial one: no comparison with NaN holds, so that with best=True the
        # first output is taken whatever its residual is.
        self._residual_of_value = torch.full_like(self._residual, torch.nan)
        self._residuals: list[Tensor] = []

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
        change, size, finite = norms(iterate, output)
        active, residual = self.active, quotient(change, size, iterate.dtype)
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

    def _get(self, whole: Tensor) -> Tensor:
        """The rows that are computed, of a tensor of all rows."""
        return whole if self.rows is None else whole[self.rows]

    def _put(self, whole: Tensor, rows: Tensor) -> Tensor:
        """A tensor of all rows with new values in those that are computed."""
        return rows if self.rows is None else whole.index_copy(0, self.rows, rows)

    def finish(self, record: Collection[int]) -> Solution:
        """Return the Solution after the last step."""
        status = torch.full_like(self._steps, Status.MAX_STEPS)
        status = status.masked_fill(self._converged, Status.CONVERGED).masked_fill(self._nonfinite, Status.NONFINITE)
        return self._solution(
            record,
            residual=self._residual_of_value.nan_to_num(nan=torch.inf, posinf=torch.inf),
            status=status,
            steps=self._steps,
            residuals=torch.stack(self._residuals) if self._residuals else self._residual[None][:0],
        )
