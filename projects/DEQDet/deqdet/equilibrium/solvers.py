"""Solvers: frozen records of their numbers, with `init` and `step` on a flat (B, D) tensor (see solve.Solver).

Each sample is solved for itself, by sums over its own row: batched matrix products would round differently in another
batch size. D is large and the memory m small, so that a step costs O(m D) beside the map; it runs in float32 or better,
whatever the state's type, and nothing in it waits for the device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FixedPointIteration:
    """y <- (1 - damping) y + damping f(y); without damping (1) the paper's naive solver, Sec. 3.2."""

    damping: float = 1.0

    def __post_init__(self) -> None:
        _require_damping(self.damping)

    def init(self, value: Tensor) -> tuple[()]:
        """Nothing is remembered."""
        return ()

    def step(self, value: Tensor, image: Tensor, memory: tuple[()]) -> tuple[Tensor, tuple[()]]:
        """On the way from the value to its image."""
        return (image if self.damping == 1 else torch.lerp(value, image, self.damping)), memory


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (JACM 1965), in the difference form of Walker and Ni (SIAM J. Numer. Anal. 2011).

    With the changes g_i = f(y_i) - y_i of the last m iterates, it takes the combination of them whose g is smallest,
    and goes on from there by damping * g. A least-squares problem that has no solution means a plain step.
    """

    memory: int = 4  # m: iterates that are combined, the current one counted
    damping: float = 1.0
    regularization: float = 1e-6  # of the least-squares problem, whose differences have norm 1

    def __post_init__(self) -> None:
        if self.memory < 2:
            raise ValueError(f"memory of Anderson must be at least 2 (1 would be plain iteration), got {self.memory}")
        if not 0 <= self.regularization < math.inf:
            raise ValueError(f"regularization must be finite and not negative, got {self.regularization}")
        _require_damping(self.damping)

    def init(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Past iterates and their changes, each (B, 0..m, D)."""
        empty = _precise(value)[:, None][:, :0]
        return empty, empty

    def step(
        self, value: Tensor, image: Tensor, memory: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """y + damping g, corrected by what the past m - 1 differences explain of g."""
        current = _precise(value)
        change = _precise(image) - current  # (B, D)
        values = torch.cat([memory[0], current[:, None]], dim=1)[:, -self.memory :]
        changes = torch.cat([memory[1], change[:, None]], dim=1)[:, -self.memory :]
        plain, _ = FixedPointIteration(self.damping).step(current, _precise(image), ())
        if values.shape[1] == 1:
            return plain.to(value.dtype), (values, changes)
        differences = changes.diff(dim=1)  # (B, j, D), j < m
        weights = self._explain(change, differences)
        correction = values.diff(dim=1) + self.damping * differences
        proposal = plain - _combine(weights, correction)
        return _finite_or(proposal, plain).to(value.dtype), (values, changes)

    def _explain(self, change: Tensor, differences: Tensor) -> Tensor:
        """(B, j) weights w that make ||g - sum_j w_j dg_j|| smallest; 0 where there are none.

        The differences shrink as the iteration converges: scaled to norm 1, their Gram matrix stays well-conditioned.
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
    """Limited-memory Broyden ("good Broyden", Math. Comp. 1965) on g(y) = f(y) - y = 0.

    The inverse Jacobian of g is H = -I + sum_j u_j v_j^T, so that it begins with a plain step. With m rank-one terms
    it starts anew (Kelley, Iterative Methods for Linear and Nonlinear Equations, 1995, Sec. 7.3). It searches along
    no line: where it may lead astray, `best` of solve() helps.
    """

    memory: int = 4  # m

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"memory of Broyden must be at least 1, got {self.memory}")

    def init(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last iterate and its change, (B, 0..1, D) each; u and v, (B, 0..m, D) each."""
        empty = _precise(value)[:, None][:, :0]
        return empty, empty, empty, empty

    def step(self, value: Tensor, image: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y - H g, with H brought up to the last step first."""
        last_value, last_change, left, right = memory
        current = _precise(value)
        change = _precise(image) - current  # (B, D)
        if last_value.shape[1] > 0:
            if left.shape[1] == self.memory:  # dropping the oldest term alone would leave an H that fits no step
                left, right = left[:, :0], right[:, :0]
            new_left, new_right = _rank_one(current - last_value[:, 0], change - last_change[:, 0], left, right)
            left = torch.cat([left, new_left[:, None]], dim=1)
            right = torch.cat([right, new_right[:, None]], dim=1)
        proposal = _finite_or(current - _product(left, right, change), _precise(image))
        return proposal.to(value.dtype), (current[:, None], change[:, None], left, right)


def _rank_one(step: Tensor, difference: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """u, v (B, D) of the least change of H after which H dg = s; 0 where s and H dg are orthogonal."""
    mapped = _product(left, right, difference)  # H dg
    row = _product(right, left, step)  # H^T s
    slope = torch.linalg.vecdot(step, mapped)[:, None]
    usable = slope.abs() > torch.finfo(step.dtype).eps * torch.linalg.vecdot(step, step)[:, None]
    return torch.where(usable, (step - mapped) / slope, 0.0), torch.where(usable, row, 0.0)


def _product(left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
    """(-I + sum_j u_j v_j^T) x for u, v (B, j, D) and x (B, D)."""
    return _combine(_dot(right, vector), left) - vector


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    """(B, j) scalar products of (B, j, D) with (B, D)."""
    return (rows * vector[:, None]).sum(dim=2)


def _combine(weights: Tensor, rows: Tensor) -> Tensor:
    """(B, D) sums over j of weights (B, j) times rows (B, j, D)."""
    return (weights[:, :, None] * rows).sum(dim=1)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _finite_or(proposal: Tensor, plain: Tensor) -> Tensor:
    """The proposal of each sample where all of it is finite, else the plain step. (B, D) each."""
    return torch.where(proposal.isfinite().all(dim=1, keepdim=True), proposal, plain)


def _require_damping(damping: float) -> None:
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], got {damping}")
