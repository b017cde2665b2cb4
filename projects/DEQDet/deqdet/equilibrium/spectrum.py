"""The spectral radius of a map's Jacobian, which measures how strongly the map contracts near a fixed point."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor


def spectral_radius(
    function: Callable[[Tensor], Tensor], iterate: Tensor, *, iterations: int, generator: Generator | None = None
) -> Tensor:
    """Estimate the largest absolute eigenvalue of the map's Jacobian J at an iterate, for each batch row.

    Near a fixed point it is the factor by which plain iteration shrinks the error in each step; if it is above 1, the
    fixed point is unstable. The estimate comes from Arnoldi's method with vector-Jacobian products: J^T has the
    eigenvalues of J, and one forward pass serves all products. J^T is projected onto the Krylov space of a random
    vector, and the estimate is the largest absolute eigenvalue of the projection. It is exact after D products, and
    usually close after 20; for a J that is far from normal it may also be too high. Memory grows by one vector (B, D)
    with each product.

    J does not include paths that the map detaches. The packed refinement layer detaches the position that it receives,
    so its J is the Jacobian along the content, as in the refinement-aware gradient (Eq. 11).

    Args:
        function: the map, (B, D) -> (B, D), differentiable, each row independently.
        iterate: (B, D), the point at which J is taken.
        iterations: the number of vector-Jacobian products.
        generator: draws the random start vector, on the iterate's device; None uses torch's global generator.

    Returns:
        (B,); inf where the products are not finite.

    Raises:
        ValueError: iterations is below 2.
    """
    if iterations < 2:
        raise ValueError(f"the spectral radius needs at least 2 iterations, got {iterations}")
    with torch.enable_grad():
        iterate = iterate.detach().requires_grad_()
        output = function(iterate)
    rows, size = iterate.shape
    smallest, precision = torch.finfo(iterate.dtype).tiny, torch.finfo(iterate.dtype).eps
    vector = torch.empty_like(iterate, requires_grad=False).normal_(generator=generator)
    basis = vector.new_zeros(rows, iterations, size)
    projection = vector.new_zeros(rows, iterations + 1, iterations)
    for k in range(iterations):
        norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        basis[:, k] = vector / norm.clamp(min=smallest)  # a vector that has become 0 stays 0
        (vector,) = torch.autograd.grad(output, iterate, basis[:, k], retain_graph=True)
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        known = basis[:, : k + 1]
        for _ in range(2):  # the second time removes what rounding has left
            part = torch.einsum("bkd,bd->bk", known, vector)
            projection[:, : k + 1, k] += part
            vector = vector - torch.einsum("bkd,bk->bd", known, part)
        rest = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        # If the new vector lies in the span of the known ones, only a rounding error is left: the space is complete.
        vector = torch.where(rest <= 100 * precision * length, 0.0, vector)
        projection[:, k + 1, k] = torch.linalg.vector_norm(vector, dim=1)
    square = projection[:, :-1]
    finite = square.isfinite().all(dim=2).all(dim=1)
    radius = torch.linalg.eigvals(torch.where(finite[:, None, None], square, 0.0).cpu().double()).abs().amax(dim=1)
    return torch.where(finite, radius.to(square), torch.inf)
