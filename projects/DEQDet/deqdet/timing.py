"""How long a call takes on a device."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What the call returns, and its seconds, with all that it has started on the device."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
