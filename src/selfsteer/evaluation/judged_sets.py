"""Judged question sets: win rates in AlpacaEval's and Arena-Hard's style, ratings in MT-Bench's."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfsteer.data.records import Verdict
from selfsteer.evaluation.questions import Answered, Question
from selfsteer.judges.base import Judge, Pair
from selfsteer.judges.chat import ChatJudge, Exchange, rate
from selfsteer.judges.stats import (
    Interval,
    game,
    known_interval,
    mean_interval,
    statistic_interval,
    verdict_counts,
    worth,
)
from selfsteer.recipe.sections import JudgedSet

#: Marks of style that are counted beside the length, each per answer.
STYLE = {
    "headings": re.compile(r"^#{1,6} ", re.M),
    "list_items": re.compile(r"^\s*(?:[-*+]|\d+[.)]) ", re.M),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
}

#: Of φ and ψ, in logits. On the public leaderboard |φ| is 0.2 to 3.0 and ψ below 1.3; with 800
#: questions the prior changes a win rate by less than 0.001.
PRIOR_SD = 3.0

#: Wins, and losses, needed for each of φ and ψ: with fewer a logistic regression fits chance
#: (Peduzzi et al. 1996, J. Clin. Epidemiol. 49).
EVENTS = 10


@dataclass(frozen=True)
class Compared:
    """A judged question: the share won, 0 to 1, how much longer the answer is, how hard it is."""

    win: float
    longer: int
    difficulty: float | None = None


def judge_set(
    settings: JudgedSet,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Answered]],
    baseline: Mapping[str, str],
    judge: Judge,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Model → figures of the judge's verdicts on its answers.

    Args:
        settings: the style.
        questions: N of them.
        answers: model → question id → its answers.
        baseline: question id → the answer to beat; empty in style mt-bench.
        judge: compares, or rates.
        seed: of the intervals.

    Returns:
        ``values`` holds, by figure (``""``, and ``LC`` if length-controlled) and question, the
        values whose mean is the figure; ``dropped`` counts questions without one by reason.
    """
    if settings.style == "mt-bench":
        return {
            model: _rate(questions, found, judge, np.random.default_rng(seed))
            for model, found in answers.items()
        }
    reports, compared = {}, {}
    for model, found in answers.items():
        rng = np.random.default_rng(seed)
        reports[model], compared[model] = _compare(
            settings.style, questions, found, baseline, judge, rng
        )
    for model, mine in compared.items():
        if mine:
            controlled, values = _control(compared, model, np.random.default_rng(seed))
            reports[model]["length_controlled"] = controlled
            reports[model]["values"] |= values
    return reports


def _compare(
    style: str,
    questions: Sequence[Question],
    found: Mapping[str, Answered],
    baseline: Mapping[str, str],
    judge: Judge,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, Compared]]:
    """The win rate against the baseline, lengths and style; and each judged question."""
    lost = {q.id: found[q.id].missing for q in questions}
    lost |= {q.id: "no_baseline_answer" for q in questions if q.id not in baseline}
    pairs = [
        Pair(
            q.query(),
            found[q.id].responses[0],
            baseline[q.id],
            (found[q.id].finish_reasons[0] != "length", True),  # nothing is known of the baseline's
        )
        for q in questions
        if not lost[q.id]
    ]
    weighted = style == "arena-hard"
    if weighted and isinstance(judge, ChatJudge):
        judgements = judge.compare_all(pairs, margins=True)
    else:
        judgements = judge.compare_all(pairs)
    unread = [j.reason or "unparseable" for j in judgements if j.verdict is Verdict.UNPARSEABLE]
    games = {
        p.query.id: game(j) if weighted else (win, 1.0)
        for p, j in zip(pairs, judgements, strict=True)
        if (win := worth(j.verdict)) is not None
    }
    won, stake = np.array([*games.values()]).reshape(-1, 2).T
    report = {
        "questions": len(questions),
        "verdicts": verdict_counts(j.verdict for j in judgements),
        "judged": len(games),
        "dropped": dict(sorted(Counter([*filter(None, lost.values()), *unread]).items())),
        "unfinished": sum(a.finish_reasons[:1] == ("length",) for a in found.values()),
        "characters": _means([(len(p.first), len(p.second)) for p in pairs]),
        "style": {
            name: _means([(len(mark.findall(p.first)), len(mark.findall(p.second))) for p in pairs])
            for name, mark in STYLE.items()
        },
        "win_rate": None,
        "values": {},
    }
    if games:
        report["win_rate"] = statistic_interval(
            lambda rows: float(won[rows].sum() / stake[rows].sum()), len(games), rng
        )
        # what each question moves the ratio by; equal stakes give back the wins themselves
        rate = won.sum() / stake.sum()
        values = rate + (won - rate * stake) / stake.mean()
        report["values"] = {"": dict(zip(games, values.tolist(), strict=True))}
    compared = {
        q.id: Compared(
            games[q.id][0] / games[q.id][1],
            len(found[q.id].responses[0]) - len(baseline[q.id]),
            q.difficulty,
        )
        for q in questions
        if q.id in games
    }
    return report, compared


def _means(pairs: Sequence[tuple[int, int]]) -> list[float] | None:
    """(model, baseline) per answer."""
    return [round(float(v), 2) for v in np.mean(pairs, axis=0)] if pairs else None


def _rate(
    questions: Sequence[Question],
    found: Mapping[str, Answered],
    judge: Judge,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Mean rating, of each turn and of each category; a question's rating is its turns' mean.

    A question without a rating of every turn has none: later turns are rated lower, so that what
    is missing would change the mean.
    """
    places = [(q, turn) for q in questions for turn in range(len(found[q.id].responses))]
    ratings = rate(
        judge,
        [
            Exchange(
                q.query(found[q.id].responses[:turn]),
                found[q.id].responses[turn],
                dict(enumerate(q.references)).get(turn),
                found[q.id].finish_reasons[turn] != "length",
            )
            for q, turn in places
        ],
    )
    by_question: dict[Question, list[float]] = {q: [] for q in questions}
    lost = {q: reason for q in questions if (reason := found[q.id].missing)}
    for (q, _), (rating, reason) in zip(places, ratings, strict=True):
        if rating is None:
            lost.setdefault(q, reason)
        else:
            by_question[q].append(rating)
    whole = {q: rated for q, rated in by_question.items() if q not in lost}
    turns, categories = (defaultdict[Any, list[float]](list) for _ in range(2))
    for rated in whole.values():
        for number, rating in enumerate(rated, 1):
            turns[str(number)].append(rating)
    values = {q: float(np.mean(rated)) for q, rated in whole.items()}
    for q, value in values.items():
        if q.category is not None:
            categories[q.category].append(value)
    return {
        "questions": len(questions),
        "judged": len(values),
        "dropped": dict(sorted(Counter(lost.values()).items())),
        "unfinished": sum("length" in a.finish_reasons for a in found.values()),
        "score": known_interval(values.values(), rng),
        "turns": {t: mean_interval(r, rng) for t, r in sorted(turns.items())},
        "categories": {c: mean_interval(r, rng) for c, r in sorted(categories.items())},
        "values": {"": {q.id: value for q, value in values.items()}},
    }


# -- length control --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthControlled:
    """The fit of one model.

    ``values`` are the pseudo-values of the questions, in their order: their mean is the win rate
    and their spread its uncertainty (each is the win rate plus the question's influence on it), so
    that two models are compared question by question as with plain means. Effects are None if
    the term is not in the model; if ``reason`` says why there are too few verdicts, all is.
    """

    win_rate: Interval | None = None
    length_effect: Interval | None = None
    difficulty_effect: float | None = None
    values: np.ndarray | None = None
    reason: str = ""


def _control(
    compared: Mapping[str, Mapping[str, Compared]], model: str, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Length-controlled figures of one model, and its values; the instruction term's origin."""
    mine, source = compared[model], "the questions' own"
    known = {i: c.difficulty for i, c in mine.items() if c.difficulty is not None}
    if len(known) < len(mine):
        known = difficulties(
            {m: {i: c.win for i, c in of.items()} for m, of in compared.items()}, model
        )
        source = "the other models" if known else "none"
    found = length_controlled(list(mine.values()), list(known.values()), rng)
    report = {k: v for k, v in vars(found).items() if k != "values"}
    report["difficulty_from"] = source if found.difficulty_effect is not None else "none"
    if found.values is None:
        return report, {}
    return report, {"LC": dict(zip(mine, found.values.tolist(), strict=True))}


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
    compared: Sequence[Compared],
    difficulty: Sequence[float],
    rng: np.random.Generator,
    resamples: int = 2000,
) -> LengthControlled:
    """The win rate that the judge would give if both answers were equally long (arXiv 2404.04475).

    With the instruction x, the published model of m against a baseline b is::

        P(m beats b on x) = σ(θ + φ·tanh((len(m) - len(b)) / s) + ψ·γ_x)

    θ is the model, φ what the judge gives for length, s the standard deviation of the differences,
    γ_x how hard the instruction is. The length-controlled win rate is the mean over x of
    σ(θ + ψ·γ_x). docs/benchmarks.md says where this fit differs from the published one: γ_x is
    `difficulties` unless the questions bring their own, φ and ψ have a wide normal prior, so that
    verdicts which follow length entirely still have a figure, and θ has none, so that equal
    lengths give back the raw win rate exactly.

    Args:
        compared: one model's verdicts of one judging.
        difficulty: γ_x of each, in any unit; empty: no instruction term.
        rng: of the intervals.
        resamples: of the bootstrap over pseudo-values.

    Raises:
        ValueError: no questions.
    """
    wins = np.array([c.win for c in compared])
    longer = np.array([c.longer for c in compared], dtype=np.float64)
    if len(wins) < 2 or np.ptp(longer) == 0:
        # nothing to control for, or nothing that could be told from the model
        return LengthControlled(mean_interval(wins.tolist(), rng, resamples), values=wins)
    events = min(wins.sum(), (1 - wins).sum())
    if events < EVENTS:
        return LengthControlled(
            reason=f"{EVENTS} wins and {EVENTS} losses are needed to tell length from chance, "
            f"found {wins.sum():g} and {(1 - wins).sum():g}"
        )
    columns = [np.ones(len(wins)), np.tanh(longer / longer.std(ddof=1))]
    spread = float(np.std(difficulty)) if len(difficulty) else 0.0
    if spread > 0 and events >= 2 * EVENTS:
        # in units of its spread, so that the prior means the same for any scale
        columns.append((np.array(difficulty) - np.mean(difficulty)) / spread)
    design = np.column_stack(columns)
    precision = np.array([0.0, *[PRIOR_SD**-2] * (len(columns) - 1)]) / len(wins)
    import statsmodels.api as sm

    model = sm.GLM(wins, design, family=sm.families.Binomial())
    fitted = np.asarray(model.fit_regularized(alpha=precision, L1_wt=0.0).params)
    equal = design.copy()
    equal[:, 1] = 0.0
    chance, predicted = (1 / (1 + np.exp(-x @ fitted)) for x in (design, equal))
    # each question's influence on the coefficients, then on the mean of the predictions
    curvature = (design * (chance * (1 - chance))[:, None]).T @ design / len(wins)
    score = design * (wins - chance)[:, None] - precision * fitted
    influence = score @ np.linalg.inv(curvature + np.diag(precision))
    values = predicted + influence @ ((predicted * (1 - predicted)) @ equal / len(wins))
    return LengthControlled(
        mean_interval(values, rng, resamples),
        mean_interval(fitted[1] + influence[:, 1], rng, resamples),
        float((fitted[2] + influence[:, 2]).mean()) / spread if len(columns) > 2 else None,
        values,
    )
