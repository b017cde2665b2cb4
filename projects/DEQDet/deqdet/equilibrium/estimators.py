"""Gradients of a fixed point y* = f(y*; theta), each estimator a function of (f, iterate) whose output carries them.

Differentiating y* = f(y*; theta) on both sides (the implicit function theorem) gives Eq. 8,

    dy*/dtheta = (I - J)^-1 df/dtheta,    J = df/dy at y*,

whatever path led to y*, so that the path itself needs no graph. If the spectral radius of J is below 1, the inverse is
the Neumann series

    (I - J)^-1 = I + J + J^2 + ...

Cut after k terms, it gives the gradient of k applications of f to a y* that counts as a constant: Phantom. One term
is Jacobian-free backpropagation (JFB, Eq. 9). Two terms are the paper's refinement-aware gradient (RAG, Eq. 11): the
second one, J df/dtheta, tells f what its next application will make of its output. Implicit sums all terms, and
Unrolled differentiates the path itself.

f maps flat iterates (B, D) to (B, D), each row by itself. It closes over what is to be differentiated: parameters and
features. In the detector J is the Jacobian along the content alone, because the layers detach the position that they
receive from another layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .records import Status
from .solve import Map, solve
from .solvers import FixedPointIteration


@dataclass(frozen=True)
class Unrolled:
    """Back-propagation through time (BPTT): through `steps` applications of f, also into the iterate they start from.

    The gradient of the fixed point is exact if these steps reach it; memory grows with their number.
    """

    steps: int

    def __post_init__(self) -> None:
        _require_positive("steps", self.steps)

    def __call__(self, function: Map, iterate: Tensor) -> Tensor:
        """Apply f `steps` times to an iterate (B, D), and return the last output (B, D)."""
        for _ in range(self.steps):
            iterate = function(iterate)
        return iterate


@dataclass(frozen=True)
class Phantom:
    """The phantom gradient: k = steps damped applications of f to a detached iterate (Geng et al., NeurIPS 2021).

    Each application is y <- (1 - lambda) y + lambda f(y) with lambda = damping. By the chain rule the last y has the
    derivative

        sum_{i < k} ((1 - lambda) I + lambda J)^i lambda df/dtheta,

    with all Jacobians taken at y* if that is where it starts. For lambda = 1 this is the Neumann series of Eq. 8 cut
    after k terms: k = 1 is JFB (Eq. 9), k = 2 the refinement-aware gradient (Eq. 11).
    """

    steps: int = 2  # k
    damping: float = 1.0  # lambda

    def __post_init__(self) -> None:
        _require_positive("steps", self.steps)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")

    def __call__(self, function: Map, iterate: Tensor) -> Tensor:
        """Return the last of the k iterates, (B, D), that follow an iterate (B, D) of the solving path."""
        iterate = iterate.detach()
        for _ in range(self.steps):
            output = function(iterate)
            iterate = output if self.damping == 1 else torch.lerp(iterate, output, self.damping)
        return iterate


@dataclass(frozen=True)
class Implicit:
    """The gradient of the implicit function theorem (Eq. 8), exact up to rtol. It is slow, and serves as a reference.

    For a loss with the gradient v at y*, back-propagation needs u = (I - J)^-T v. That is the fixed point of the
    adjoint map u = J^T u + v, which the backward pass finds by plain iteration; so f must be a contraction.

    There is no second derivative: the backward pass itself records no graph, so that create_graph=True does not help.
    """

    max_steps: int = 200
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive("max_steps", self.max_steps)
        if self.rtol <= 0:
            raise ValueError(f"rtol must be above 0, got {self.rtol}")

    def __call__(self, function: Map, iterate: Tensor) -> Tensor:
        """Apply f once to its fixed point (B, D), and return the output (B, D).

        Raises:
            RuntimeError: in the backward pass, if the adjoint iteration does not reach rtol in max_steps.
        """
        point = iterate.detach().requires_grad_()
        with torch.enable_grad():
            output = function(point)  # the graph through which each step of the adjoint iteration goes back

        def solve_adjoint(grad: Tensor) -> Tensor:
            def adjoint(u: Tensor) -> Tensor:
                return torch.autograd.grad(output, point, u, retain_graph=True)[0] + grad

            solution = solve(adjoint, grad, solver=FixedPointIteration(), max_steps=self.max_steps, rtol=self.rtol)
            if (solution.status != Status.CONVERGED).any():
                raise RuntimeError(
                    f"the adjoint of the fixed point did not converge to rtol {self.rtol} in {self.max_steps} "
                    "steps: is the map a contraction, and was the iterate its fixed point?"
                )
            return solution.value

        # A second graph, from a constant: its ordinary backward pass multiplies by df/dtheta what the hook returns.
        result = function(iterate.detach())
        if result.requires_grad:
            result.register_hook(solve_adjoint)
        return result


def _require_positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
