"""The solvers: frozen records of their parameters, with `init` and `step` on flat iterates (B, D) (see solve.Solver).

Training always uses FixedPointIteration without damping, as the paper does (Algorithm 2). The supervised states (Eq.
12) should be those that f reaches by itself, and the perturbation (Eq. 15) would mislead an accelerated solver:
Anderson and Broyden estimate the Jacobian of f from the differences of successive outputs, which the noise changes too.
At test time all solvers look for the same fixed point, and any of them may be used.

Every scalar product is an element-wise product, summed along its own batch row. A batched matrix product would be
shorter, but its kernel, and so its rounding, depends on the batch size, and the boxes of an image would change slightly
with the other images of its batch. There is one exception, on a CPU with several threads: torch distributes a sum over
the threads if it is the only one and has more than 32,768 terms. A single image whose D is larger is then rounded
differently than the same image in a batch. Since the history size m is small, these sums cost O(m D), little compared
with f.
The arithmetic is in float32 or better, whatever the dtype of the iterates, and never waits for the device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FixedPointIteration:
    """Plain iteration: y <- (1 - damping) y + damping f(y). Damping 1 is the paper's naive solver (Sec. 3.2)."""

    damping: float = 1.0

    def __post_init__(self) -> None:
        _require_damping(self.damping)

    def init(self, iterate: Tensor) -> tuple[()]:
        """Return the empty state: the next iterate depends only on y and f(y)."""
        return ()

    def step(self, iterate: Tensor, output: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        """Move from y towards f(y) by the fraction `damping` of the distance."""
        return (output if self.damping == 1 else torch.lerp(iterate, output, self.damping)), state


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (JACM 1965), in the difference form of Walker and Ni (SIAM J. Numer. Anal. 2011).

    Let g_i = f(y_i) - y_i be the changes at the last m iterates, dy_j and dg_j the differences of successive y_i and
    g_i. If f were affine, the point y - sum_j w_j dy_j would have the change g - sum_j w_j dg_j. At the fixed point the
    change is 0. So step() solves the least-squares problem

        min_w || g - sum_j w_j dg_j ||

    and moves from that point by `damping` times its change.
    """

    history_size: int = 4  # m, the number of iterates that are combined, including the current one
    damping: float = 1.0
    regularization: float = 1e-6  # added to the diagonal of the Gram matrix, whose own diagonal is 1

    def __post_init__(self) -> None:
        if self.history_size < 2:
            raise ValueError(
                f"history_size of Anderson must be at least 2 (1 would be plain iteration), got {self.history_size}"
            )
        if not 0 <= self.regularization < math.inf:
            raise ValueError(f"regularization must be finite and not negative, got {self.regularization}")
        _require_damping(self.damping)

    def init(self, iterate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the empty history: the past iterates and their changes, each (B, 0, D), later up to (B, m, D)."""
        empty = _precise(iterate)[:, None][:, :0]
        return empty, empty

    def step(
        self, iterate: Tensor, output: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return y + damping g - sum_j w_j (dy_j + damping dg_j). The first step has no differences and is plain."""
        current = _precise(iterate)
        change = _precise(output) - current  # (B, D)  g
        iterates = torch.cat([state[0], current[:, None]], dim=1)[:, -self.history_size :]  # (B, i, D), i <= m
        changes = torch.cat([state[1], change[:, None]], dim=1)[:, -self.history_size :]
        plain, _ = FixedPointIteration(self.damping).step(current, _precise(output), ())
        if iterates.shape[1] == 1:
            return plain.to(iterate.dtype), (iterates, changes)
        differences = changes.diff(dim=1)  # (B, i - 1, D)  dg
        weights = self._least_squares(change, differences)
        correction = iterates.diff(dim=1) + self.damping * differences
        proposal = plain - _combine(weights, correction)
        return _finite_or(proposal, plain).to(iterate.dtype), (iterates, changes)

    def _least_squares(self, change: Tensor, differences: Tensor) -> Tensor:
        """Solve min_w ||g - sum_j w_j dg_j|| by its normal equations, (dg^T dg + regularization) w = dg^T g.

        The differences shrink by orders of magnitude as the iteration converges. They are scaled to norm 1 first, so
        that the diagonal of the Gram matrix is 1 and the same regularization suits every step.

        Args:
            change: (B, D) g.
            differences: (B, j, D) dg.

        Returns:
            (B, j) w. It is 0, which makes the step plain, in rows whose equations have no unique solution.
        """
        size = torch.linalg.vector_norm(differences, dim=2).clamp(min=torch.finfo(change.dtype).tiny)
        unit = differences / size[:, :, None]
        gram = torch.stack([_dot(unit, column) for column in unit.unbind(1)], dim=2)
        gram = gram + self.regularization * torch.eye(unit.shape[1], device=unit.device, dtype=unit.dtype)
        weights, info = torch.linalg.solve_ex(gram, _dot(unit, change)[:, :, None])
        weights = weights[:, :, 0] / size
        solved = (info == 0) & weights.isfinite().all(dim=1)
        return torch.where(solved[:, None], weights, 0.0)


@dataclass(frozen=True)
class Broyden:
    """Broyden's method with a limited history ("good Broyden", Math. Comp. 1965) for the root of g(y) = f(y) - y.

    Newton's method would go to y - J^-1 g, with the Jacobian J of g. Broyden's method uses an estimate H of J^-1,

        H = -I + sum_j u_j v_j^T,

    and stores only the vectors u_j and v_j. H starts as -I, as if f were constant, so that the first step is plain:
    y - H g = y + g = f(y). Each later step adds one term, computed by _rank_one().

    After m terms it restarts from -I (Kelley, Iterative Methods for Linear and Nonlinear Equations, 1995, Sec. 7.3).
    Dropping only the oldest term would not do: each term corrects the H formed by the terms before it, and the
    remaining ones would no longer satisfy their secant conditions. There is no line search, so a step may increase the
    residual; with `best`, solve() still returns the best output.
    """

    history_size: int = 4  # m, the largest number of rank-one terms

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(f"history_size of Broyden must be at least 1, got {self.history_size}")

    def init(self, iterate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the empty history.

        It consists of the last iterate and its change, each (B, 0, D), later (B, 1, D); and of u and v, each (B, 0, D),
        later up to (B, m, D).
        """
        empty = _precise(iterate)[:, None][:, :0]
        return empty, empty, empty, empty

    def step(self, iterate: Tensor, output: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Update H with the effect of the last step, and return y - H g."""
        last_iterate, last_change, left, right = state
        current = _precise(iterate)
        change = _precise(output) - current  # (B, D)  g
        if last_iterate.shape[1] > 0:
            if left.shape[1] == self.history_size:
                left, right = left[:, :0], right[:, :0]  # restart
            new_left, new_right = _rank_one(current - last_iterate[:, 0], change - last_change[:, 0], left, right)
            left = torch.cat([left, new_left[:, None]], dim=1)
            right = torch.cat([right, new_right[:, None]], dim=1)
        proposal = _finite_or(current - _product(left, right, change), _precise(output))
        return proposal.to(iterate.dtype), (current[:, None], change[:, None], left, right)


def _rank_one(step: Tensor, difference: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors u and v of Broyden's update H <- H + u v^T.

    The step s = y_t - y_{t-1} changed g by dg, so the new H should satisfy the secant condition H dg = s. Broyden's
    update changes the Jacobian as little as possible: J <- J + (dg - J s) s^T / (s^T s). By the Sherman-Morrison
    formula, which gives the inverse of a matrix after a rank-one change, this is

        H <- H + (s - H dg) (s^T H) / (s^T H dg).

    Args:
        step: (B, D) s.
        difference: (B, D) dg.
        left, right: (B, j, D) u_j and v_j of the H before the update.

    Returns:
        u and v, (B, D) each. They are 0 in rows where s^T H dg is 0 up to rounding, since the new J would be singular.
    """
    mapped = _product(left, right, difference)  # H dg
    row = _product(right, left, step)  # H^T s
    slope = torch.linalg.vecdot(step, mapped)[:, None]  # s^T H dg
    usable = slope.abs() > torch.finfo(step.dtype).eps * torch.linalg.vecdot(step, step)[:, None]
    return torch.where(usable, (step - mapped) / slope, 0.0), torch.where(usable, row, 0.0)


def _product(left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
    """Compute (-I + sum_j u_j v_j^T) x for u, v (B, j, D) and x (B, D)."""
    return _combine(_dot(right, vector), left) - vector


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Compute the scalar products (B, j) of j vectors (B, j, D) with one vector (B, D)."""
    return (rows * vector[:, None]).sum(dim=2)


def _combine(weights: Tensor, rows: Tensor) -> Tensor:
    """Compute sum_j w_j x_j, (B, D), for weights w (B, j) and vectors x (B, j, D)."""
    return (weights[:, :, None] * rows).sum(dim=1)


def _precise(tensor: Tensor) -> Tensor:
    """Convert to float32, unless the dtype is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _finite_or(proposal: Tensor, plain: Tensor) -> Tensor:
    """Replace the proposal by the plain step in batch rows where it is not finite; both are (B, D)."""
    return torch.where(proposal.isfinite().all(dim=1, keepdim=True), proposal, plain)


def _require_damping(damping: float) -> None:
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], got {damping}")
