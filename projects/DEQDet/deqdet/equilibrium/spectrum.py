"""The spectral radius of a map's Jacobian, which measures how strongly the map contracts near a fixed point."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor


def spectral_radius(
    function: Callable[[Tensor], Tensor], iterate: Tensor, *, iterations: int, generator: Generator | None = None
) -> Tensor:
    """Estimate the largest absolute eigenvalue of the map's Jacobian J at an iterate, for each batch row.

    Near a fixed point it is the factor by which plain iteration shrinks the error in each step; if it is above 1, the
    fixed point is unstable. The estimate comes from a power iteration with vector-Jacobian products: J^T has the
    eigenvalues of J, and one forward pass serves all products. The first half of the iterations turns the vector
    towards the leading eigenvectors; the estimate is the geometric mean of the vector's growth in the second half.
    Unlike a Rayleigh quotient, that mean also converges if the leading eigenvalues are a complex pair, though with an
    error of order 1 / iterations.

    J does not include paths that the map detaches. The packed refinement layer detaches the position that it receives,
    so its J is the Jacobian along the content, as in the refinement-aware gradient (Eq. 11).

    Args:
        function: the map, (B, D) -> (B, D), differentiable, each row independently.
        iterate: (B, D), the point at which J is taken.
        iterations: the number of vector-Jacobian products.
        generator: draws the random start vector, on the iterate's device; None uses torch's global generator.

    Returns:
        (B,); inf where the growth overflows the dtype.

    Raises:
        ValueError: iterations is below 2.
    """
    if iterations < 2:
        raise ValueError(f"the power iteration needs at least 2 iterations, got {iterations}")
    with torch.enable_grad():
        iterate = iterate.detach().requires_grad_()
        output = function(iterate)
    vector = torch.empty_like(iterate, requires_grad=False).normal_(generator=generator)
    growths = []
    for _ in range(iterations):
        norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        unit = vector / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a vector that has become 0 stays 0
        (vector,) = torch.autograd.grad(output, iterate, unit, retain_graph=True)
        growths.append(torch.linalg.vector_norm(vector, dim=1))
    growth = torch.stack(growths)
    return torch.where(growth.isfinite().all(dim=0), growth[iterations // 2 :].log().mean(dim=0).exp(), torch.inf)
