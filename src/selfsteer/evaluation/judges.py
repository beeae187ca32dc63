"""Who says which of two responses is better; the interface is open, the oracle is built in."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from selfsteer.records import Query, Verdict


class Judge(Protocol):
    """Compares two responses to a query, asked in both orders."""

    def check(self, queries: Sequence[Query]) -> None:
        """Raises DataError if it cannot judge answers to these, before any are sampled."""
        ...

    def compare(self, query: Query, first: str, second: str) -> Verdict:
        """Which of the two is better; INCONSISTENT if the answer changes with the order."""
        ...


@runtime_checkable
class ScoringJudge(Judge, Protocol):
    """A judge that also gives one response a score in [0, 1]."""

    def score(self, query: Query, response: str) -> float:
        """Higher is better."""
        ...


class OracleJudge:
    """The testbed's exact judge: compares scores, so the order cannot matter."""

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`."""
        for query in queries:
            self.score(query, "")

    def score(self, query: Query, response: str) -> float:
        """Oracle total of the response, 0 to 1.

        Raises:
            DataError: the query is not of the testbed's world.
        """
        from selfsteer.testbed import oracle

        return oracle.score(query.text, response).total

    def compare(self, query: Query, first: str, second: str) -> Verdict:
        """See `Judge.compare`."""
        a, b = self.score(query, first), self.score(query, second)
        if abs(a - b) < 1e-9:
            return Verdict.TIE
        return Verdict.FIRST if a > b else Verdict.SECOND


def load_judge(name: str | None) -> Judge | None:
    """The judge that a recipe names."""
    return OracleJudge() if name == "oracle" else None


def accuracy(verdicts: Iterable[Verdict]) -> float | None:
    """(wins + ½·(ties + inconsistent)) / judged, where FIRST is a win.

    ``unparseable`` verdicts are not in the denominator. None where nothing was judged.
    """
    count = Counter(verdicts)
    judged = sum(count.values()) - count[Verdict.UNPARSEABLE]
    if judged == 0:
        return None
    half = count[Verdict.TIE] + count[Verdict.INCONSISTENT]
    return (count[Verdict.FIRST] + 0.5 * half) / judged


def verdict_counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each verdict was given, all classes named."""
    count = Counter(verdicts)
    return {v.value: count[v] for v in Verdict}
