"""The testbed's exact judge, for queries of its own world only."""

from collections.abc import Sequence

from selfsteer.data.records import Query
from selfsteer.judges.base import Judgement, Pair, by_scores
from selfsteer.testbed import oracle


class OracleJudge:
    """Compares the oracle's scores, so the order cannot matter."""

    name = "oracle"
    scale = "oracle's total, 0 to 1"

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`."""
        self.score_all([(query, "") for query in queries])

    def score(self, query: Query, response: str) -> float:
        """Oracle total of the response, 0 to 1.

        Raises:
            DataError: the query is not of the testbed's world.
        """
        return oracle.score(query.text, response).total

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`."""
        return [self.score(query, response) for query, response in answers]

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge.compare_all`."""
        return [
            Judgement(by_scores(self.score(p.query, p.first), self.score(p.query, p.second), 1e-9))
            for p in pairs
        ]
