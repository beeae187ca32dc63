"""The losses of preference objectives, and of objectives of tokens, over encoded triples."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from selfsteer.models.head import TokenScores, with_collisions, with_token_loss
from selfsteer.models.load import LoadedModel
from selfsteer.models.score import batch_scores, pack, sums_by_row
from selfsteer.models.teacher import Targets, targets
from selfsteer.objectives import Objective, TokenObjective, steering_loss, wpo_weights
from selfsteer.training.examples import Example
from selfsteer.training.trainer import Metrics

Kind = TypeVar("Kind", Objective, TokenObjective)


class SequenceTask(Generic[Kind]):
    """An objective on examples; settles the layout of the model, which is trained in it.

    Args:
        loaded: the model.
        objective: what to minimise.
        examples: with what the objective compares with.
    """

    adapters = "CAUSAL_LM"

    def __init__(self, loaded: LoadedModel, objective: Kind, examples: Sequence[Example]) -> None:
        self.objective: Kind = objective
        self.examples = examples
        loaded.settle([s for e in examples[:16] for s in e.sequences.values()])
        self.precision, self.layout = loaded.precision, loaded.layout
        self.pad_id = loaded.chat.tokenizer.pad_token_id or 0

    def costs(self, examples: Sequence[Example]) -> list[int]:
        """Tokens that each takes in a row; padding to the longest of them where it is padded."""
        if self.layout == "tree":
            return [e.tokens() for e in examples]
        longest = max(len(s) for e in examples for s in e.sequences.values())
        return [longest * len(e.sequences) for e in examples]


class PreferenceTask(SequenceTask[Objective]):
    """A preference objective, on examples with reference log-probs where the base needs them."""

    def loss(self, model: Any, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """The objective on one row of queries: (B,), and `steering_loss`'s metrics."""
        names, size = self.objective.sequences, len(examples)
        flat = [e.sequences[name] for name in names for e in examples]
        batch = pack(flat, self.layout, self.pad_id).to(next(model.parameters()).device)
        weighted = self.objective.weighting == "wpo"
        with self.precision(), with_collisions() if weighted else nullcontext():
            scores = batch_scores(model, batch)

        def by_name(values: Tensor) -> Tensor:
            return sums_by_row(values, batch.row, len(flat)).view(len(names), size)

        policy = by_name(scores.logps)
        lengths = torch.tensor([len(s.response_ids) for s in flat], device=policy.device)
        lengths = lengths.view_as(policy)
        reference = None
        if self.objective.base.needs_reference:
            tokens = [e.reference[name] for name in names for e in examples if e.reference]
            reference = by_name(torch.cat(tokens).to(policy.device))
        figures = {
            name: policy.new_tensor([e.figures[name] for e in examples])
            for name in examples[0].figures
        }
        if scores.collisions is not None:
            # objective pbaa: the rows are plain/good and plain/bad
            figures["weights"] = wpo_weights(policy, by_name(scores.collisions), lengths)
        out = steering_loss(
            self.objective,
            dict(zip(names, policy, strict=True)),
            None if reference is None else dict(zip(names, reference, strict=True)),
            dict(zip(names, lengths, strict=True)),
            **figures,
        )
        metrics: Metrics = {name: (value * size, size) for name, value in out.metrics.items()}
        return out.per_query, metrics | sampled_metrics(scores)


class DistilTask(SequenceTask[TokenObjective]):
    """An objective of tokens, on examples with lessons.

    The loss of an example is the sum over its tokens over the mean length of all examples, so that
    every token of a step counts alike, whatever the length of its answer.
    """

    def __init__(
        self, loaded: LoadedModel, objective: TokenObjective, examples: Sequence[Example]
    ) -> None:
        super().__init__(loaded, objective, examples)
        self.mean_tokens = sum(map(_answer_tokens, examples)) / len(examples)

    def loss(self, model: Any, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """The divergence from the targets, (B,)."""
        flat = [e.sequences[name] for e in examples for name in self.objective.sequences]
        device = next(model.parameters()).device
        batch = pack(flat, self.layout, self.pad_id).to(device)
        parts = [(e.lesson, _answer_tokens(e)) for e in examples if e.lesson]
        wanted = Targets(*(t.to(device) for t in targets(parts)))
        with self.precision(), with_token_loss(partial(wanted.divergence, self.objective)):
            scores = batch_scores(model, batch)
        sums = sums_by_row(scores.logps, batch.row, len(flat))
        count = len(batch.row)
        metrics: Metrics = {"kl": (sums.detach().sum(), count)}
        return sums / self.mean_tokens, metrics | sampled_metrics(scores)


def _answer_tokens(example: Example) -> int:
    return sum(len(s.response_ids) for s in example.sequences.values())


def sampled_metrics(scores: TokenScores) -> Metrics:
    """Entropy and accuracy, where the forward looked at them."""
    if scores.sampled is None:
        return {}
    entropy, hits, count = scores.sampled
    return {"entropy": (entropy, count), "mean_token_accuracy": (hits, count)}
