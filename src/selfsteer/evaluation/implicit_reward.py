"""A policy as a reward model: the reward that DPO trains implicitly (arXiv 2305.18290, eq. 5).

r(x, y) = β·[log π(y|x) − log π_ref(y|x)], up to a term of x alone that no comparison sees. Without
a reference it is β·log π(y|x), which prefers short answers; per token both are divided by the
length of y.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from selfsteer.data.records import Query
from selfsteer.errors import ConfigError
from selfsteer.judges.base import ends
from selfsteer.models.load import load_context_length, load_model
from selfsteer.models.store import scored
from selfsteer.recipe.sections import Policy, resolve_path


class ImplicitReward:
    """Scores answers by a policy's log-probs against a reference's, one model in memory at a time.

    Args:
        policy: the model, and how both are loaded.
        reference: folder or hub id of what the policy was trained from; None: none.
        beta: scales the scores; no order depends on it.
        per_token: divide by the tokens of the answer, its end included.
    """

    def __init__(
        self, policy: Policy, reference: str | None, beta: float = 0.1, *, per_token: bool = False
    ) -> None:
        self.policy, self.reference = policy, reference
        self.beta, self.per_token = beta, per_token
        self.name = f"implicit:{policy.model}"
        ratio = "log π − log π_ref" if reference else "log π"
        self.scale = f"{beta:g}·({ratio}){' per token' if per_token else ''}, nats"

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`; None where prompt and answer exceed a model's context.

        Raises:
            ConfigError: policy and reference make different tokens of the same text.
        """
        sources = [resolve_path(s) for s in (self.policy.model, self.reference) if s is not None]
        limits = [load_context_length(s, self.policy) for s in sources]
        limit = min((x for x in limits if x is not None), default=math.inf)
        sums, made = [], []
        for source in sources:
            loaded = load_model(source, self.policy, inference=True)
            encode = loaded.chat.exchange
            made.append(
                [
                    replace(encode(q.messages, text, finished=end), record=q.id)
                    for (q, text), end in zip(answers, ends(answers, finished), strict=True)
                ]
            )
            if made[0] != made[-1]:
                raise ConfigError(
                    f"{self.reference} and {self.policy.model} make different tokens of the same "
                    "conversation, so their log-probs cannot be compared. The reference must be "
                    "the model that the policy was trained from."
                )
            kept = [s for s in made[0] if len(s) <= limit]
            with tempfile.TemporaryDirectory() as folder:
                values = scored(Path(folder), loaded, kept, f"scoring under {Path(source).name}")
            sums.append(np.array([float(v.double().sum()) for v in values]))
            del loaded
        lengths = np.array([len(s.response_ids) for s in kept]) if self.per_token else 1.0
        rewards = iter(self.beta * (sums[0] - sum(sums[1:])) / lengths)
        return [float(next(rewards)) if len(s) <= limit else None for s in made[0]]
