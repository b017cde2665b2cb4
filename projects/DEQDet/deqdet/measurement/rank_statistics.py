"""Rank correlations and the area under the ROC curve of a signal, with bootstrap intervals over images."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from .json_numbers import finite_or_none

RESAMPLES = 500  # of the bootstrap
LEVEL = 0.95  # of its intervals


@dataclass(frozen=True)
class Estimate:
    """A statistic with its bootstrap interval. A field is None if undefined, as for constant columns."""

    value: float | None
    low: float | None
    high: float | None


def correlate(signal: np.ndarray, AP: np.ndarray) -> float:
    """Compute Spearman's rank correlation; NaN if a column is constant or has fewer than two values."""
    if len(AP) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(signal, AP).statistic)


def correlate_given(signal: np.ndarray, AP: np.ndarray, known: np.ndarray) -> float:
    """Compute Spearman's partial rank correlation of signal and AP, given another signal.

    This is the correlation of what remains of the ranks of both after a linear regression on the ranks of `known`:
    (r_sa - r_sk r_ak) / sqrt((1 - r_sk^2) (1 - r_ak^2)).
    """
    r_sa, r_sk, r_ak = correlate(signal, AP), correlate(signal, known), correlate(AP, known)
    left = (1 - r_sk**2) * (1 - r_ak**2)
    return (r_sa - r_sk * r_ak) / math.sqrt(left) if left > 1e-12 else math.nan


def separate(signal: np.ndarray, right: np.ndarray) -> float:
    """Compute the probability that a right detection has a higher signal than a wrong one; ties count one half.

    This is the area under the ROC curve, the Mann-Whitney statistic U / (n1 n2): 1 for a perfect signal, 0.5 for one
    without information. NaN if there are no right or no wrong detections.
    """
    if right.all() or not right.any():
        return math.nan
    higher = stats.mannwhitneyu(signal[right], signal[~right], method="asymptotic").statistic
    return float(higher / (right.sum() * (~right).sum()))


def estimate(
    statistic: Callable[[np.ndarray, np.ndarray], float], image: np.ndarray, *columns: np.ndarray
) -> Estimate:
    """Compute a statistic of the rows and its bootstrap interval over images.

    Whole images are resampled, with all their conditions and detections, because the rows of one image are correlated.

    Args:
        image: (n,) the image of each row.
        columns: each (n,).
    """
    value = statistic(*columns)
    rows = [np.flatnonzero(image == i) for i in np.unique(image)]
    if math.isnan(value) or len(rows) < 2:
        return Estimate(finite_or_none(value), None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # from an undefined resample: no interval
        interval = stats.bootstrap(
            (np.arange(len(rows)),),
            partial(_resampled, statistic, rows, columns),
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            vectorized=False,
            random_state=np.random.default_rng(0),
        ).confidence_interval
    return Estimate(value, finite_or_none(float(interval.low)), finite_or_none(float(interval.high)))


def _resampled(
    statistic: Callable, rows: Sequence[np.ndarray], columns: Sequence[np.ndarray], drawn: np.ndarray
) -> float:
    taken = np.concatenate([rows[index] for index in drawn])
    return statistic(*(column[taken] for column in columns))
