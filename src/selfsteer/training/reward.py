"""The loss of a Bradley-Terry reward model, on token ids that our own chat format made.

A pair costs −log σ(r(x, y⁺) − r(x, y⁻) − margin) (Bradley & Terry 1952; the margin is that of
Llama 2, arXiv 2307.09288, eq. 2) + center·(r(x, y⁺) + r(x, y⁻))² (arXiv 2312.09244, eq. 2).
One example::

    RewardPair("q1", "sso", chosen_ids=(4, 9, 7, 1), rejected_ids=(4, 9, 8, 1), margin=0.0)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from selfsteer.models.load import LoadedModel
from selfsteer.training.trainer import Metrics


@dataclass(frozen=True)
class RewardPair:
    """One preference as token ids: conversation and answer, as the template ends it."""

    id: str
    source: str
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin: float = 0.0

    def tokens(self) -> int:
        """Tokens of both."""
        return len(self.chosen_ids) + len(self.rejected_ids)


class RewardTask:
    """Pairs for a classifier with one label.

    Args:
        loaded: from `load_reward_start`, so that padding is on the right and known to the model.
        pairs: one that counts twice stands twice.
        center: weight of the term that pulls scores to mean 0.
    """

    adapters = "SEQ_CLS"

    def __init__(self, loaded: LoadedModel, pairs: Sequence[RewardPair], center: float) -> None:
        self.examples, self.center = pairs, center
        self.precision = loaded.precision
        self.pad_id = loaded.chat.tokenizer.pad_token_id

    def costs(self, pairs: Sequence[RewardPair]) -> list[int]:
        """Tokens that each takes in a row, padded to the longest of them."""
        longest = max(max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
        return [2 * longest] * len(pairs)

    def loss(self, model: Any, pairs: Sequence[RewardPair]) -> tuple[Tensor, Metrics]:
        """The loss of one row of pairs, (B,); metrics under TRL's names."""
        device = next(model.parameters()).device
        flat = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
        ids = [torch.tensor(x, device=device) for x in flat]
        with self.precision():
            rewards = model(
                input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
                attention_mask=pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
                use_cache=False,
            ).logits.squeeze(-1)
        chosen, rejected = rewards.float().chunk(2)
        gap = chosen - rejected
        loss = -logsigmoid(gap - torch.tensor([p.margin for p in pairs], device=device))
        size, known = len(pairs), rewards.detach()
        metrics: Metrics = {
            "accuracy": ((gap > 0).sum(), size),
            "margin": (gap.detach().sum(), size),
            "mean_reward": (known.sum(), 2 * size),
            "min_reward": (known.min(), 1),
            "max_reward": (known.max(), 1),
        }
        return loss + self.center * (chosen + rejected) ** 2, metrics
