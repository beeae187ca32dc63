"""A reward model as a judge: a sequence classifier with one label scores both responses.

A Bradley-Terry model's score has no unit and no zero: only differences between responses to one
query mean something.
"""

import math
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from selfsteer.data.records import Query
from selfsteer.errors import NumericsError, RefusedConversation, named
from selfsteer.judges.scoring import Answer, ScoringModel
from selfsteer.judges.store import Advance
from selfsteer.models.load import LoadedModel, check_reward, load_reward


class RewardJudge(ScoringModel):
    """Scores with ``AutoModelForSequenceClassification``; loaded when something is not stored."""

    scale = "raw output of a reward model: no unit, no zero; only differences count"

    _loaded: LoadedModel | None = None

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`."""
        check_reward(self.source, self.settings.loading)

    @override
    def _ask(
        self, keys: Sequence[str], answers: Sequence[Answer], advance: Advance
    ) -> list[dict[str, Any]]:
        loaded = self._loaded = self._loaded or load_reward(self.source, self.settings.loading)
        # always ended, as the template does it: the score is read there and means nothing elsewhere
        ids = [_ids(loaded, query, text) for query, text, _ in answers]
        limit = loaded.context_length
        order = sorted(
            (i for i, s in enumerate(ids) if s and (limit is None or len(s) <= limit)),
            key=lambda i: len(ids[i]),
            reverse=True,
        )
        scores: dict[int, float] = {}
        advance(len(ids) - len(order), 0)
        # without a padding token the model cannot tell where a padded sequence ends
        size = self.settings.batch_size if loaded.model.config.pad_token_id is not None else 1
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            records = [answers[i][0].id for i in rows]
            scores |= zip(rows, _forward(loaded, [ids[i] for i in rows], records), strict=True)
            advance(len(rows), sum(len(ids[i]) for i in rows))
        return [
            {"score": scores.get(i), "tokens": len(s), **({} if s else {"refused": True})}
            for i, s in enumerate(ids)
        ]


def _ids(loaded: LoadedModel, query: Query, text: str) -> tuple[int, ...]:
    """What is scored; nothing where the chat template refuses the conversation."""
    try:
        return loaded.chat.exchange_ids(query.messages, text)
    except RefusedConversation:
        return ()


def _forward(
    loaded: LoadedModel, rows: Sequence[tuple[int, ...]], records: Sequence[str]
) -> list[float]:
    """One score per row of token ids, padded on the right.

    Raises:
        NumericsError: a score is not finite; names the records.
    """
    import torch

    pad = loaded.model.config.pad_token_id or 0
    tokens = [torch.tensor(r, device=loaded.device) for r in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in tokens], batch_first=True)
    with torch.no_grad(), loaded.precision():
        logits = loaded.model(input_ids=ids, attention_mask=mask).logits
    scores = [float(x) for x in logits[:, 0]]
    if bad := [r for s, r in zip(scores, records, strict=True) if not math.isfinite(s)]:
        raise NumericsError(
            f"The reward model {loaded.source} gave a score that is not finite on {named(bad)}. "
            "Try judge.dtype: float32."
        )
    return scores
