"""Random numbers that depend only on where in a training they are drawn, not on what happened before.

Every seed follows from the run's seed, the rank and a position (an iteration, or an index into the stream of samples).
A resumed training therefore draws the same numbers as an uninterrupted one, although no random state is saved.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix_seed(*numbers: int) -> int:
    """Hash non-negative numbers into a 31-bit seed; other numbers, or another order, give an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) & 0x7FFFFFFF


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on the CPU and on every GPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch at the end of the block.

    Args:
        device: a GPU whose generator is restored too; with None or a CPU, only the CPU's generator is.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch's CPU in the block, and restore their states at its end."""
    with random_state_kept():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
