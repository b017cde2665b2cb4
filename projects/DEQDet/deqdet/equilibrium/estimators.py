"""Gradients of a fixed point y* = f(y*; theta).

An estimator is a function of f and an iterate, whose output carries the gradient.

Differentiating y* = f(y*; theta) on both sides (the implicit function theorem) gives Eq. 8,

    dy*/dtheta = (I - J)^-1 df/dtheta,    J = df/dy at y*,

independently of the path that led to y*, so that the path itself needs no graph. If the spectral radius of J is below
1, the inverse is the Neumann series

    (I - J)^-1 = I + J + J^2 + ...

Truncated after k terms, it equals the gradient of k applications of f to a y* that is treated as a constant: Phantom.
One term is Jacobian-free backpropagation (JFB, Eq. 9). Two terms are the paper's refinement-aware gradient (RAG, Eq.
11): with the second one, J df/dtheta, f also learns how its next application will transform its output. Implicit sums
all terms, and Unrolled differentiates the path itself.

f maps flat iterates (B, D) to (B, D), each row independently, and closes over the parameters and features to be
differentiated. In the detector J is the Jacobian along the content alone, because each layer detaches the position that
it receives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .records import Status
from .solve import Map, solve
from .solvers import FixedPointIteration


@dataclass(frozen=True)
class Unrolled:
    """Back-propagation through time (BPTT), through `steps` applications of f and on into the first iterate.

    If these steps reach the fixed point, its gradient is exact. Memory grows with their number.
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

    where all Jacobians are taken at y* if the iterate is y*. For lambda = 1 this is the Neumann series of Eq. 8,
    truncated after k terms: k = 1 is JFB (Eq. 9), k = 2 the refinement-aware gradient (Eq. 11).
    """

    steps: int = 2  # k
    damping: float = 1.0  # lambda

    def __post_init__(self) -> None:
        _require_positive("steps", self.steps)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")

    def __call__(self, function: Map, iterate: Tensor) -> Tensor:
        """Take k steps from an iterate (B, D) of the solving path, and return the last one (B, D)."""
        iterate = iterate.detach()
        for _ in range(self.steps):
            output = function(iterate)
            iterate = output if self.damping == 1 else torch.lerp(iterate, output, self.damping)
        return iterate


@dataclass(frozen=True)
class Implicit:
    """The gradient of the implicit function theorem (Eq. 8), exact up to rtol. It is slow and serves as a reference.

    For a loss with gradient v at y*, back-propagation needs u = (I - J)^-T v. That is the fixed point of the adjoint
    map u -> J^T u + v, which the backward pass finds by plain iteration. Therefore f must be a contraction.

    There are no second derivatives: the backward pass records no graph, even with create_graph=True.
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

        # A second graph, from a constant. Its ordinary backward pass multiplies the hook's result by df/dtheta.
        result = function(iterate.detach())
        if result.requires_grad:
            result.register_hook(solve_adjoint)
        return result


def _require_positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
