"""Means over pictures with bootstrap intervals, and paired differences of methods."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deedsr.dataset.keys import generator

__all__ = ["Difference", "Interval", "differences", "means"]

RESAMPLES, AT_ONCE = 10_000, 1_000
PERCENTILES = [2.5, 97.5]


class Interval(NamedTuple):
    """A mean over pictures and the ends of its 95 % interval; None where a picture has no value."""

    mean: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """`method` minus `other` over the same pictures. `wins`: share of the pictures on which `method` is better, ties
    counted half."""

    metric: str
    method: str
    other: str
    mean: float
    low: float
    high: float
    wins: float


Values = Mapping[str, Sequence[float | None]]  # by method, in the order of the pictures


def means(values: Values) -> dict[str, Interval]:
    """Mean and interval of each method: percentiles of the means of `RESAMPLES` draws of pictures with replacement."""
    known = _known(values)
    return {method: Interval(*(_interval(known[method]) if method in known else (None,) * 3)) for method in values}


def differences(metric: str, values: Values, higher_is_better: bool) -> list[Difference]:
    """Of each method from every later one, paired: both means are taken of the same draws of pictures. None of methods
    that lack a value."""
    known, found = _known(values), []
    for number, (method, ours) in enumerate(known.items()):
        for other, theirs in list(known.items())[number + 1 :]:
            change_N = ours - theirs
            better = change_N > 0 if higher_is_better else change_N < 0
            wins = float(np.mean(better + 0.5 * (change_N == 0)))
            found.append(Difference(metric, method, other, *_interval(change_N), wins))
    return found


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
