"""Intervals: percentile bootstrap with an explicit generator (Efron & Tibshirani 1993, ch. 13).

And Wilson's (1927) of a proportion, which also holds near 0 and 1, where a bootstrap has no width.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

#: (value, low, high); the bounds are None where there is no interval, for example of one value.
Interval = tuple[float, float | None, float | None]


def mean_interval(
    values: Sequence[float], rng: np.random.Generator, resamples: int = 2000
) -> Interval:
    """(mean, low, high) of a 95 % percentile bootstrap; a single value has no interval.

    Args:
        values: one number per independent unit, for example per query.
        rng: the only source of chance.
        resamples: bootstrap samples.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    return statistic_interval(lambda rows: float(data[rows].mean()), data.size, rng, resamples)


def statistic_interval(
    statistic: Callable[[np.ndarray], float],
    size: int,
    rng: np.random.Generator,
    resamples: int = 2000,
) -> Interval:
    """(value, low, high) of a statistic of independent units, 95 % percentile bootstrap.

    Args:
        statistic: of the units with these indices; NaN where it is undefined, and such resamples
            do not count.
        size: number of units; a single one has no interval.
        rng: the only source of chance.
        resamples: bootstrap samples.

    Raises:
        ValueError: no units.
    """
    if size == 0:
        raise ValueError("an interval needs at least one value")
    value = statistic(np.arange(size))
    if size == 1:
        return value, None, None
    # one resample at a time keeps memory flat
    found = np.array([statistic(rng.integers(0, size, size)) for _ in range(resamples)])
    found = found[~np.isnan(found)]
    if found.size == 0:
        return value, None, None
    low, high = np.quantile(found, [0.025, 0.975])
    return value, float(low), float(high)


def proportion_interval(successes: float, size: int) -> Interval:
    """(share, low, high): Wilson's score interval at 95 %.

    Args:
        successes: how many of them, a tie counting ½.
        size: independent units.

    Raises:
        ValueError: no units.

    >>> tuple(round(x, 3) for x in proportion_interval(8, 10))
    (0.8, 0.49, 0.943)
    """
    if size == 0:
        raise ValueError("an interval needs at least one value")
    z, share = 1.959964, successes / size
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    reach = z / (1 + z * z / size) * math.sqrt(share * (1 - share) / size + (z / size / 2) ** 2)
    return share, max(centre - reach, 0.0), min(centre + reach, 1.0)


def above(interval: Interval, bound: float) -> bool:
    """Whether a figure is above the bound beyond chance; without an interval nobody knows."""
    return interval[1] is not None and interval[1] > bound
