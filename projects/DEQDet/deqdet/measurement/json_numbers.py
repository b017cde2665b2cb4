"""Conversions for JSON, which has no NaN and no infinity: missing numbers are None there."""

import math


def finite_or_none(value: float) -> float | None:
    """Replace NaN and infinity by None."""
    return value if math.isfinite(value) else None


def number_or_nan(value: float | None) -> float:
    """Replace None by NaN, which matplotlib leaves out of a curve."""
    return math.nan if value is None else value
