"""The win rate that a judge would give if both answers were equally long (arXiv 2404.04475).

Of one model m against a baseline b, with the instruction x, the published model is::

    P(m beats b on x) = σ(θ + φ·tanh((len(m) - len(b)) / s) + ψ·γ_x)

θ is the model, φ what the judge gives for length, s the standard deviation of the differences, γ_x
how hard the instruction is. The length-controlled win rate is the mean over x of σ(θ + ψ·γ_x): the
length term set to zero.

The published γ_x were fitted once, on the public leaderboard's 805 instructions. Here a question
may bring its own (``difficulty``); otherwise γ_x is how the *other* models of the same judging
fared on x, as smoothed log-odds, so that no verdict explains itself. With a single model there is
one verdict per instruction, which cannot tell the instruction from chance: the term is left out.

The published fit is regularised; here φ and ψ have a wide normal prior, so that verdicts which
follow length entirely still have a figure, and θ has none, so that equal lengths give back the raw
win rate exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selfsteer.judges.stats import Interval, mean_interval

#: Of φ and ψ, in logits. On the public leaderboard |φ| is 0.2 to 3.0 and ψ below 1.3; with 800
#: questions the prior changes a win rate by less than 0.001.
PRIOR_SD = 3.0

#: Wins, and losses, needed for each of φ and ψ: with fewer a logistic regression fits chance
#: (Peduzzi et al. 1996, J. Clin. Epidemiol. 49).
EVENTS = 10


@dataclass(frozen=True)
class Compared:
    """One judged question: ``win`` in [0, 1], lengths in characters, how hard it is."""

    id: str
    win: float
    length: int
    baseline_length: int
    difficulty: float | None = None


@dataclass(frozen=True)
class LengthControlled:
    """The fit of one model.

    ``values`` are the pseudo-values of the questions, in their order: their mean is the win rate
    and their spread its uncertainty (each is the win rate plus the question's influence on it), so
    that two models are compared question by question as with plain means. Effects are None where
    the term is not in the model; where ``reason`` says why there are too few verdicts, all is.
    """

    win_rate: Interval | None = None
    length_effect: Interval | None = None
    difficulty_effect: float | None = None
    values: Sequence[float] | None = None
    reason: str = ""


def difficulties(wins: Mapping[str, Mapping[str, float]], model: str) -> dict[str, float]:
    """γ_x of each question of a model, from the other models' wins on it; empty without others.

    Log-odds of their wins with half a win and half a loss added, centred; a question that no other
    model was judged on is average, 0.
    """
    odds: dict[str, float] = {}
    for question in wins[model]:
        seen = [w[question] for name, w in wins.items() if name != model and question in w]
        if seen:
            odds[question] = math.log((sum(seen) + 0.5) / (len(seen) - sum(seen) + 0.5))
    if not odds:
        return {}
    mean = math.fsum(odds.values()) / len(odds)
    return {question: odds.get(question, mean) - mean for question in wins[model]}


def length_controlled(
    compared: Sequence[Compared], rng: np.random.Generator, resamples: int = 2000
) -> LengthControlled:
    """Fits one model's verdicts of one judging.

    Args:
        compared: one entry per question; ``difficulty`` of all of them or of none is used.
        rng: of the intervals.
        resamples: of the bootstrap over pseudo-values.

    Raises:
        ValueError: no questions.
    """
    wins = np.array([c.win for c in compared])
    difference = np.array([c.length - c.baseline_length for c in compared], dtype=np.float64)
    if len(wins) < 2 or np.ptp(difference) == 0:
        # nothing to control for, or nothing that could be told from the model
        return LengthControlled(mean_interval(wins.tolist(), rng, resamples), values=wins.tolist())
    events = min(wins.sum(), (1 - wins).sum())
    if events < EVENTS:
        return LengthControlled(
            reason=f"{EVENTS} wins and {EVENTS} losses are needed to tell length from chance, "
            f"found {wins.sum():g} and {(1 - wins).sum():g}"
        )
    columns = {"model": np.ones(len(wins)), "length": np.tanh(difference / difference.std(ddof=1))}
    known = [c.difficulty for c in compared if c.difficulty is not None]
    spread = float(np.std(known)) if len(known) == len(wins) else 0.0
    if spread > 0 and events >= 2 * EVENTS:
        # in units of its spread, so that the prior means the same for any scale
        columns["difficulty"] = (np.array(known) - np.mean(known)) / spread
    names, design = list(columns), np.column_stack(list(columns.values()))
    precision = np.array([0.0 if name == "model" else PRIOR_SD**-2 for name in names]) / len(wins)
    fitted = _fit(wins, design, precision)
    chance = _sigmoid(design @ fitted)
    equal = design * [name != "length" for name in names]
    predicted = _sigmoid(equal @ fitted)
    # each question's influence on the coefficients, then on the mean of the predictions
    curvature = (design * (chance * (1 - chance))[:, None]).T @ design / len(wins)
    score = design * (wins - chance)[:, None] - precision * fitted
    influence = score @ np.linalg.inv(curvature + np.diag(precision))
    slope = ((predicted * (1 - predicted))[:, None] * equal).mean(axis=0)
    values = predicted + influence @ slope
    effects = dict(zip(names, (fitted + influence).T, strict=True))
    return LengthControlled(
        mean_interval(values, rng, resamples),
        mean_interval(effects["length"], rng, resamples),
        float(effects["difficulty"].mean()) / spread if "difficulty" in effects else None,
        values.tolist(),
    )


def _fit(wins: np.ndarray, design: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """The most likely coefficients (K,) of a logistic regression with independent normal priors.

    Args:
        wins: (N,), fractions allowed.
        design: (N, K).
        precision: (K,), of the priors, per question.
    """
    import statsmodels.api as sm

    model = sm.GLM(wins, design, family=sm.families.Binomial())
    found = model.fit_regularized(alpha=precision, L1_wt=0.0)
    return np.asarray(found.params, dtype=np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))
