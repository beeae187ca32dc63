"""How good a reward model is on pairs it has not seen: accuracy, calibration, length, origin.

All figures are of d, the score of the chosen response minus that of the rejected one. A
Bradley-Terry model says that the better-scored response is the right one with probability σ(|d|):
calibration asks whether it is right that often. Accuracy alone hides a model that likes length, so
it is also shown by how much longer the chosen response is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfsteer.judges.base import by_scores
from selfsteer.judges.stats import WORTH, proportion_interval

#: Bins of the stated probability, evenly from 0.5 to 1.
BINS = 10

#: Chosen tokens / rejected tokens below which a pair is in the class, the last one without bound.
LENGTHS = (
    ("rejected much longer", 2 / 3),
    ("rejected longer", 0.95),
    ("similar", 1 / 0.95),
    ("chosen longer", 1.5),
    ("chosen much longer", math.inf),
)


@dataclass(frozen=True)
class ScoredPair:
    """One held-out pair: where it is from, its two scores and lengths in tokens."""

    source: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def difference(self) -> float:
        """d, positive where the model agrees with the pair."""
        return self.chosen - self.rejected


def win(difference: float) -> float:
    """1 if the chosen response scores better, ½ for a tie, 0 else."""
    return WORTH[by_scores(difference, 0.0)]


def calibration(differences: Sequence[float], bins: int = BINS) -> dict[str, Any]:
    """Expected calibration error of σ(|d|) (Guo et al. 2017, arXiv 1706.04599, eq. 3), with its bins.

    The error is the mean over pairs of |share right − mean stated probability| of their bin. Empty
    bins have a count of 0 and no figures.

    Args:
        differences: d of N pairs.
        bins: of equal width, over [0.5, 1].

    Raises:
        ValueError: no pairs.
    """  # noqa: E501
    if not differences:
        raise ValueError("calibration needs at least one pair")
    stated = 1 / (1 + np.exp(-np.abs(differences)))
    place = np.minimum(((stated - 0.5) * 2 * bins).astype(int), bins - 1)
    right = np.array([win(x) for x in differences])
    table: list[dict[str, Any]] = []
    for b in range(bins):
        here = place == b
        row = {"from": 0.5 + b / bins / 2, "to": 0.5 + (b + 1) / bins / 2, "pairs": int(here.sum())}
        if here.any():
            row |= {"stated": float(stated[here].mean()), "right": float(right[here].mean())}
        table.append(row)
    gaps = (row["pairs"] * abs(row["right"] - row["stated"]) for row in table if row["pairs"])
    return {"ece": sum(gaps) / len(differences), "bins": table}


def length_class(chosen_tokens: int, rejected_tokens: int) -> str:
    """Which class of `LENGTHS` a pair belongs to.

    >>> length_class(100, 100), length_class(100, 40), length_class(60, 100)
    ('similar', 'chosen much longer', 'rejected much longer')
    """
    ratio = chosen_tokens / max(rejected_tokens, 1)
    return next(name for name, bound in LENGTHS if ratio < bound)


def reward_quality(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """All figures of N held-out pairs; with N = 0 only the count.

    ``longer_is_chosen`` is what preferring the longer response would score: an accuracy that does
    not beat it may be length and nothing else.
    """
    if not pairs:
        return {"pairs": 0}
    sources: dict[str, list[ScoredPair]] = {}
    lengths: dict[str, list[ScoredPair]] = {name: [] for name, _ in LENGTHS}
    for p in pairs:
        sources.setdefault(p.source, []).append(p)
        lengths[length_class(p.chosen_tokens, p.rejected_tokens)].append(p)
    longer = sum(win(p.chosen_tokens - p.rejected_tokens) for p in pairs)
    return {
        **_group(pairs),
        "ties": sum(p.difference == 0 for p in pairs),
        "mean_difference": float(np.mean([p.difference for p in pairs])),
        "longer_is_chosen": proportion_interval(longer, len(pairs)),
        "calibration": calibration([p.difference for p in pairs]),
        "by_source": {name: _group(found) for name, found in sources.items()},
        "by_length": {name: _group(found) for name, found in lengths.items() if found},
    }


def _group(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """How many, and the share that the model orders rightly, ties ½."""
    right = sum(win(p.difference) for p in pairs)
    return {"pairs": len(pairs), "accuracy": proportion_interval(right, len(pairs))}
