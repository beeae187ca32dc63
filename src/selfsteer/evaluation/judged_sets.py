"""Question sets whose answers are judged: AlpacaEval, Arena-Hard and MT-Bench style.

A row is one question. These are read, each with an optional ``id`` (or ``question_id``, ``uid``)::

    {"prompt": "What does the bee eat?"}                          # or messages, or instruction
    {"turns": ["Describe Vietnam.", "Shorter."], "category": "writing", "reference": ["…", "…"]}

Baseline answers are rows with the same id, or the same question, and ``response`` or ``output``;
what `selfsteer` writes as a model's answers is one. Without an id, a question's content is its id.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.files import read_rows
from selfsteer.data.records import Message, Query, Verdict, content_id
from selfsteer.engines.base import PROMPT_TOO_LONG, REQUEST_FAILED
from selfsteer.errors import DataError
from selfsteer.evaluation.length_control import Compared, difficulties, length_controlled
from selfsteer.judges.base import Judge, Pair
from selfsteer.judges.chat import ChatJudge, Exchange, rate
from selfsteer.judges.stats import (
    Interval,
    game,
    mean_interval,
    statistic_interval,
    verdict_counts,
    worth,
)
from selfsteer.recipe.sections import JudgedSet, resolve_path

_IDS = ("id", "question_id", "uid")
_ANSWERS = ("response", "output")

#: Marks of style that are counted beside the length, each per answer.
STYLE = {
    "headings": re.compile(r"^#{1,6} ", re.M),
    "list_items": re.compile(r"^\s*(?:[-*+]|\d+[.)]) ", re.M),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
}


@dataclass(frozen=True)
class Question:
    """One question: the conversation up to the first answer, and the user turns after it."""

    id: str
    start: tuple[Message, ...]
    later: tuple[str, ...] = ()
    category: str | None = None
    references: tuple[str | None, ...] = ()
    difficulty: float | None = None

    def query(self, answers: Sequence[str]) -> Query:
        """What is asked after these answers."""
        messages = list(self.start)
        for answer, turn in zip(answers, self.later, strict=False):
            messages += [Message("assistant", answer), Message("user", turn)]
        return Query(self.id, tuple(messages))


@dataclass(frozen=True)
class Answered:
    """A model's answers to one question, one per turn as far as there are any.

    ``missing`` says why the last turn has none; None where all have one.
    """

    id: str
    responses: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    missing: str | None = None


def read_questions(settings: JudgedSet, limit: int | None = None) -> list[Question]:
    """The questions of a set, in the order of its file.

    Raises:
        DataError: names file and line of what is no question, an id that is there twice, or a
            second turn where the style has none.
    """
    path = Path(resolve_path(settings.questions))
    found: dict[str, Question] = {}
    for where, row in read_rows(path):
        if limit is not None and len(found) == limit:
            break
        try:
            asked = _question(row)
        except DataError as e:
            raise DataError(f"{where} is no question: {e}.") from None
        if asked.later and settings.style != "mt-bench":
            raise DataError(
                f"{where} has {len(asked.later) + 1} turns; style {settings.style} judges one "
                "answer. Use style mt-bench, or give one turn."
            )
        if asked.id in found:
            raise DataError(f"{where}: the id {asked.id!r} is there twice. Make ids unique.")
        found[asked.id] = asked
    if not found:
        raise DataError(f"{path} holds no question.")
    return list(found.values())


def _question(row: Mapping[str, Any]) -> Question:
    later: list[str] = []
    turns = row.get("turns")
    if turns is not None:
        texts: list[Any] = []
        if isinstance(turns, list):
            texts = [t.get("content") if isinstance(t, Mapping) else t for t in turns]
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError("turns must be a list of texts")
        prompt, *later = texts
        query = Query.from_dict({"prompt": prompt, "system": row.get("system")})
    elif isinstance(row.get("instruction"), str):
        text = "\n".join(filter(None, (row["instruction"], row.get("input"))))
        query = Query.from_dict({"prompt": text, "system": row.get("system")})
    else:
        own = {k: row[k] for k in ("prompt", "messages", "system") if row.get(k) is not None}
        query = Query.from_dict(own)
    given = next((row[k] for k in _IDS if row.get(k) is not None), None)
    everything = [*query.messages, *(Message("user", t) for t in later)]
    difficulty = row.get("difficulty")
    if difficulty is not None and not _is_number(difficulty):
        raise DataError(f"difficulty must be a number, found {difficulty!r}")
    category = row.get("category")
    return Question(
        content_id(everything) if given is None else str(given),
        query.messages,
        tuple(later),
        None if category is None else str(category),
        _references(row.get("reference")),
        difficulty,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _references(given: Any) -> tuple[str | None, ...]:
    """A correct answer for each turn as far as there are any; None where one has none."""
    found = given if isinstance(given, list) else [given]
    if not all(r is None or isinstance(r, str) or _is_number(r) for r in found):
        raise DataError(f"reference must be a text, or a list of one per turn, found {given!r}")
    return tuple(None if r is None or r == "" else str(r) for r in found)


def read_baseline(settings: JudgedSet, questions: Sequence[Question]) -> dict[str, str]:
    """Question id → the answer to beat; questions without one are left out.

    Rows of `selfsteer` itself that say why there is no answer are none.

    Raises:
        DataError: a row is no answer, a question has two, or none has one.
    """
    assert settings.baseline is not None
    path = Path(resolve_path(settings.baseline))
    wanted = {q.id: q.id for q in questions} | {content_id(q.start): q.id for q in questions}
    found: dict[str, str] = {}
    for where, row in read_rows(path):
        answer = next((row[k] for k in _ANSWERS if isinstance(row.get(k), str)), None)
        if answer is None:
            raise DataError(f"{where} is no answer: it needs 'response' or 'output', a text.")
        try:
            asked = _question(row)
        except DataError:  # an answer may come without its question
            given = next((row[k] for k in _IDS if row.get(k) is not None), None)
            key = wanted.get(str(given))
        else:
            key = wanted.get(asked.id) or wanted.get(content_id(asked.start))
        finish = str(row.get("finish_reason"))
        if (
            key is None
            or row.get("missing")
            or finish.startswith((PROMPT_TOO_LONG, REQUEST_FAILED))
        ):
            continue
        if found.setdefault(key, answer) != answer:
            raise DataError(
                f"{where} answers question {key!r} otherwise than an earlier line. Which one is to "
                "be beaten? Keep the answers of one model."
            )
    if not found:
        raise DataError(
            f"{path} answers none of the questions of {settings.questions}. Answers are found by "
            "id, or by equal question."
        )
    return found


# -- judging ---------------------------------------------------------------------------------------


def judge_set(
    settings: JudgedSet,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Answered]],
    baseline: Mapping[str, str],
    judge: Judge,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Model → what the judge says of its answers.

    Args:
        settings: the style.
        questions: N of them.
        answers: model → question id → its answers.
        baseline: question id → the answer to beat; empty in style mt-bench.
        judge: compares, or rates.
        seed: of the intervals.

    Returns:
        For each model the figures of `_compare` or `_rate`. ``values`` are per question and add
        up to the score; ``dropped`` counts questions without a figure by reason.
    """
    if settings.style == "mt-bench":
        return {
            model: _rate(questions, found, judge, np.random.default_rng(seed))
            for model, found in answers.items()
        }
    return _compare(settings.style, questions, answers, baseline, judge, seed)


def _compare(
    style: str,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Answered]],
    baseline: Mapping[str, str],
    judge: Judge,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Win rates against the baseline, raw and length-controlled."""
    reports: dict[str, dict[str, Any]] = {}
    compared: dict[str, list[Compared]] = {}
    for model, found in answers.items():
        rng = np.random.default_rng(seed)
        dropped: Counter[str] = Counter()
        asked: list[tuple[Question, str, str]] = []
        for q in questions:
            missing = "no_baseline_answer" if q.id not in baseline else found[q.id].missing
            if missing:
                dropped[missing] += 1
            else:
                asked.append((q, found[q.id].responses[0], baseline[q.id]))
        pairs = [Pair(q.query(()), mine, theirs) for q, mine, theirs in asked]
        out: dict[str, Any] = {"questions": len(questions)}
        won, stake = _verdicts(style, judge, pairs, out, dropped)
        kept = [i for i, s in enumerate(stake) if s]
        compared[model] = [
            Compared(q.id, won[i] / stake[i], len(mine), len(theirs), q.difficulty)
            for i, (q, mine, theirs) in enumerate(asked)
            if stake[i]
        ]
        w, s = np.array([won[i] for i in kept]), np.array([stake[i] for i in kept])
        out |= {
            "judged": len(kept),
            "dropped": dict(sorted(dropped.items())),
            "unfinished": sum(a.finish_reasons[:1] == ("length",) for a in found.values()),
            "characters": _means([(len(mine), len(theirs)) for _, mine, theirs in asked]),
            "style": {
                name: _means([(len(p.findall(a)), len(p.findall(b))) for _, a, b in asked])
                for name, p in STYLE.items()
            },
            "win_rate": _ratio(w, s, rng) if kept else None,
        }
        if kept:
            # what each question moves the ratio by; equal stakes give back the wins themselves
            rate = w.sum() / s.sum()
            values = rate + (w - rate * s) / s.mean()
            out["values"] = dict(zip((c.id for c in compared[model]), values.tolist(), strict=True))
        reports[model] = out
    wins = {model: {c.id: c.win for c in found} for model, found in compared.items()}
    for model, out in reports.items():
        if compared[model]:
            out["length_controlled"] = _control(compared[model], wins, model, seed)
    return reports


def _verdicts(
    style: str, judge: Judge, pairs: Sequence[Pair], out: dict[str, Any], dropped: Counter[str]
) -> tuple[list[float], list[float]]:
    """What was won and what was at stake of each pair; stake 0 where it could not be judged."""
    hard = style == "arena-hard"
    if hard and isinstance(judge, ChatJudge):
        judgements = judge.compare_all(pairs, margins=True)
    else:
        judgements = judge.compare_all(pairs)
    out["verdicts"] = verdict_counts(j.verdict for j in judgements)
    lost = [j for j in judgements if j.verdict is Verdict.UNPARSEABLE]
    dropped.update(j.reason or "unparseable" for j in lost)
    if hard:
        games = [game(j) for j in judgements]
        return [won for won, _ in games], [stake for _, stake in games]
    values = [worth(j.verdict) for j in judgements]
    return [w or 0.0 for w in values], [float(w is not None) for w in values]


def _ratio(won: np.ndarray, stake: np.ndarray, rng: np.random.Generator) -> Interval:
    return statistic_interval(
        lambda rows: float(won[rows].sum() / stake[rows].sum()), len(won), rng
    )


def _means(pairs: Sequence[tuple[int, int]]) -> list[float] | None:
    """(model, baseline) per answer."""
    return [round(float(v), 2) for v in np.mean(pairs, axis=0)] if pairs else None


def _control(
    compared: Sequence[Compared], wins: Mapping[str, Mapping[str, float]], model: str, seed: int
) -> dict[str, Any]:
    """Length-controlled figures of one model, and where the instruction term came from."""
    source = "the questions' own"
    if any(c.difficulty is None for c in compared):
        known = difficulties(wins, model)
        source = "the other models" if known else "none"
        compared = [
            Compared(c.id, c.win, c.length, c.baseline_length, known.get(c.id)) for c in compared
        ]
    found = length_controlled(compared, np.random.default_rng(seed))
    out: dict[str, Any] = {
        "win_rate": found.win_rate,
        "length_effect": found.length_effect,
        "difficulty_effect": found.difficulty_effect,
        "difficulty_from": source if found.difficulty_effect is not None else "none",
    }
    if found.values is None:
        return {**out, "reason": found.reason}
    return {**out, "values": dict(zip((c.id for c in compared), found.values, strict=True))}


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
    exchanges: list[tuple[Question, int, Exchange]] = []
    dropped: Counter[str] = Counter()
    for q in questions:
        answered = found[q.id]
        if answered.missing:
            dropped[answered.missing] += 1 + len(q.later) - len(answered.responses)
        for turn, response in enumerate(answered.responses):
            reference = q.references[turn] if turn < len(q.references) else None
            asked = q.query(answered.responses[:turn])
            exchanges.append((q, turn, Exchange(asked, response, reference)))
    ratings = rate(judge, [e for _, _, e in exchanges])
    turns: dict[str, list[float]] = {}
    by_question: dict[str, list[float]] = {}
    for (q, turn, _), (rating, reason) in zip(exchanges, ratings, strict=True):
        if rating is None:
            dropped[reason] += 1
            continue
        turns.setdefault(str(turn + 1), []).append(rating)
        by_question.setdefault(q.id, []).append(rating)
    asked_for = {q.id: 1 + len(q.later) for q in questions}
    values = {i: float(np.mean(r)) for i, r in by_question.items() if len(r) == asked_for[i]}
    categories: dict[str, list[float]] = {}
    for q in questions:
        if q.category is not None and q.id in values:
            categories.setdefault(q.category, []).append(values[q.id])
    return {
        "questions": len(questions),
        "judged": len(values),
        "dropped": dict(sorted(dropped.items())),
        "unfinished": sum("length" in a.finish_reasons for a in found.values()),
        "score": mean_interval(list(values.values()), rng) if values else None,
        "turns": {t: mean_interval(r, rng) for t, r in sorted(turns.items())},
        "categories": {c: mean_interval(rated, rng) for c, rated in sorted(categories.items())},
        "values": values,
    }
