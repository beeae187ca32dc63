"""How judges judge: verdict classes, accuracy, position bias, cost, and agreement of two judges.

Nothing is excluded in silence: unparseable is a class of its own in every table.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfsteer.data.records import Verdict
from selfsteer.judges.base import Judgement, accuracy, verdict_counts
from selfsteer.judges.stats import Interval, statistic_interval

CLASSES = tuple(v.value for v in Verdict)


def judge_report(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """One judge's figures over N pairs; the first response of a pair is the chosen one."""
    verdicts = [j.verdict for j in judgements]
    return {
        "pairs": len(judgements),
        "verdicts": verdict_counts(verdicts),
        "accuracy": accuracy(verdicts),
        "unparseable_because": dict(
            sorted(
                Counter(j.reason for j in judgements if j.verdict is Verdict.UNPARSEABLE).items()
            )
        ),
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
    wins = sum(v is Verdict.FIRST for v in decided)
    return {
        "showings": len(shown),
        "decided": len(decided),
        "shown_first_wins": wins / len(decided) if decided else None,
    }


def agreement_table(first: Sequence[Verdict], second: Sequence[Verdict]) -> np.ndarray:
    """(5, 5) counts: rows are the first judge's classes, columns the second's, as `CLASSES`."""
    place = {v: i for i, v in enumerate(Verdict)}
    table = np.zeros((len(place), len(place)), dtype=np.int64)
    np.add.at(table, ([place[v] for v in first], [place[v] for v in second]), 1)
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
    a, b = ([j.verdict for j in judgements] for judgements in (first, second))
    parsed = [i for i in range(len(a)) if Verdict.UNPARSEABLE not in (a[i], b[i])]
    return {
        "classes": list(CLASSES),
        "table": agreement_table(a, b).tolist(),
        "same": float(np.mean([x is y for x, y in zip(a, b, strict=True)])) if a else None,
        "kappa": _kappa(a, b, rng, resamples),
        "parsed": {
            "pairs": len(parsed),
            "kappa": _kappa([a[i] for i in parsed], [b[i] for i in parsed], rng, resamples),
        },
    }


def _kappa(
    a: Sequence[Verdict], b: Sequence[Verdict], rng: np.random.Generator, resamples: int
) -> Interval | None:
    """(κ, low, high); None where κ is undefined, None bounds where an interval is."""
    place = {v: i for i, v in enumerate(Verdict)}
    size = len(place)
    cells = np.array([place[x] * size + place[y] for x, y in zip(a, b, strict=True)], dtype=int)

    def kappa(rows: np.ndarray) -> float:
        counts = np.bincount(cells[rows], minlength=size * size)
        return cohen_kappa(counts.reshape(size, size))

    if not a or np.isnan(kappa(np.arange(len(a)))):
        return None
    return statistic_interval(kappa, len(a), rng, resamples)
