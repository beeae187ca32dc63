"""Which step of a training is kept: the rule, as pure functions over figures.

A preference loss keeps falling, and reward accuracies rising, while a policy forgets how to
speak (Rafailov et al. 2024, arXiv 2406.02900). So the model answers queries that it is not trained
on, before the first step and at a few steps evenly spread over the training. Two kinds of figures
decide: drift, which has bounds, and what the model is for (a generator's data, a policy's win
rate). docs/selection.md states the rule and what it costs; `training.selector` measures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.recipe.sections import Selection

#: Fewer held-out queries than this decide nothing: one answer would be worth six percent.
FEWEST = 16


@dataclass(frozen=True)
class Drift:
    """How a model answers in one context, beside what it says.

    ``kl`` is the mean of log π − log π_start per token of its own answers, in nats: KL(π ‖ π_start)
    but for temperature and top-p, which prefer likely tokens. ``entropy`` is −mean log π of the
    same tokens, too low for the same reason. ``repeated`` is the share of 4-grams that the same
    answer had before, ``unfinished`` that of answers cut off by the budget, ``tokens`` the mean
    length.
    """

    tokens: float
    repeated: float
    unfinished: float
    kl: float
    entropy: float


@dataclass(frozen=True)
class Candidate:
    """The model after a step; step 0 is the start.

    ``drift`` is by context. ``wins`` is by query id, 0 to 1: for a generator whether its pair is
    right, for a policy whether its answer beats the start's; empty without a judge.
    ``on_policyness`` is that of the generator's responses under the start, None for a policy.
    """

    step: int
    drift: Mapping[str, Drift]
    wins: Mapping[str, float] = field(default_factory=dict)
    on_policyness: float | None = None


def excess(candidate: Candidate, start: Candidate, bounds: Selection) -> dict[str, float]:
    """Each drift as a multiple of what the bounds allow, the worst context counting; 1 is the edge.

    Length is on a log scale: half is as far as double.
    """
    out = dict.fromkeys(("KL", "length", "repeated 4-grams", "unfinished"), 0.0)
    for context, now in candidate.drift.items():
        before = start.drift[context]
        length = abs(math.log(max(now.tokens, 1.0) / max(before.tokens, 1.0)))
        found = {
            "KL": now.kl / bounds.max_kl,
            "length": length / math.log(bounds.max_length_ratio),
            "repeated 4-grams": (now.repeated - before.repeated) / bounds.max_repeated,
            "unfinished": (now.unfinished - before.unfinished) / bounds.max_unfinished,
        }
        out = {name: max(value, found[name]) for name, value in out.items()}
    return out


def within(candidate: Candidate, start: Candidate, bounds: Selection) -> bool:
    """Whether no drift is over its bound."""
    return max(excess(candidate, start, bounds).values()) <= 1


def gain(mine: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[float, float]:
    """Mean difference of wins over the queries that both have, and its standard error."""
    gaps = np.array([mine[i] - theirs[i] for i in sorted(mine.keys() & theirs.keys())])
    if gaps.size < 2:
        return 0.0, 0.0
    return float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(gaps.size))


def beats(mine: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Whether the wins are more by over one standard error of the difference paired by query.

    The rule of Breiman et al. 1984, §3.4.3. One win more, whatever of, is exactly one error, hence
    the room for rounding.
    """
    difference, error = gain(mine, theirs)
    return difference > error + 1e-9


def mean_wins(candidate: Candidate) -> float:
    """Accuracy or win rate."""
    return sum(candidate.wins.values()) / len(candidate.wins) if candidate.wins else 0.0


def choose(start: Candidate, candidates: Sequence[Candidate], bounds: Selection) -> Candidate:
    """The candidate whose weights are kept.

    One pass in the order of the steps: each candidate either replaces the kept one or is forgotten,
    so that one set of weights on disk is enough. Beyond a bound a candidate replaces nothing, and
    is replaced by the first one within. Among those within:

    - generators: those count that the best so far, the start included, does not beat; of these
      the most on-policy one. Where none counts, the one with most wins.
    - policies: a later one replaces the kept one if it wins more often, however little: of steps
      that cannot be told apart the one with most wins is still the best guess.
    - policies without a judge: the last.

    Args:
        start: the model before the first step; it is not itself a candidate.
        candidates: in the order of their steps, at least one.
        bounds: what counts as drift.
    """
    kept, best = candidates[0], start
    for new in candidates:
        if not within(new, start, bounds):
            continue
        if mean_wins(new) > mean_wins(best):
            best = new
        if new is kept:
            continue
        if not within(kept, start, bounds) or _replaces(new, kept, best):
            kept = new
    return kept


def _replaces(new: Candidate, kept: Candidate, best: Candidate) -> bool:
    if new.on_policyness is None or kept.on_policyness is None:
        return gain(new.wins, kept.wins)[0] > 1e-9 if new.wins else True
    counts, kept_counts = (not beats(best.wins, c.wins) for c in (new, kept))
    if counts != kept_counts:
        return counts
    if counts:
        return new.on_policyness > kept.on_policyness
    return mean_wins(new) > mean_wins(kept)


def candidate_steps(total: int, points: int) -> list[int]:
    """Steps evenly over the training, the last one always among them.

    >>> candidate_steps(14, 4), candidate_steps(2, 4)
    ([4, 7, 11, 14], [1, 2])
    """
    return sorted({math.ceil(total * k / points) for k in range(1, points + 1)})


def hold_out(ids: Sequence[str], settings: Selection, seed: int) -> set[str]:
    """Which queries are not trained on; by id, so that every stage of a run leaves out the same.

    Args:
        ids: of the training data.
        settings: says how many; never more than a tenth.
        seed: the run's.

    Returns:
        Their ids; none where they would be fewer than FEWEST.
    """
    size = min(settings.queries, len(ids) // 10)
    if not settings.points or size < FEWEST:
        return set()
    return set(sorted(ids, key=lambda i: derive_seed(seed, "held out", i))[:size])
