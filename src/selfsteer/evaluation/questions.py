"""The questions of judged sets, the answers that models gave to them, and a baseline's.

A row is one question: whatever `selfsteer.data.shapes` can read, or ``turns``; with an optional
``id`` (or ``question_id``, ``uid``)::

    {"prompt": "What does the bee eat?"}
    {"turns": ["Describe Vietnam.", "Shorter."], "category": "writing", "reference": ["…", "…"]}

Baseline answers are rows with the same id, or the same question, and ``response`` or ``output``;
the answers that selfsteer stores are such rows. Without an id, a question's content is its id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from selfsteer.data.files import read_rows
from selfsteer.data.jsonl import is_number
from selfsteer.data.reading import read
from selfsteer.data.records import Message, Query, content_id
from selfsteer.data.shapes import asked, several
from selfsteer.engines.base import PROMPT_TOO_LONG, REFUSED, REQUEST_FAILED, Completion
from selfsteer.errors import DataError, short
from selfsteer.recipe.sections import JudgedSet, resolve_path

_IDS = ("id", "question_id", "uid")
_ANSWERS = ("response", "output")


@dataclass(frozen=True)
class Question:
    """One question: the conversation up to the first answer, and the user turns after it."""

    id: str
    start: tuple[Message, ...]
    later: tuple[str, ...] = ()
    category: str | None = None
    references: tuple[str | None, ...] = ()
    difficulty: float | None = None

    def query(self, answers: Sequence[str] = ()) -> Query:
        """What is asked after these answers."""
        messages = list(self.start)
        for answer, turn in zip(answers, self.later, strict=False):
            messages += [Message("assistant", answer), Message("user", turn)]
        return Query(self.id, tuple(messages))


@dataclass(frozen=True)
class Answered:
    """A model's answers to one question, one per turn as far as there are any.

    ``missing`` says why the last turn has none; None if all have one.
    """

    id: str
    responses: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    missing: str | None = None

    @property
    def failed(self) -> bool:
        """Whether a request failed, so that it is worth to be sent again."""
        return (self.missing or "").startswith(REQUEST_FAILED) and self.missing != REFUSED

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Reads a stored line."""
        responses, reasons = tuple(value["responses"]), tuple(value["finish_reasons"])
        return cls(value["id"], responses, reasons, value["missing"])

    def then(self, turn: Completion) -> "Answered":
        """These answers and that to the next turn, or why there is none."""
        if turn.missing:
            return replace(self, missing=turn.missing)
        responses = (*self.responses, turn.text)
        return Answered(self.id, responses, (*self.finish_reasons, turn.finish_reason))


def read_questions(settings: JudgedSet, limit: int | None = None) -> list[Question]:
    """The questions of a set, in the order of its file.

    Raises:
        DataError: names file and line of what is no question, a repeated id, or a second turn
            where the style has none.
    """
    found: dict[str, Question] = {}
    for where, question in read(read_rows(resolve_path(settings.questions)), _question):
        if len(found) == limit:
            break
        if question.later and settings.style != "mt-bench":
            raise DataError(
                f"{where} has {len(question.later) + 1} turns; style {settings.style} judges one "
                "answer. Use style mt-bench, or give one turn."
            )
        if question.id in found:
            raise DataError(
                f"{where}: the id {short(question.id)} is there twice. Make ids unique."
            )
        found[question.id] = question
    if not found:
        raise DataError(f"{settings.questions} holds no question.")
    return list(found.values())


def _question(row: Mapping[str, Any]) -> Question:
    """A row as a question; with ``turns`` the first one is the prompt."""
    later: list[Any] = []
    if row.get("turns") is not None:
        turns = row["turns"] if isinstance(row["turns"], list) else []
        texts = [t.get("content") if isinstance(t, Mapping) else t for t in turns]
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError("turns must be a list of texts")
        prompt, *later = texts
        start = asked({"prompt": prompt, "system": row.get("system")}).query.messages
    else:
        parts = several(row)
        if len(parts) != 1:
            raise DataError(f"a row must hold one question, found {len(parts)}")
        start = asked(parts[0]).query.messages
    category, difficulty, reference = map(row.get, ("category", "difficulty", "reference"))
    if difficulty is not None and not _is_number(difficulty):
        raise DataError(f"difficulty must be a number, found {short(difficulty)}")
    references = reference if isinstance(reference, list) else [reference]
    if not all(r is None or isinstance(r, str) or _is_number(r) for r in references):
        raise DataError(
            f"reference must be a text, or a list of one per turn, found {short(reference)}"
        )
    return Question(
        _given_id(row) or content_id([*start, *(Message("user", t) for t in later)]),
        start,
        tuple(later),
        None if category is None else str(category),
        tuple(None if r in (None, "") else str(r) for r in references),
        difficulty,
    )


def _given_id(row: Mapping[str, Any]) -> str | None:
    return next((str(row[k]) for k in _IDS if row.get(k) is not None), None)


def _stated(row: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The question beside an answer, which may come without one."""
    try:
        return _question(row).start
    except DataError:
        return None


def _is_number(value: Any) -> bool:
    return is_number(value) and not isinstance(value, bool)


def read_baseline(settings: JudgedSet, questions: Sequence[Question]) -> dict[str, str]:
    """Question id → the answer to beat; questions without one are left out.

    Rows that selfsteer itself wrote for an unanswered question do not count.

    Raises:
        DataError: a row is no answer or states another question than the one with its id, a
            question has two answers, or none has one.
    """
    assert settings.baseline is not None
    by_id = {q.id: q for q in questions}
    by_content = {content_id(q.start): q for q in questions}
    found: dict[str, str] = {}
    for where, row in read(read_rows(resolve_path(settings.baseline)), dict):
        answer = next((row[k] for k in _ANSWERS if isinstance(row.get(k), str)), None)
        if answer is None:
            raise DataError(f"{where} is not an answer: it needs 'response' or 'output', a text.")
        beaten, stated = by_id.get(_given_id(row) or ""), _stated(row)
        if stated and (beaten is None or content_id(beaten.start) != content_id(stated)):
            same = by_content.get(content_id(stated))
            if same is None and beaten and beaten.start[-1].content != stated[-1].content:
                raise DataError(
                    f"{where} has the id of question {short(beaten.id)} and states another one, "
                    f"{short(stated[-1].content)}, not {short(beaten.start[-1].content)}. Give "
                    "the answers to these questions."
                )
            beaten = same or beaten
        lost = str(row.get("finish_reason")).startswith((PROMPT_TOO_LONG, REQUEST_FAILED))
        if beaten is None or row.get("missing") or lost:
            continue
        if found.setdefault(beaten.id, answer) != answer:
            raise DataError(
                f"{where} answers question {short(beaten.id)} differently from an earlier line. "
                "Keep the answers of one model."
            )
    if not found:
        raise DataError(
            f"{settings.baseline} answers none of the questions of {settings.questions}. Answers "
            "are found by id, or by equal question."
        )
    return found
