"""Random numbers that depend on where in a training they are drawn, and on nothing that happened before.

A training that is interrupted and resumed draws what the uninterrupted one draws, because every seed follows from the
run's seed, the rank and a position (an iteration, or a place in the stream of samples). No random state is saved.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix_seed(*numbers: int) -> int:
    """One seed of 31 bits from several non-negative numbers; other numbers, or another order, give an unrelated one."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) & 0x7FFFFFFF


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on the CPU and on every GPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back afterwards.

    Args:
        device: whose generator is kept beside the CPU's; a CPU or None keeps that alone.
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
    """Draw from generators that start at `seed` within it; afterwards the random states are what they were."""
    with random_state_kept():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
