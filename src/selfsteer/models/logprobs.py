"""Log-probs of responses: the one scorer that losses, filter and quality report share.

Shape legend: N sequences, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.records import Triple


class PaddedBatch(NamedTuple):
    """Right-padded ids and, flat over all sequences, where each response token is predicted."""

    input_ids_NT: Tensor
    attention_mask_NT: Tensor
    row: Tensor
    position: Tensor
    target: Tensor

    def to(self, device: torch.device) -> "PaddedBatch":
        """The same batch elsewhere."""
        return PaddedBatch(*(t.to(device) for t in self))


def pad(sequences: Sequence[EncodedSequence], pad_id: int) -> PaddedBatch:
    """One row per sequence.

    >>> b = pad([EncodedSequence((5, 6), (7, 8)), EncodedSequence((5,), (9,))], pad_id=0)
    >>> b.input_ids_NT.tolist(), b.position.tolist(), b.target.tolist()
    ([[5, 6, 7, 8], [5, 9, 0, 0]], [1, 2, 0], [7, 8, 9])
    """
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for i, s in enumerate(sequences):
        ids[i, : len(s)] = torch.tensor((*s.prompt_ids, *s.response_ids))
        mask[i, : len(s)] = 1
        rows += [i] * len(s.response_ids)
        positions += range(len(s.prompt_ids) - 1, len(s) - 1)
        targets += s.response_ids
    return PaddedBatch(
        ids, mask, torch.tensor(rows), torch.tensor(positions), torch.tensor(targets)
    )


def response_logps(model: Any, batch: PaddedBatch) -> Tensor:
    """Log-prob in nats of each response token of the batch, float32, flat and in order.

    Only the span of positions that predict a response token of some sequence is projected to the
    vocabulary, where the model's forward can be asked for a part (``logits_to_keep``).
    """
    first, last = int(batch.position.min()), int(batch.position.max()) + 1
    kwargs: dict[str, Any] = {}
    offset = 0
    if _keeps_part(model):
        kwargs["logits_to_keep"] = torch.arange(first, last, device=batch.input_ids_NT.device)
        offset = first
    logits = model(
        input_ids=batch.input_ids_NT,
        attention_mask=batch.attention_mask_NT,
        use_cache=False,
        **kwargs,
    ).logits
    picked_TV = logits[batch.row, batch.position - offset].float()
    target = picked_TV.gather(1, batch.target.unsqueeze(1)).squeeze(1)
    return target - picked_TV.logsumexp(dim=1)


def _keeps_part(model: Any) -> bool:
    plain = getattr(model, "module", model)
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


def sums_by_row(values: Tensor, row: Tensor, count: int) -> Tensor:
    """Adds float32 token values in float64, per row: sums of ~1e3 lose digits in float32."""
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add(
        0, row, values.double()
    )


@torch.no_grad()
def score_sequences(
    model: Any,
    sequences: Sequence[EncodedSequence],
    *,
    batch_size: int = 8,
    pad_id: int = 0,
    advance: Callable[[int, int], None] = lambda items, tokens: None,
) -> list[Tensor]:
    """Per-token log-probs (float32, CPU) of each response, in the order given.

    Args:
        model: a causal language model; its mode is left as it is.
        sequences: what to score; nothing is truncated.
        batch_size: sequences per forward; those of similar length go together.
        pad_id: any valid token id.
        advance: told the sequences and tokens of each finished batch.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    out: list[Tensor | None] = [None] * len(sequences)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        part = [sequences[i] for i in chosen]
        batch = pad(part, pad_id).to(device)
        values = response_logps(model, batch).cpu()
        for i, piece in zip(chosen, values.split([len(s.response_ids) for s in part]), strict=True):
            out[i] = piece
        advance(len(part), sum(map(len, part)))
    return [piece for piece in out if piece is not None]


@torch.no_grad()
def score_records(
    model: Any,
    tokenizer: Any,
    triples: Sequence[Triple],
    sequences: Sequence[str],
    layout: str = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scores named sequences of triples under a model.

    Args:
        model: a causal language model, in the precision to score in.
        tokenizer: its tokenizer, with a chat template.
        triples: N records; responses that are not asked for may be absent.
        sequences: names such as ``plain/good``.
        layout: ``auto`` or ``padded``; both are the padded layout.
        batch_size: triples per forward.
        max_length: tokens kept of prompt + response; None truncates nothing.

    Returns:
        Per name, (sums (N,) float64 in nats, lengths (N,) int64), in the order of ``triples``.
        Per-token float32 values are added in float64.

    Raises:
        ValueError: an unknown layout.
        DataError: a triple lacks a response or principles that a sequence needs.
    """
    if layout not in ("auto", "padded"):
        raise ValueError(f"unknown layout {layout!r}; layouts are auto and padded")
    chat = ChatFormat(tokenizer)
    encoded = [chat.sequence(t, name, max_length) for name in sequences for t in triples]
    was_training = model.training
    model.eval()
    try:
        values = score_sequences(model, encoded, batch_size=batch_size * max(len(sequences), 1))
    finally:
        model.train(was_training)
    out = {}
    for k, name in enumerate(sequences):
        part = values[k * len(triples) : (k + 1) * len(triples)]
        out[name] = (
            torch.tensor([float(v.double().sum()) for v in part], dtype=torch.float64),
            torch.tensor([len(v) for v in part], dtype=torch.int64),
        )
    return out
