"""Conditions on config values: each a predicate with a description."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from detectron2.utils.registry import Registry


@dataclass(frozen=True)
class Range:
    """A condition on a value: a predicate, and the words that complete "it must be" in a message."""

    words: str | Callable[[], str]  # a function if the words depend on what plugins have registered
    holds: Callable[[object], bool]
    suggest: Callable[[object], str] = lambda value: ""  # a hint for a value outside the range, or ""

    def __str__(self) -> str:
        return self.words if isinstance(self.words, str) else self.words()


def integer(low: int, high: int | None = None) -> Range:
    """Allow an integer in [low, high]."""
    words = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high:,}"
    return Range(words, lambda value: _is_integer(value) and low <= value and (high is None or value <= high))


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Range:
    """Allow a finite number in [low, high]; `above` excludes `low`, and `below` excludes `high`."""
    words = f"a finite number {'above' if above else 'of at least'} {low:,g}"
    if high < math.inf:
        words += f" and {'below' if below else 'at most'} {high:,g}"

    def holds(value: object) -> bool:
        if not is_finite(value):  # also excludes NaN
            return False
        return (value > low if above else value >= low) and (value < high if below else value <= high)

    return Range(words, holds)


def one_of(*values: object) -> Range:
    """Allow one of the values, which all have the same type."""
    known = ['""' if value == "" else str(value) for value in values]
    words = " or ".join(known) if len(known) <= 2 else f"one of {', '.join(known)}"
    return Range(words, lambda value: type(value) is type(values[0]) and value in values)


def named(registry: Registry, suggest: Callable[[object], str] = Range.suggest) -> Range:
    """Allow a name in a registry, which includes the user's own parts once --plugin has imported their module."""

    def words() -> str:
        return f"one of {', '.join(sorted(name for name, _ in registry))} (or a part of your own, given by --plugin)"

    return Range(words, lambda value: isinstance(value, str) and value in registry, suggest)


def several(item: Range, low: int, high: int | None = None, *, distinct: bool = False) -> Range:
    """Allow a list of `low` to `high` values, each in the range `item`."""
    if high is None:
        count = f" of at least {low} value{'s' * (low > 1)}" if low else ""
    else:
        count = f" of {low} values" if low == high else f" of {low} to {high} values"
    words = f"a list{count}, each {item}{', without duplicates' if distinct else ''}"

    def holds(values: object) -> bool:
        if not isinstance(values, list | tuple) or not low <= len(values) <= (math.inf if high is None else high):
            return False
        return all(map(item.holds, values)) and not (distinct and len(set(values)) < len(values))

    return Range(words, holds)


def either(first: Range, second: Range) -> Range:
    """Allow a value in one of two ranges."""
    return Range(f"{first}, or {second}", lambda value: first.holds(value) or second.holds(value))


def refused(value: object, reason: str) -> Range:
    """Allow only `value`; `reason` says why any other is refused."""
    return Range(f"{value}: {reason}", lambda found: type(found) is type(value) and found == value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Return whether a value is a number, and neither infinite nor NaN."""
    # Unlike math.isfinite, comparisons accept integers of any size.
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_device(value: object) -> bool:
    """Return whether a string names a device of this machine. Without CUDA, any GPU passes: the CPU replaces it."""
    if not isinstance(value, str) or not re.fullmatch(r"cpu|mps|cuda(:\d+)?", value):
        return False
    if value == "mps":
        return torch.backends.mps.is_available()
    count = torch.cuda.device_count() if torch.cuda.is_available() else math.inf
    return not value.startswith("cuda:") or int(value.removeprefix("cuda:")) < count
