"""Intervals: percentile bootstrap with an explicit generator (Efron & Tibshirani 1993, ch. 13)."""

from collections.abc import Sequence

import numpy as np


def mean_interval(
    values: Sequence[float], rng: np.random.Generator, resamples: int = 2000
) -> tuple[float, float, float]:
    """(mean, low, high) of a 95 % percentile bootstrap; a single value has no interval.

    Args:
        values: one number per independent unit, for example per query.
        rng: the only source of chance.
        resamples: bootstrap samples.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("an interval needs at least one value")
    if data.size == 1:
        return float(data[0]), float("nan"), float("nan")
    means = np.empty(resamples)
    for i in range(resamples):  # one resample at a time keeps memory flat
        means[i] = data[rng.integers(0, data.size, data.size)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(data.mean()), float(low), float(high)
