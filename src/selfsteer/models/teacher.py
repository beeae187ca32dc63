r"""What the frozen start says of each next token of an answer, as targets to distil.

Of every token as many of the vocabulary are kept as cover the asked mass in all contexts and in
the target; the others count together as the rest. A file holds the targets of some answers:

| tensor | shape | holds |
|---|---|---|
| `tokens` | (N,) | response tokens of each answer |
| `kept` | (T,) | entries of each token, T = the sum of `tokens` |
| `index`, `logq` | (E,) | token ids and log q in nats, E = the sum of `kept` |
| `reward` | (T,) | clip(log π0(y\\|x+) − log π0(y\\|x-)) of the token that stands there |
| `needed` | (S,) | entries that would cover the mass, of tokens that have too few |

Shape legend: R response tokens, V vocabulary, K entries of a token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from selfsteer.errors import ArtifactError
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.finite import check_values
from selfsteer.models.head import chunk_rows, head_logits, wide
from selfsteer.models.load import LoadedModel
from selfsteer.models.score import pad
from selfsteer.objectives import NO_MASS, TokenObjective, with_rest

#: Tokens of one forward of the teacher, the least that an interruption loses: seconds of a CPU.
MAX_TOKENS = {"cpu": 1024, "cuda": 8192}

#: Of more tokens of a chunk with too few entries, not all are asked how many would do, as that
#: takes a sort of the vocabulary.
SORTED = 32


class Targets(NamedTuple):
    """Of R tokens: ids (R, K) and log q (R, K), `NO_MASS` where a token has fewer entries."""

    ids: Tensor
    logq: Tensor

    def divergence(self, objective: TokenObjective, logits_RV: Tensor, start: int) -> Tensor:
        """The objective of consecutive tokens from ``start`` on, (r,), from the policy's logits."""
        rows = slice(start, start + len(logits_RV))
        index, logq = self.ids[rows], self.logq[rows]
        policy = logits_RV.log_softmax(dim=-1).gather(1, index)
        policy = policy.masked_fill(logq == NO_MASS, NO_MASS)
        return objective.divergence(with_rest(policy), with_rest(logq))


@dataclass(frozen=True)
class Lesson:
    """Where the targets of one answer lie."""

    path: Path
    #: tokens of the answer, the place of the first in the file, and of its first.entry
    tokens: int
    first: int
    entry: int

    def read(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Entries per token, ids and log q of the first ``count`` tokens, flat."""
        with safe_open(self.path, "pt") as file:
            kept = file.get_slice("kept")[self.first : self.first + count]
            part = slice(self.entry, self.entry + int(kept.sum()))
            return kept, file.get_slice("index")[part], file.get_slice("logq")[part]

    def reward(self) -> Tensor:
        """What each token of the answer is worth, (R,) nats."""
        with safe_open(self.path, "pt") as file:
            found: Tensor = file.get_slice("reward")[self.first : self.first + self.tokens]
        return found


def lessons(path: Path) -> list[Lesson]:
    """The answers of a file, in its order."""
    with safe_open(path, "pt") as file:
        tokens, kept = file.get_tensor("tokens").tolist(), file.get_tensor("kept").long()
    entries = torch.cat([kept.new_zeros(1), kept.cumsum(0)]).tolist()
    found, first = [], 0
    for count in tokens:
        found.append(Lesson(path, count, first, entries[first]))
        first += count
    return found


def targets(parts: Sequence[tuple[Lesson, int]]) -> Targets:
    """The targets of the first so many tokens of several answers, one after another."""
    kept, index, logq = (torch.cat(x) for x in zip(*(a.read(n) for a, n in parts), strict=True))
    place = torch.arange(int(kept.max())).unsqueeze(0) < kept.long().unsqueeze(1)
    index_RK = torch.zeros(place.shape, dtype=torch.long).masked_scatter_(place, index.long())
    return Targets(index_RK, torch.full(place.shape, NO_MASS).masked_scatter_(place, logq))


@dataclass(frozen=True)
class Teacher:
    """A frozen model that makes targets.

    Args:
        loaded: the model, in its own attention.
        objective: what target.
        top_k: most entries kept of a token.
        coverage: mass that the entries are to cover in each context and in the target.
    """

    loaded: LoadedModel
    objective: TokenObjective
    top_k: int
    coverage: float

    @torch.no_grad()
    def teach(
        self,
        answers: Sequence[Sequence[EncodedSequence]],
        advance: Callable[[int], None] = lambda count: None,
        known: dict[int, dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of one file; each answer is given in all contexts that the objective reads.

        Beside them ``covered``, (T,): the least mass that the entries of a token cover.
        ``advance`` receives the number of answers that each forward read. ``known`` receives the
        tensors of each answer; those of a forward that it has all of are not made again.

        Raises:
            NumericsError: a target is not finite; names the record.
        """
        parts = {} if known is None else known
        lengths = [max(map(len, answer)) for answer in answers]
        most = MAX_TOKENS.get(self.loaded.device.type, MAX_TOKENS["cuda"]) // len(answers[0])
        with self.loaded.evaluating():
            for group in _groups(lengths, most):
                if not parts.keys() >= set(group):
                    parts.update(zip(group, self._of([answers[i] for i in group]), strict=True))
                advance(len(group))
        ordered = [parts[i] for i in range(len(answers))]
        flat = {name: torch.cat([p[name] for p in ordered]) for name in ordered[0]}
        return {"tokens": torch.tensor([len(p["kept"]) for p in ordered]), **flat}

    def _of(self, group: Sequence[Sequence[EncodedSequence]]) -> Iterator[dict[str, Tensor]]:
        contexts = len(group[0])
        batch = pad([s for answer in group for s in answer], 0).to(self.loaded.device)
        hidden = self._decoder(
            input_ids=batch.input_ids_NT,
            attention_mask=batch.attention_mask_NT,
            use_cache=False,
        ).last_hidden_state[batch.row, batch.position]
        sizes = [len(answer[0].response_ids) for answer in group]
        of_answers = hidden.split([n * contexts for n in sizes])
        said = batch.target.split([n * contexts for n in sizes])
        records = [answer[0].record for answer in group]
        for own, ids, size, record in zip(of_answers, said, sizes, records, strict=True):
            found = self._targets(own.view(contexts, size, -1), ids[:size])
            numbers = torch.cat([found[name] for name in ("logq", "reward", "covered")])
            check_values([numbers], [record], f"Targets of the teacher {self.loaded.source}")
            yield found

    @cached_property
    def _decoder(self) -> Any:
        model = self.loaded.model
        if not hasattr(model, "get_decoder") or model.get_output_embeddings() is None:
            raise ArtifactError(
                f"{self.loaded.source} cannot be distilled: its decoder and its output embedding "
                f"cannot be told apart ({type(model).__name__}). Use method pbaa or sso."
            )
        return model.get_decoder()

    def _targets(self, hidden: Tensor, said: Tensor) -> dict[str, Tensor]:
        """Of one answer; hidden (contexts, R, D), ids of its tokens (R,)."""
        model, out = self.loaded.model, []
        vocabulary = model.get_output_embeddings().weight.shape[0]
        width = vocabulary * wide(hidden.dtype).itemsize
        rows = max(1, chunk_rows(width, hidden.device.type) // len(hidden))
        for part, ids in zip(hidden.split(rows, dim=1), said.split(rows), strict=True):
            logps = [head_logits(model, one).log_softmax(dim=-1) for one in part]
            logq_RV = self.objective.target(*logps)
            most_RV = torch.stack([*logps, logq_RV]).amax(dim=0)
            order_RK = most_RV.topk(min(self.top_k, vocabulary), dim=-1).indices
            masses = _masses(order_RK, *logps, logq_RV)
            # the entry that reaches the mass is the last one kept
            kept_RK = torch.cat(
                [torch.ones_like(masses[:, :1], dtype=torch.bool), masses[:, :-1] < self.coverage],
                dim=-1,
            )
            kept = kept_RK.sum(dim=-1)
            one, covered = ids.unsqueeze(1), masses.gather(1, kept.unsqueeze(1) - 1)[:, 0]
            few = (covered < self.coverage).nonzero()[:, 0]
            few = few[:: max(len(few) // SORTED, 1)]
            order_SV = most_RV[few].argsort(dim=-1, descending=True)
            whole_SV = _masses(order_SV, *(p[few] for p in (*logps, logq_RV)))
            needed = (whole_SV < self.coverage).sum(dim=-1) + 1
            out.append(
                {
                    "kept": kept.int(),
                    "index": order_RK[kept_RK].int(),
                    "logq": logq_RV.gather(1, order_RK)[kept_RK],
                    "reward": self.objective.reward(*(p.gather(1, one) for p in logps))[:, 0],
                    "covered": covered,
                    "needed": needed.clamp(max=vocabulary).int(),
                }
            )
        return {name: torch.cat([p[name] for p in out]).cpu() for name in out[0]}


def _masses(order_RK: Tensor, *logs: Tensor) -> Tensor:
    """The least mass that the first k of these entries cover, (R, K); log-probs (R, V)."""
    return torch.stack([p.gather(1, order_RK).exp().cumsum(dim=-1) for p in logs]).amin(dim=0)


def _groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Answers of similar length that one forward takes, the longest first; ``most`` tokens.

    >>> list(_groups([100, 5000, 90, 4000], 4096))
    [[1], [3], [0, 2]]
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > most:
            yield group
            group = []
        group.append(i)
    yield group
