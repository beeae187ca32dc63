"""What a judge is: it says which of two responses is better, asked in both orders.

Every judge answers a `Pair` with one of five verdicts; ``unparseable`` is one of them and never a
tie. Kinds: the testbed's exact oracle (`oracle`), exact rules (`checks`), a chat model (`chat`), a
reward model (`reward`), a policy's own principles (`principles`) and human labels (`people`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from selfsteer.data.records import Query, Triple, Verdict
from selfsteer.recipe.sections import JudgeConfig, resolve_path


@dataclass(frozen=True)
class Pair:
    """Two responses to one query; which of them is ``first`` has no meaning for a judge.

    ``finished`` says of each whether it ended by itself; one that a budget cut off did not.
    """

    query: Query
    first: str
    second: str
    finished: tuple[bool, bool] = (True, True)

    @classmethod
    def of(cls, triple: Triple, first: str = "good", second: str = "bad") -> Self:
        """Two responses of a triple."""
        texts, ended = triple.responses, triple.finished
        return cls(triple.query, texts[first], texts[second], (ended(first), ended(second)))


@dataclass(frozen=True)
class Judgement:
    """A verdict and how it came about.

    ``shown`` is what a judge that sees positions said in each order: FIRST is the response that
    was *shown* first, so a judge without bias says FIRST and SECOND. None: it sees no positions.
    ``reason`` says why a verdict is unparseable. Tokens and seconds are what asking cost.
    ``weights`` are the margins of the two showings, 1 unless the judge was asked for them.
    """

    verdict: Verdict
    shown: tuple[Verdict, Verdict] | None = None
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    weights: tuple[float, float] = (1.0, 1.0)


class Judge(Protocol):
    """Compares pairs of responses, each asked in both orders."""

    name: str

    def check(self, queries: Sequence[Query]) -> None:
        """Fails now if it cannot judge answers to these, before any are sampled.

        Raises:
            SelfsteerError: a query is not of its world, or its model or file is missing.
        """
        ...

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement per pair, in their order."""
        ...


class Scorer(Protocol):
    """Gives one response a score; ``scale`` says what the number means."""

    name: str
    scale: str

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """One score per (query, response), higher is better; None where there is none.

        Args:
            answers: N of them.
            finished: whether each ended by itself, for what scores that end as well; None: all did.
        """
        ...


@runtime_checkable
class ScoringJudge(Judge, Scorer, Protocol):
    """A judge that also gives one response a score."""


def by_scores(a: float | None, b: float | None, margin: float = 0.0) -> Verdict:
    """The verdict that two scores give; equal up to ``margin`` is a tie.

    >>> by_scores(0.5, 0.2, 0.1).value
    'first'
    """
    if a is None or b is None:
        return Verdict.UNPARSEABLE
    if abs(a - b) <= margin:
        return Verdict.TIE
    return Verdict.FIRST if a > b else Verdict.SECOND


def ends(answers: Sequence[object], finished: Sequence[bool] | None) -> Sequence[bool]:
    """``finished`` of `Scorer.score_all`, one for each answer."""
    return [True] * len(answers) if finished is None else finished


def turned(verdict: Verdict) -> Verdict:
    """The verdict on the same two responses, named in the other order."""
    return {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST}.get(verdict, verdict)


def judge_source(settings: JudgeConfig) -> str:
    """Folder, hub id or server's name of a judge's model."""
    assert settings.model is not None
    return settings.model if settings.engine.base_url else resolve_path(settings.model)
