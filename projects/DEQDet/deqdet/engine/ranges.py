"""What a config value must be: a test with the words that describe it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from detectron2.utils.registry import Registry


@dataclass(frozen=True)
class Range:
    """What a value must be: a test, and the words that complete "it must be" in a message."""

    words: str | Callable[[], str]  # a function where the words depend on what plugins have registered
    holds: Callable[[object], bool]
    suggest: Callable[[object], str] = lambda value: ""  # what to write for a value outside the range, or ""

    def __str__(self) -> str:
        return self.words if isinstance(self.words, str) else self.words()


def integer(low: int, high: int | None = None) -> Range:
    """An integer in [low, high]."""
    words = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high:,}"
    return Range(words, lambda value: _is_integer(value) and low <= value and (high is None or value <= high))


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Range:
    """A finite number in [low, high]; with `above` without `low`, with `below` without `high`."""
    words = f"a finite number {'above' if above else 'of at least'} {low:,g}"
    if high < math.inf:
        words += f" and {'below' if below else 'at most'} {high:,g}"

    def holds(value: object) -> bool:
        if not is_finite(value):  # NaN is not either
            return False
        return (value > low if above else value >= low) and (value < high if below else value <= high)

    return Range(words, holds)


def one_of(*values: object) -> Range:
    """One of the values, which are all of one type."""
    known = ['""' if value == "" else str(value) for value in values]
    words = " or ".join(known) if len(known) <= 2 else f"one of {', '.join(known)}"
    return Range(words, lambda value: type(value) is type(values[0]) and value in values)


def named(registry: Registry, suggest: Callable[[object], str] = Range.suggest) -> Range:
    """A name in a registry; parts of one's own count once their module is imported by --plugin."""

    def words() -> str:
        return f"one of {', '.join(sorted(name for name, _ in registry))} (or a part of your own, given by --plugin)"

    return Range(words, lambda value: isinstance(value, str) and value in registry, suggest)


def several(item: Range, low: int, high: int | None = None, *, distinct: bool = False) -> Range:
    """A list of `low` to `high` values, each in the range `item`."""
    if high is None:
        count = f" of at least {low} value{'s' * (low > 1)}" if low else ""
    else:
        count = f" of {low} values" if low == high else f" of {low} to {high} values"
    words = f"a list{count}, each {item}{', none of them twice' if distinct else ''}"

    def holds(values: object) -> bool:
        if not isinstance(values, list | tuple) or not low <= len(values) <= (math.inf if high is None else high):
            return False
        return all(map(item.holds, values)) and not (distinct and len(set(values)) < len(values))

    return Range(words, holds)


def either(first: Range, second: Range) -> Range:
    """A value in one of two ranges."""
    return Range(f"{first}, or {second}", lambda value: first.holds(value) or second.holds(value))


def refused(value: object, reason: str) -> Range:
    """The one value that is allowed, because of what any other would do."""
    return Range(f"{value}: {reason}", lambda found: type(found) is type(value) and found == value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a number other than an infinite one and NaN."""
    # Comparisons, unlike math.isfinite, take integers of any size.
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_device(value: object) -> bool:
    """Whether a text names a device that this machine has, or a GPU where there is no CUDA: the CPU takes its place."""
    if not isinstance(value, str) or not re.fullmatch(r"cpu|mps|cuda(:\d+)?", value):
        return False
    if value == "mps":
        return torch.backends.mps.is_available()
    count = torch.cuda.device_count() if torch.cuda.is_available() else math.inf
    return not value.startswith("cuda:") or int(value.removeprefix("cuda:")) < count
