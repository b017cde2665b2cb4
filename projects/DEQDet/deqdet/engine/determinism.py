"""The key DETERMINISTIC: the same seed gives the same numbers, bit for bit, also on a GPU. On a CPU, it always does."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import UserError

_UNKNOWN = re.compile(r"(\S+) does not have a deterministic implementation|Deterministic behavior was enabled")
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_determinism(mode: str) -> None:
    """Make torch, cuDNN and cuBLAS use deterministic algorithms. Call it before the first operation on a GPU.

    Args:
        mode: the value of DETERMINISTIC. "" changes nothing. With "strict", an operation without a deterministic
            implementation is an error; with "warn", torch warns of it and runs it anyway.
    """
    if not mode:
        return
    # Workspaces of a fixed size: otherwise cuBLAS may split a matrix product differently each time.
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # the fastest algorithm may differ from run to run


def is_indeterminate(error: BaseException) -> bool:
    """Return whether torch refused an operation because it has no deterministic implementation."""
    return isinstance(error, RuntimeError) and _UNKNOWN.search(str(error)) is not None


@contextmanager
def explained_determinism() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic implementation into a UserError.

    Raises:
        UserError: names the operation and says what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_indeterminate(error):
            raise
        name = _UNKNOWN.search(str(error))[1]
        if name is None:
            given = os.environ.get(_WORKSPACE)
            raise UserError(
                f"DETERMINISTIC is strict, but {_WORKSPACE} is {given!r} in the environment: unset it, or set it to "
                ":4096:8 or :16:8"
            ) from error
        raise UserError(
            f"DETERMINISTIC is strict, but {name} has no deterministic implementation on this device: set "
            "DETERMINISTIC warn to run it anyway, or train on a CPU"
        ) from error
