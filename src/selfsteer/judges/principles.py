"""The principles as a ranker: which answers the good one makes likelier than the bad one.

It needs no model but the policy, and of that only log-probs of answers that exist.
"""

from collections.abc import Sequence
from itertools import chain, compress
from pathlib import Path

from selfsteer.data.records import Query, Triple
from selfsteer.recipe.sections import Loading


class PrincipleContrast:
    """Mean over an answer's tokens of clip(log π(y_t|x+) − log π(y_t|x-), ±c), a `Scorer`.

    Args:
        policy: folder or hub id of the policy.
        loading: how it is loaded.
        clip: c, nats. Without it a few tokens decide.
        folder: of the stored log-probs.
    """

    name = "principles"
    scale = "nats per token by which the good principle makes an answer likelier than the bad one"
    #: What is scored of every answer.
    read = ("good/plain", "bad/plain")

    def __init__(self, policy: str, loading: Loading, clip: float, folder: Path) -> None:
        from selfsteer.models.load import load_model

        self.loaded = load_model(policy, loading, inference=True)
        self.clip, self.folder = clip, folder

    def score_all(self, answers: Sequence[tuple[Query, str]]) -> list[float | None]:
        """See `Scorer.score_all`; queries hold their principles.

        None where an answer does not fit the model's context beside a principle.
        """
        from selfsteer.models.store import scored

        rows = [
            Triple.from_dict({**query.to_dict(), "responses": {"plain": text}})
            for query, text in answers
        ]
        pairs = [[self.loaded.chat.sequence(row, name) for name in self.read] for row in rows]
        limit = self.loaded.context_length
        fits = [limit is None or max(map(len, pair)) <= limit for pair in pairs]
        flat = list(chain.from_iterable(compress(pairs, fits)))
        values = iter(scored(self.folder, self.loaded, flat, "principles"))
        gaps = (next(values) - next(values) if fit else None for fit in fits)
        return [
            None if gap is None else float(gap.clamp(-self.clip, self.clip).double().mean())
            for gap in gaps
        ]
