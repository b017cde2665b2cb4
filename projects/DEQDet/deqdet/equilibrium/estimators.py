"""How to differentiate a fixed point y* = f(y*; theta): each estimator maps (f, value) to a value with gradient.

f maps a flat (B, D) to (B, D), each row for itself, and closes over what to differentiate: parameters, features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .solve import Map, Status, solve
from .solvers import FixedPointIteration


@dataclass(frozen=True)
class Unrolled:
    """Back-propagation through every step (BPTT), also into the value that it starts from.

    `steps` applications from any value; exact for the fixed point if they reach it.
    """

    steps: int

    def __post_init__(self) -> None:
        _require_positive("steps", self.steps)

    def __call__(self, function: Map, value: Tensor) -> Tensor:
        """(B, D) -> (B, D), f applied `steps` times."""
        for _ in range(self.steps):
            value = function(value)
        return value


@dataclass(frozen=True)
class Phantom:
    """`steps` damped applications from a detached value (Geng et al., On Training Implicit Models, NeurIPS 2021).

    At a fixed point, and with damping 1, the gradient is the Neumann series of the inverse Jacobian term cut
    after k = steps terms, sum_{i < k} J^i df/dtheta: one step is JFB (Eq. 9), two are the refinement-aware
    gradient (Eq. 11). In the detector J is the content path's Jacobian, since layers detach the position that
    they receive. With damping lambda: y <- (1 - lambda) y + lambda f(y).
    """

    steps: int = 2
    damping: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("steps", self.steps)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")

    def __call__(self, function: Map, value: Tensor) -> Tensor:
        """(B, D) on the solving path -> (B, D)."""
        value = value.detach()
        for _ in range(self.steps):
            image = function(value)
            value = image if self.damping == 1 else torch.lerp(value, image, self.damping)
        return value


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem's gradient (Eq. 8), exact up to rtol: a reference, slow.

    Backward solves the adjoint fixed point u = J^T u + grad by plain iteration, so it needs a contraction.
    """

    max_steps: int = 200
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive("max_steps", self.max_steps)
        if self.rtol <= 0:
            raise ValueError(f"rtol must be above 0, got {self.rtol}")

    def __call__(self, function: Map, value: Tensor) -> Tensor:
        """(B, D) fixed point of f -> (B, D), f of it.

        Raises:
            RuntimeError: in backward, if the adjoint iteration does not reach rtol in max_steps.
        """
        point = value.detach().requires_grad_()
        with torch.enable_grad():
            image = function(point)  # the graph that the adjoint iteration reads again and again

        def solve_adjoint(grad: Tensor) -> Tensor:
            def adjoint(u: Tensor) -> Tensor:
                return torch.autograd.grad(image, point, u, retain_graph=True)[0] + grad

            solution = solve(adjoint, grad, solver=FixedPointIteration(), max_steps=self.max_steps, rtol=self.rtol)
            if (solution.status != Status.CONVERGED).any():
                raise RuntimeError(
                    f"the adjoint of the fixed point did not converge to rtol {self.rtol} in {self.max_steps} "
                    "steps: is the map a contraction, and was the value its fixed point?"
                )
            return solution.value

        result = function(value.detach())
        if result.requires_grad:
            result.register_hook(solve_adjoint)
        return result


def _require_positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
