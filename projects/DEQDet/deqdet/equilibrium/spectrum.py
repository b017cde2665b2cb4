"""How strongly a map contracts: the spectral radius of its Jacobian."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor


def spectral_radius(
    function: Callable[[Tensor], Tensor], value: Tensor, *, iterations: int, generator: Generator | None = None
) -> Tensor:
    """The largest absolute eigenvalue of the map's Jacobian J at `value`, estimated by power iteration, row by row.

    Vector-Jacobian products are iterated: J^T has J's eigenvalues, and one forward pass serves them all. Half of the
    iterations turn the vector towards the leading eigenvectors; the estimate is the geometric mean of its growth in
    the others. Unlike a Rayleigh quotient, that also converges where the leading eigenvalues are a complex pair,
    though only as 1 / iterations.

    What the map detaches is constant to it: for the packed refinement layer, which detaches the position that it
    receives, J is that of the content's path, the one that the refinement-aware gradient (Eq. 11) expands.

    Args:
        function: (B, D) -> (B, D), differentiable, each row for itself.
        value: (B, D).
        iterations: of the power iteration.
        generator: of the first, random vector; of the value's device, None is torch's own.

    Returns:
        (B,); inf where the growth is beyond the dtype.

    Raises:
        ValueError: iterations is below 2.
    """
    if iterations < 2:
        raise ValueError(f"the power iteration needs at least 2 iterations, got {iterations}")
    with torch.enable_grad():
        value = value.detach().requires_grad_()
        image = function(value)
    vector = torch.empty_like(value, requires_grad=False).normal_(generator=generator)
    growths = []
    for _ in range(iterations):
        norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        unit = vector / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # 0 stays 0
        (vector,) = torch.autograd.grad(image, value, unit, retain_graph=True)
        growths.append(torch.linalg.vector_norm(vector, dim=1))
    growth = torch.stack(growths)
    return torch.where(growth.isfinite().all(dim=0), growth[iterations // 2 :].log().mean(dim=0).exp(), torch.inf)
