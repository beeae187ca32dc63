"""Figures made of verdicts and values, one definition each, for everything that reports them.

Intervals are percentile bootstraps with an explicit generator (Efron & Tibshirani 1993, ch. 13),
and Wilson's (1927) for a proportion, which also holds near 0 and 1, where a bootstrap has no width.
Nothing is excluded silently: unparseable is a class of its own in every table.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from selfsteer.data.records import Verdict
from selfsteer.judges.base import Judge, Judgement, Pair

CLASSES = tuple(v.value for v in Verdict)

#: What a verdict is worth to the first response; `unparseable` has no worth.
WORTH = {Verdict.FIRST: 1.0, Verdict.SECOND: 0.0, Verdict.TIE: 0.5, Verdict.INCONSISTENT: 0.5}

#: A group with fewer units, for example a feature, says nothing.
FEW = 8

#: (value, low, high); the bounds are None where there is no interval, for example of one value.
Interval = tuple[float, float | None, float | None]


# -- verdicts --------------------------------------------------------------------------------------


def worth(verdict: Verdict) -> float | None:
    """What a verdict is worth to the first response: 1, ½ or 0; None if it is unparseable."""
    return WORTH.get(verdict)


def worths(judge: Judge, pairs: Sequence[Pair]) -> list[float | None]:
    """`worth` of the judge's verdict on each pair."""
    return [worth(j.verdict) for j in judge.compare_all(pairs)]


def accuracy(verdicts: Iterable[Verdict]) -> float | None:
    """(wins + ½·(ties + inconsistent)) / judged, where FIRST is a win.

    ``unparseable`` verdicts are not in the denominator. None if nothing was judged.
    """
    judged = [w for v in verdicts if (w := worth(v)) is not None]
    return math.fsum(judged) / len(judged) if judged else None


def game(judgement: Judgement) -> tuple[float, float]:
    """(won by the first response, at stake) over both showings, each weighted by its margin.

    The stake is 0 if the verdict is unparseable: half a pair would carry the judge's position bias.
    """
    whole = worth(judgement.verdict)
    if whole is None:
        return 0.0, 0.0
    if judgement.shown is None:
        return 2 * whole, 2.0
    there, back = (WORTH[v] for v in judgement.shown)
    one, two = judgement.weights
    return one * there + two * (1 - back), one + two


def verdict_counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each verdict was given, all classes named."""
    count = Counter(verdicts)
    return {v.value: count[v] for v in Verdict}


# -- intervals -------------------------------------------------------------------------------------


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


def known_interval(
    values: Iterable[float | None], rng: np.random.Generator, resamples: int = 2000
) -> Interval | None:
    """`mean_interval` of the values that are neither None nor NaN; None if there are none."""
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    return mean_interval(known, rng, resamples) if known else None


def by_group(
    values: Sequence[float | None] | np.ndarray,
    groups: Sequence[Collection[str]],
    rng: np.random.Generator,
    resamples: int = 2000,
) -> dict[str, tuple[int, Interval | None]]:
    """Units of each group and their `known_interval`, None if they are fewer than `FEW`.

    Args:
        values: one number per unit, None or NaN where there is none.
        groups: of each unit; it counts in every group that it names.
        rng: the only source of chance.
        resamples: bootstrap samples.
    """
    found = {}
    for name in sorted({name for named in groups for name in named}):
        own = [v for v, named in zip(values, groups, strict=True) if name in named]
        enough = len(own) >= FEW
        found[name] = (len(own), known_interval(own, rng, resamples) if enough else None)
    return found


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
    draws = resampled(statistic, size, rng, resamples) if size > 1 else np.full(1, np.nan)
    draws = draws[~np.isnan(draws)]
    if draws.size == 0:
        return value, None, None
    low, high = np.quantile(draws, [0.025, 0.975])
    return value, float(low), float(high)


def resampled(
    statistic: Callable[[np.ndarray], Any], size: int, rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """(resamples, …) the statistic of units drawn with replacement, one resample at a time."""
    return np.stack([statistic(rng.integers(0, size, size)) for _ in range(resamples)])


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
    """Whether a figure exceeds the bound beyond chance; False without an interval."""
    return interval[1] is not None and interval[1] > bound


# -- one judge, and two ----------------------------------------------------------------------------


def judge_report(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """One judge's figures over N pairs; the first response of a pair is the chosen one."""
    verdicts = [j.verdict for j in judgements]
    reasons = Counter(j.reason for j in judgements if j.verdict is Verdict.UNPARSEABLE)
    return {
        "pairs": len(judgements),
        "verdicts": verdict_counts(verdicts),
        "accuracy": accuracy(verdicts),
        "unparseable_because": dict(sorted(reasons.items())),
        "position": position_bias(judgements),
        "cost": {
            "prompt_tokens": sum(j.prompt_tokens for j in judgements),
            "completion_tokens": sum(j.completion_tokens for j in judgements),
            "seconds": round(sum(j.seconds for j in judgements), 3),
        },
    }


def position_bias(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """How often the response shown first wins, of the showings with a winner; ½ is no bias.

    None for judges that see no positions; ``shown_first_wins`` is None where no showing has a
    winner. Pairs that are unparseable in one of the orders do not count: in both orders the
    responses' own quality cancels out (MT-Bench, arXiv 2306.05685, §3.3), in one it would pass for
    bias.
    """
    pairs = [j.shown for j in judgements if j.shown is not None]
    if not pairs:
        return None
    shown = [v for both in pairs if Verdict.UNPARSEABLE not in both for v in both]
    decided = [v for v in shown if v in (Verdict.FIRST, Verdict.SECOND)]
    return {
        "showings": len(shown),
        "decided": len(decided),
        "shown_first_wins": accuracy(decided),
    }


def agreement_table(cells: np.ndarray) -> np.ndarray:
    """(5, 5) counts of (2, N) places in `CLASSES`; rows are the first judge's classes."""
    table = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    np.add.at(table, (cells[0], cells[1]), 1)
    return table


def cohen_kappa(table: np.ndarray) -> float:
    """Cohen's κ of a square table of counts (Cohen 1960): (p_o − p_e) / (1 − p_e).

    NaN where it is undefined: no pairs, or both judges always give the same single class.
    """
    total = table.sum()
    if total == 0:
        return float("nan")
    observed = np.trace(table) / total
    expected = float(table.sum(axis=1) @ table.sum(axis=0)) / float(total) ** 2
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def agreement(
    first: Sequence[Judgement],
    second: Sequence[Judgement],
    rng: np.random.Generator,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Two judges over the same N pairs, in the same order.

    κ is over all five classes, and beside it over the pairs that neither left unparseable, so
    that failing together does not pass for agreeing. Intervals resample pairs; a figure that is
    undefined is None.
    """
    cells = np.array([[CLASSES.index(j.verdict) for j in js] for js in (first, second)], dtype=int)
    parsed = cells[:, (cells != CLASSES.index(Verdict.UNPARSEABLE)).all(axis=0)]
    return {
        "classes": list(CLASSES),
        "table": agreement_table(cells).tolist(),
        "same": float((cells[0] == cells[1]).mean()) if cells.size else None,
        "kappa": _kappa(cells, rng, resamples),
        "parsed": {"pairs": parsed.shape[1], "kappa": _kappa(parsed, rng, resamples)},
    }


def _kappa(cells: np.ndarray, rng: np.random.Generator, resamples: int) -> Interval | None:
    """(κ, low, high); None where κ is undefined, None bounds where an interval is."""
    if math.isnan(cohen_kappa(agreement_table(cells))):
        return None
    return statistic_interval(
        lambda rows: cohen_kappa(agreement_table(cells[:, rows])), cells.shape[1], rng, resamples
    )
