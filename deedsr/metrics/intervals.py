"""Means over pictures and figures of sets with their 95 % intervals, and paired differences of methods.

Intervals of means are bootstraps over pictures. Those of a set's figure (FID) are jackknifes: a draw that repeats
pictures has a smaller rank of covariance and so a larger FID, up to outside of what it is to be the interval of.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from deedsr.dataset.keys import generator

__all__ = ["Difference", "Interval", "differences", "means", "of_sets"]

RESAMPLES, AT_ONCE = 10_000, 1_000
PERCENTILES = [2.5, 97.5]
GROUPS = 20  # of pictures that the jackknife leaves out in turn


class Interval(NamedTuple):
    """A figure and the ends of its 95 % interval; None where a picture, or a set without a group, has no value."""

    mean: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """`method` minus `other` over the same pictures. `wins`: share of the pictures on which `method` is better, ties
    counted half; None for a metric of sets."""

    metric: str
    method: str
    other: str
    mean: float
    low: float
    high: float
    wins: float | None


Values = Mapping[str, Sequence[float | None]]  # by method, in the order of the pictures


def means(values: Values) -> dict[str, Interval]:
    """Mean and interval of each method: percentiles of the means of `RESAMPLES` draws of pictures with replacement."""
    known = _known(values)
    return {method: Interval(*(_interval(known[method]) if method in known else (None,) * 3)) for method in values}


def differences(metric: str, values: Values, higher_is_better: bool) -> list[Difference]:
    """Of each method from every later one, paired: both means are taken of the same draws of pictures. None of methods
    that lack a value."""
    found = []
    for (method, ours_N), (other, theirs_N) in combinations(_known(values).items(), 2):
        change_N = ours_N - theirs_N
        better = change_N > 0 if higher_is_better else change_N < 0
        wins = float(np.mean(better + 0.5 * (change_N == 0)))
        found.append(Difference(metric, method, other, *_interval(change_N), wins))
    return found


def of_sets(
    metric: str, values: Mapping[str, Sequence[Any]], summary: Callable[[Sequence[Any]], float | None]
) -> tuple[dict[str, Interval], list[Difference]]:
    """Figure of each method's set with its interval, and differences, for which the same pictures are left out of both.

    `summary` of what a metric of sets took of each picture. The interval is the figure and t quantiles of the standard
    error of a jackknife that leaves out one of `GROUPS` groups of pictures at a time, every GROUPS-th picture; of fewer
    pictures, one picture.
    """
    figures = {method: _with_replicates(found, summary) for method, found in values.items()}
    intervals = {method: _jackknifed(figure) for method, figure in figures.items()}
    changes = []
    for method, other in combinations(figures, 2):
        mean, low, high = _jackknifed(figures[method] - figures[other])
        if mean is not None and low is not None and high is not None:
            changes.append(Difference(metric, method, other, mean, low, high, None))
    return intervals, changes


def _with_replicates(found: Sequence[Any], summary: Callable[[Sequence[Any]], float | None]) -> np.ndarray:
    """Figure of the set, then those without each group; NaN where there is none. (1 + groups,)"""
    groups = min(GROUPS, len(found))
    rests = [[value for number, value in enumerate(found) if number % groups != left] for left in range(groups)]
    return np.array([summary(found), *(summary(rest) if rest else None for rest in rests)], float)


def _jackknifed(figures: np.ndarray) -> Interval:
    figure, replicates_G = float(figures[0]), figures[1:]
    if not np.isfinite(figure):
        return Interval(None, None, None)
    if not np.isfinite(replicates_G).all():
        return Interval(figure, None, None)
    freedom = len(replicates_G) - 1
    error = np.sqrt(freedom / len(replicates_G) * np.sum((replicates_G - replicates_G.mean()) ** 2))
    reach = float(stdtrit(freedom, PERCENTILES[1] / 100) * error)
    return Interval(figure, figure - reach, figure + reach)


def _known(values: Values) -> dict[str, np.ndarray]:
    """Values (N,) of the methods that have one for each picture."""
    return {method: np.array(found, float) for method, found in values.items() if found and None not in found}


def _interval(values_N: np.ndarray) -> tuple[float, float, float]:
    """Mean, low, high. The draws depend on the number of pictures alone."""
    rng, count = generator("bootstrap over pictures"), len(values_N)
    means_R = np.concatenate(
        [values_N[rng.integers(count, size=(AT_ONCE, count))].mean(1) for _ in range(RESAMPLES // AT_ONCE)]
    )
    low, high = np.percentile(means_R, PERCENTILES)
    return float(values_N.mean()), float(low), float(high)
