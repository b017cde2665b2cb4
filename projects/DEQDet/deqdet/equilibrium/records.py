"""The result of solve(), and the bookkeeping that produces it.

Symbols as in solve.py: y is an iterate, f(y) its output; B batch rows of D numbers each, T steps.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .residuals import is_finite, norms, quotient

# If no decision depends on the residuals, those of this many steps are computed together. Until then, the iterates and
# outputs of these steps stay in memory.
STEPS_AT_ONCE = 16


class Status:
    """How the iteration of a batch row ended.

    The values are plain ints, because torch.compile evaluates the comparison of a tensor with an enum member to False.
    """

    CONVERGED = 0  # the relative residual fell below rtol
    MAX_STEPS = 1  # all steps were used
    NONFINITE = 2  # f returned inf or nan; the row keeps its last finite output


@dataclass(frozen=True)
class Solution:
    """The result of the iteration for B batch rows of D numbers after at most T steps.

    `value` and `recorded` are always outputs f(y), never iterates that a solver has extrapolated and to which f has not
    been applied.
    """

    value: Tensor  # (B, D)  output of the last iterate, or with best=True of the iterate with the lowest residual
    # (B,)  relative residual of the step whose output is `value`: with best=True the lowest one; for a row that became
    # non-finite that of its last finite step; inf if there was none
    residual: Tensor
    status: Tensor  # (B,)  int64, constants of Status
    steps: Tensor  # (B,)  int64, applications of f that the row took part in
    # (t, B)  relative residual of each step; inf from the first non-finite output on. A row that has stopped at the
    # tolerance repeats its last residual. t < T if all rows stopped early
    residuals: Tensor
    recorded: dict[int, Tensor]  # step -> (B, D), what `value` was after that step; step 0 has the initial value
    # step >= 1 -> (B, D), the iterate y to which that step applied f; for a row that has stopped, the iterate of its
    # last step. Empty without record_iterates
    iterates: dict[int, Tensor]
    outputs: dict[int, Tensor]  # step >= 1 -> (B, D), f of that iterate; `recorded` differs from it with best=True


class _Record:
    """The common part of both records: the value of all B batch rows after each recorded step."""

    def __init__(self, initial: Tensor, keep_iterates: bool):
        self._value = initial
        self._recorded = {0: initial}
        # The last iterate of each row and f of it, and the pairs of the recorded steps.
        self._application = (initial, initial) if keep_iterates else None
        self._applications: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, step: int) -> None:
        """Record the current values, and if requested the iterates, under this step."""
        self._recorded[step] = self._value
        if self._application is not None:
            self._applications[step] = self._application

    def _solution(self, record: Collection[int], **numbers: Tensor) -> Solution:
        """Make the Solution. Recorded steps that were not reached get the last value and the last iterate."""
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
        self._pending: list[tuple[Tensor, Tensor]] = []  # iterates and outputs of the steps without residuals so far
        self._finite: list[Tensor] = []  # for each step, (B,) whether its output is finite
        self._residuals: list[Tensor] = []  # each entry covers t successive steps, (t, B)

    def add(self, iterate: Tensor, output: Tensor, proposal: Tensor) -> Tensor:
        """Record one step, and return the next iterate (B, D).

        A row whose output is not finite keeps its iterate. The row is not marked as failed: a deterministic f fails
        again at the same iterate, but with noise, as in training, the next step may succeed.

        Args:
            iterate: (B, D) y.
            output: (B, D) f(y).
            proposal: (B, D) the next iterate that the solver proposes.
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
            return self._value  # plain iteration: every iterate is the previous output
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
    """Compute the fields residual, status, steps and residuals of a Solution after T steps without a tolerance.

    Args:
        count: (B,) int64, the steps of each row before its first output that is not finite.
        residuals: (T, B) the relative residuals; values after a failure are ignored.
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
    """The record of an iteration whose rows may stop at different steps, and may then leave the batch."""

    def __init__(self, initial: Tensor, *, keep_iterates: bool, rtol: float, best: bool):
        """
        Args:
            initial: (B, D) y_0.
            keep_iterates, rtol, best: see solve().
        """
        super().__init__(initial, keep_iterates)
        self.rows: Tensor | None = None  # (b,) int64, the batch rows that are still computed; None: all
        self.active = torch.ones_like(initial[:, 0], dtype=torch.bool)  # (b,) True for rows that have not stopped
        self._rtol, self._best = rtol, best
        self._steps = torch.zeros_like(self.active, dtype=torch.int64)
        self._converged = torch.zeros_like(self.active)
        self._nonfinite = torch.zeros_like(self.active)
        precise = torch.promote_types(initial.dtype, torch.float32)  # the dtype of relative_residual
        self._residual = torch.full_like(initial[:, 0], torch.inf, dtype=precise)  # of the last step
        # The residual that belongs to the value. It is NaN as long as the value is y_0: comparisons with NaN are False,
        # so that with best=True the first output is accepted whatever its residual.
        self._residual_of_value = torch.full_like(self._residual, torch.nan)
        self._residuals: list[Tensor] = []

    def drop_stopped(self, remaining: int) -> Tensor:
        """Continue with the `remaining` active rows only, and return their indices among the current rows."""
        # Sort the active rows to the front, in their order. nonzero() would make the host wait for their number again.
        kept = self.active.int().argsort(descending=True, stable=True)[:remaining]
        self.rows = kept if self.rows is None else self.rows[kept]
        self.active = self.active[kept]
        return kept

    def add(self, iterate: Tensor, output: Tensor, proposal: Tensor) -> Tensor:
        """Record one step of the b rows that are computed, and return the next iterate (b, D).

        Args:
            iterate: (b, D) y.
            output: (b, D) f(y).
            proposal: (b, D) the next iterate that the solver proposes. A row with a non-finite output keeps its
                iterate.
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
        """Update the statistics of the computed rows after one step; all arguments are (b,)."""
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
        """Select the computed rows from a tensor of all rows."""
        return whole if self.rows is None else whole[self.rows]

    def _put(self, whole: Tensor, rows: Tensor) -> Tensor:
        """Return a tensor of all rows in which the computed rows have new values."""
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
