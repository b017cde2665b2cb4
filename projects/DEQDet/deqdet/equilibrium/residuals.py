"""Residuals: the distance of an iterate y to f(y), which measures how far it is from a fixed point."""

import torch
from torch import Tensor


def relative_residual(iterate: Tensor, output: Tensor) -> Tensor:
    """Compute ||f(y) - y|| / ||f(y)|| of each batch row.

    The squares inside the norms do not overflow, although the square of 1e20 is already infinite in float32.

    Args:
        iterate: (B, D) y.
        output: (B, D) f(y).

    Returns:
        (B,) float32, or float64 for a float64 state. It is 0 where y and f(y) are both 0, very large or inf where only
        f(y) is 0, and inf where y or f(y) is not finite.
    """
    change, size, _ = norms(iterate, output)
    return quotient(change, size, iterate.dtype)


def first_below(residuals: Tensor, rtol: float) -> Tensor:
    """Find the step at which solve() with this rtol would have stopped each batch row.

    Args:
        residuals: (T, B), from solve() with rtol = 0; row t - 1 belongs to step t.

    Returns:
        (B,) int64, the first step whose residual is below rtol, or T if there is none (0 if T is 0).
    """
    below = residuals < rtol  # False where NaN
    before = (~below).int().cumprod(dim=0).sum(dim=0)  # the steps before the first one below
    return (before + 1).clamp(max=len(residuals))


def norms(iterate: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ||f(y) - y||, ||f(y)||, and whether all entries of f(y) are finite, each (...) for y (..., D).

    Both norms of a vector may be scaled by a common factor: only their quotient, the relative residual, is meaningful.

    The squares of float32 numbers cannot overflow in float64. If the numbers are float64 themselves, or the device has
    no float64, both vectors are first divided by the largest entry of f(y), which does not change the quotient.
    """
    dtype = torch.promote_types(iterate.dtype, torch.float32)
    change, wide = output - iterate, torch.float64
    if dtype == torch.float64 or iterate.device.type == "mps":
        largest = torch.linalg.vector_norm(output, ord=torch.inf, dim=-1, keepdim=True, dtype=dtype)
        scale = largest.clamp(min=torch.finfo(dtype).tiny)
        change, output, wide = change / scale, output / scale, dtype
        finite = largest[..., 0] < torch.inf
        size = torch.linalg.vector_norm(output, dim=-1)
    else:
        size = torch.linalg.vector_norm(output, dim=-1, dtype=wide)
        finite = size < torch.inf  # False for NaN too
    return torch.linalg.vector_norm(change, dim=-1, dtype=wide), size, finite


def is_finite(output: Tensor) -> Tensor:
    """Whether all entries of f(y) (..., D) are finite, (...) bool."""
    return torch.linalg.vector_norm(output, ord=torch.inf, dim=-1) < torch.inf  # False for NaN too


def quotient(change: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the relative residual from the results of norms() and the dtype of the state."""
    residual = (change / size.clamp(min=torch.finfo(size.dtype).tiny)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return residual.to(torch.promote_types(dtype, torch.float32))
