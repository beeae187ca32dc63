"""The principles as a ranker: which answers the good one makes likelier than the bad one.

It needs no model but the policy, and of that only log-probs of answers that exist.
"""

from collections.abc import Sequence
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
        """See `Scorer.score_all`; queries hold their principles."""
        from selfsteer.models.store import scored

        rows = [
            Triple.from_dict({**query.to_dict(), "responses": {"plain": text}})
            for query, text in answers
        ]
        flat = [self.loaded.chat.sequence(row, name) for row in rows for name in self.read]
        values = scored(self.folder, self.loaded, flat, "principles")
        gaps = (good - bad for good, bad in zip(values[::2], values[1::2], strict=True))
        return [float(gap.clamp(-self.clip, self.clip).double().mean()) for gap in gaps]
