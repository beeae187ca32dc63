"""The principles as a ranker: which answers the good one makes likelier than the bad one.

It needs no model but a policy, and of that only log-probs of answers that exist.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from selfsteer.data.records import Principles, Query, Triple
from selfsteer.errors import DataError
from selfsteer.judges.base import ends
from selfsteer.judges.scoring import Answer, ScoringModel, principles_of
from selfsteer.judges.store import Advance
from selfsteer.recipe.sections import Loading

if TYPE_CHECKING:
    from torch import Tensor

    from selfsteer.models.chat import EncodedSequence


#: What a `Triple` says of a plain response that a budget cut off.
CUT_OFF = {"plain": "length"}


class PrincipleContrast:
    """Mean over an answer's tokens of clip(log π(y_t|x+) − log π(y_t|x-), ±c), a `Scorer`.

    Args:
        policy: folder or hub id of the policy.
        loading: how it is loaded.
        clip: c, nats. Without it a few tokens decide.
        folder: of the stored log-probs; None stores none.
    """

    name = "principles"
    scale = "nats per token by which the good principle makes an answer likelier than the bad one"
    #: What is scored of every answer.
    read = ("good/plain", "bad/plain")

    def __init__(
        self, policy: str, loading: Loading, *, clip: float, folder: Path | None = None
    ) -> None:
        from selfsteer.models.load import load_model

        self.loaded = load_model(policy, loading, inference=True)
        self.clip, self.folder = clip, folder

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`; queries hold their principles.

        None where an answer does not fit the model's context beside a principle, or was cut off
        before its first token.
        """
        return self.score(self.encoded(answers, finished))

    def encoded(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> "list[list[EncodedSequence]]":
        """Each answer under the good and under the bad principle; nothing where it has no token."""
        found = []
        for (query, text), end in zip(answers, ends(answers, finished), strict=True):
            said = {"responses": {"plain": text}, "finish_reasons": {} if end else CUT_OFF}
            row = Triple.from_dict({**query.to_dict(), **said})
            names = self.read if text or end else ()
            try:
                found.append([self.loaded.chat.sequence(row, name) for name in names])
            except DataError:  # the chat template refuses the conversation
                found.append([])
        return found

    def score(self, pairs: "Sequence[Sequence[EncodedSequence]]") -> list[float | None]:
        """`score_all` of what `encoded` made."""
        return [None if gap is None else self.mean(gap) for gap in self.gaps(pairs)]

    def mean(self, gap: "Tensor") -> float:
        """The score of an answer from the gaps of its tokens, (R,) nats."""
        return float(gap.clamp(-self.clip, self.clip).double().mean())

    def gaps(self, pairs: "Sequence[Sequence[EncodedSequence]]") -> "list[Tensor | None]":
        """Gaps log π(y_t|x+) − log π(y_t|x-) of each token of each answer, (R,) nats, not clipped.

        None where there is no score.
        """
        from selfsteer.models.score import score_sequences
        from selfsteer.models.store import scored

        limit = self.loaded.context_length
        fits = [bool(p) and (limit is None or max(map(len, p)) <= limit) for p in pairs]
        flat = list(chain.from_iterable(compress(pairs, fits)))
        if self.folder is not None:
            found = scored(self.folder, self.loaded, flat, "principles")
        else:
            self.loaded.settle(flat)
            with self.loaded.evaluating():
                layout = self.loaded.layout
                found = score_sequences(self.loaded.model, flat, layout=layout, batch_size=32)
        values = iter(found)
        return [next(values) - next(values) if fit else None for fit in fits]


class PrinciplesJudge(ScoringModel):
    """The contrast of the principles, as a judge of any pair of answers."""

    scale = PrincipleContrast.scale

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`.

        Raises:
            DataError: a query holds no principles, and the judge has none of its own.
        """
        from selfsteer.models.load import load_chat

        for query in queries:
            principles_of(self.settings, query)
        load_chat(self.source, self.settings.loading)

    @cached_property
    def _contrast(self) -> PrincipleContrast:
        return PrincipleContrast(self.source, self.settings.loading, clip=self.settings.clip)

    @override
    def _ask(
        self, keys: Sequence[str], answers: Sequence[Answer], advance: Advance
    ) -> list[dict[str, Any]]:
        pairs = self._contrast.encoded(
            [(self._principled(q), text) for q, text, _ in answers], [end for *_, end in answers]
        )
        tokens = [sum(map(len, pair)) for pair in pairs]
        scores = self._contrast.score(pairs)
        advance(len(keys), sum(tokens))
        return [
            {"score": s, "tokens": n, **({} if n or not (text or end) else {"refused": True})}
            for s, n, (_, text, end) in zip(scores, tokens, answers, strict=True)
        ]

    def _principled(self, query: Query) -> Query:
        """The query with the principles that its answers are judged by."""
        s = self.settings
        if s.good is None or s.bad is None:
            return query
        own = Principles(s.good, s.bad, system=self._contrast.loaded.chat.default_system)
        return replace(query, extra={"principles": own.to_dict()})
