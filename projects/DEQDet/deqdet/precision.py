"""Autocast for the forward pass, with a warning where it makes a CPU slower."""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger(__name__)

# Instruction sets of x86 processors, as PyTorch names them, for which it has no fast convolutions in 16 bits.
_SLOW = ("NO AVX", "AVX2")


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return a context in which convolutions and matrix products are computed in another precision.

    Args:
        device_type: the model's device type, such as "cuda" or "cpu".
        dtype: bfloat16 or float16; with float32 or None the context changes nothing, not even the caller's autocast.
    """
    if dtype in (None, torch.float32):
        return nullcontext()
    if device_type == "cpu" and not torch.compiler.is_compiling():
        _warn_if_slow()
    return torch.autocast(device_type, dtype=dtype)


@functools.cache
def _warn_if_slow() -> None:
    """Log once that this processor is slower with 16 bits than with 32, if it is one."""
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions in _SLOW:
        logger.warning(
            "PyTorch has no fast convolutions in bfloat16 and float16 for this processor (%s), so that float32 is "
            "faster: set TEST.PRECISION float32 and SOLVER.AMP.ENABLED False.", instructions
        )  # fmt: skip
