"""What judges have in common whose model scores answers one by one: the better score wins.

No position is shown, so no order can matter. Scores are stored under what was asked.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfsteer.data.digests import digest
from selfsteer.data.records import Query
from selfsteer.errors import DataError, short
from selfsteer.judges.base import Judgement, Pair, by_scores, ends, judge_source
from selfsteer.judges.store import Advance, AnswerStore
from selfsteer.recipe.sections import JudgeConfig

#: A query, a response, and whether the response ended by itself.
Answer = tuple[Query, str, bool]


class ScoringModel(ABC):
    """A judge whose model is loaded when something is not stored.

    Args:
        settings: whose model scores.
        folder: of the stored scores; None keeps them in memory.
    """

    def __init__(self, settings: JudgeConfig, folder: Path | None = None) -> None:
        self.settings = settings
        self.name = f"{settings.kind}:{settings.model}"
        self.source = judge_source(settings)
        self._store = AnswerStore.of(settings, folder)

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`; None where prompt and response exceed the context."""
        ended = ends(answers, finished)
        every = [(q, text, end) for (q, text), end in zip(answers, ended, strict=True)]
        return [found["score"] for found in self._scored(every)]

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge.compare_all`."""
        found = self._scored(
            [
                (p.query, text, end)
                for p in pairs
                for text, end in zip((p.first, p.second), p.finished, strict=True)
            ]
        )
        return [
            Judgement(
                by_scores(a["score"], b["score"], self.settings.tie_margin),
                reason=next((_unscored(x) for x in (a, b) if x["score"] is None), ""),
                prompt_tokens=a["tokens"] + b["tokens"],
                seconds=a["seconds"] + b["seconds"],
            )
            for a, b in zip(found[::2], found[1::2], strict=True)
        ]

    def _scored(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        keys = [score_key(self.settings, *answer) for answer in answers]
        questions = dict(zip(keys, answers, strict=True))
        found = self._store.fetch(questions, self._ask, f"judge {self.name}")
        return [found[k] for k in keys]

    @abstractmethod
    def _ask(
        self, keys: Sequence[str], answers: Sequence[Answer], advance: Advance
    ) -> list[dict[str, Any]]:
        """``score``, None where there is none, and ``tokens`` of each; 0 where it has no token.

        ``refused`` where the chat template refuses the conversation.
        """


def _unscored(answer: Mapping[str, Any]) -> str:
    if answer.get("refused"):
        return "template_refuses"
    return "too_long" if answer["tokens"] else "empty"


def score_key(settings: JudgeConfig, query: Query, text: str, finished: bool = True) -> str:
    """The key under which the score of a response is stored; whose it is says the folder.

    Raises:
        DataError: see `principles_of`.
    """
    asked: list[Any] = [[list(m) for m in query.messages], text]
    if settings.kind == "principles":
        asked += [principles_of(settings, query), settings.clip]
        asked += [] if finished else ["cut_off"]
    return digest(asked)


def principles_of(settings: JudgeConfig, query: Query) -> Mapping[str, Any]:
    """The principles that answers to a query are judged by: the judge's own, or else the query's.

    Raises:
        DataError: there are none.
    """
    if settings.good is not None:
        return {"good": settings.good, "bad": settings.bad}
    found = query.extra.get("principles")
    if not isinstance(found, Mapping) or not {"good", "bad"} <= found.keys():
        raise DataError(
            f"judge principles: query {short(query.id)} holds none. Give the judge a pair for "
            "every query (good and bad, docs/judges.md), or each row its principles: {good, bad}."
        )
    return found
