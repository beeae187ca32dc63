"""Log-probs of responses: the one scorer that losses, filter and quality report share.

Shape legend: N sequences, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from selfsteer.data.records import Triple
from selfsteer.errors import ConfigError
from selfsteer.models import tree
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.finite import check_values
from selfsteer.models.head import (
    TokenScores,
    log_collisions,
    sampled_positions,
    sampled_statistics,
    token_loss,
    with_collisions,
)
from selfsteer.models.tree import TreeRow
from selfsteer.terminal import warn

#: Largest difference of a token's log-prob between the layouts that passes as rounding, nats.
#: Rounding is about 1e-6 in float32; a token that sees what it must not moves by far more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

#: Tokens of one scoring forward; bounds memory where responses are long.
MAX_TOKENS = 16_384


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
    ids = [torch.tensor((*s.prompt_ids, *s.response_ids)) for s in sequences]
    return PaddedBatch(
        pad_sequence(ids, batch_first=True, padding_value=pad_id),
        pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        torch.tensor([i for i, s in enumerate(sequences) for _ in s.response_ids]),
        torch.tensor([p for s in sequences for p in range(len(s.prompt_ids) - 1, len(s) - 1)]),
        torch.tensor([t for s in sequences for t in s.response_ids]),
    )


def padded_scores(model: Any, batch: PaddedBatch) -> TokenScores:
    """Log-prob in nats of each response token of the batch, float32, flat and in order.

    Only the span of positions that predict a response token of some sequence is projected to the
    vocabulary, where the model's forward can be asked for a part (``logits_to_keep``).
    """
    first, last = int(batch.position.min()), int(batch.position.max()) + 1
    kwargs: dict[str, Any] = {}
    offset = 0
    if keeps_part(model):
        kwargs["logits_to_keep"] = torch.arange(first, last, device=batch.input_ids_NT.device)
        offset = first
    logits = model(
        input_ids=batch.input_ids_NT,
        attention_mask=batch.attention_mask_NT,
        use_cache=False,
        **kwargs,
    ).logits
    picked_TV = logits[batch.row, batch.position - offset].float()
    if (loss := token_loss()) is not None:
        return TokenScores(loss(picked_TV, 0), None)
    target = picked_TV.gather(1, batch.target.unsqueeze(1)).squeeze(1)
    log_sum_R = picked_TV.logsumexp(dim=1)
    sampled = None
    if torch.is_grad_enabled():
        some = sampled_positions(0, len(batch.target))
        with torch.no_grad():
            sampled = sampled_statistics(picked_TV[some], log_sum_R[some], batch.target[some])
    return TokenScores(target - log_sum_R, sampled, log_collisions(picked_TV, log_sum_R))


def keeps_part(model: Any) -> bool:
    """Whether the model's forward can be asked for the logits of some positions only."""
    plain = getattr(model, "module", model)
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


def sums_by_row(values: Tensor, row: Tensor, count: int) -> Tensor:
    """Adds float32 token values in float64, per row: sums of ~1e3 lose digits in float32."""
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add(
        0, row, values.double()
    )


def pack(sequences: Sequence[EncodedSequence], layout: str, pad_id: int) -> PaddedBatch | TreeRow:
    """One batch in the given layout, ``tree`` or ``padded``."""
    return tree.plant(sequences) if layout == "tree" else pad(sequences, pad_id)


def batch_scores(model: Any, batch: PaddedBatch | TreeRow) -> TokenScores:
    """Log-probs of the response tokens and, while training, entropy and accuracy."""
    if isinstance(batch, TreeRow):
        return TokenScores(*model(tree_row=list(batch)))
    return padded_scores(model, batch)


def batch_logps(model: Any, batch: PaddedBatch | TreeRow) -> Tensor:
    """Log-prob in nats of each response token, flat and in the order of the sequences."""
    return batch_scores(model, batch).logps


def settle_layout(
    model: Any, layout: str, probe: Sequence[EncodedSequence], dtype: torch.dtype = torch.float32
) -> str:
    """Chooses the layout and makes the model ready for it.

    Args:
        model: a causal language model.
        layout: ``auto``, ``tree`` or ``padded``.
        probe: what is scored both ways before trees are believed in; should share prompts. If
            empty, ``auto`` is ``padded`` and ``tree`` is taken at its word.
        dtype: the precision that the forward computes in, for the tolerance.

    Returns:
        ``tree`` or ``padded``; ``auto`` falls back to padded with a warning that shows the figures.

    Raises:
        ConfigError: ``tree`` on a model that cannot take it or scores otherwise in it, or an
            unknown layout.
        NumericsError: a log-prob of the probe is not finite.
    """
    if layout not in ("auto", "tree", "padded"):
        raise ConfigError(f"unknown layout {layout!r}; layouts are auto, tree and padded")
    if layout == "padded" or (layout == "auto" and not probe):
        return "padded"
    reason = tree.obstacle(model)
    if reason is not None:
        if layout == "tree":
            raise ConfigError(
                f"layout tree cannot be used with {type(model).__name__}: {reason}. Use auto or "
                "padded."
            )
        return "padded"
    difference = tree_difference(model, probe) if probe else 0.0
    if not difference <= TOLERANCE[dtype]:
        found = (
            f"the tree layout moves log-probs of {type(model).__name__} by up to "
            f"{difference:.2g} nats (tolerance {TOLERANCE[dtype]:.2g})"
        )
        if layout == "tree":
            raise ConfigError(f"{found}: its numbers would be wrong. Use layout auto or padded.")
        warn(f"{found}; the padded one is used")
        return "padded"
    tree.install(model)
    return "tree"


@torch.no_grad()
def tree_difference(model: Any, probe: Sequence[EncodedSequence]) -> float:
    """Largest difference of a token's log-prob between the two layouts; infinite on failure."""
    device, installed = next(model.parameters()).device, tree.is_installed(model)
    # each alone: side by side, prompts of unlike lengths would be projected to the vocabulary
    alone = [batch_logps(model, pad([s], 0).to(device)) for s in probe]
    check_values(alone, [s.record for s in probe], f"The log-probs of {type(model).__name__}")
    expected = torch.cat(alone)
    tree.install(model)
    try:
        found = batch_logps(model, tree.plant(probe).to(device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as e:
        warn(f"the tree layout failed on {type(model).__name__}: {e}")
        return float("inf")
    finally:
        if not installed:
            tree.uninstall(model)
    return float((found.float() - expected.float()).abs().max())


def batches(sequences: Sequence[EncodedSequence], layout: str, size: int) -> Iterator[list[int]]:
    """Indices in batches of about ``size`` sequences: like lengths, or whole trees, together."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(sequences):
        by_prompt.setdefault(s.prompt_ids if layout == "tree" else (i,), []).append(i)
    groups = sorted(by_prompt.values(), key=lambda g: max(len(sequences[i]) for i in g))
    batch: list[int] = []
    for group in reversed(groups):
        tokens = sum(len(sequences[i]) for i in (*batch, *group))
        if batch and (len(batch) + len(group) > size or tokens > MAX_TOKENS):
            yield batch
            batch = []
        batch = [*batch, *group]
    if batch:
        yield batch


@torch.no_grad()
def score_sequences(
    model: Any,
    sequences: Sequence[EncodedSequence],
    *,
    layout: str = "padded",
    batch_size: int = 8,
    pad_id: int = 0,
    advance: Callable[[int, int], None] = lambda items, tokens: None,
    collisions: bool = False,
) -> list[Tensor]:
    """Per-token log-probs (CPU) of each response, in the order given.

    Args:
        model: a causal language model, settled for the layout; its mode is left as it is.
        sequences: what to score; nothing is truncated.
        layout: ``tree`` or ``padded``.
        batch_size: sequences per forward.
        pad_id: any valid token id.
        advance: told the sequences and tokens of each finished batch.
        collisions: give Σ_v π(v)² at each token in place of its log-prob.

    A batch that is too large for the GPU's memory is scored in halves.

    Raises:
        NumericsError: a value is not finite; names the records.
    """
    device = next(model.parameters()).device
    out: list[Tensor | None] = [None] * len(sequences)
    todo = list(batches(sequences, layout, batch_size))[::-1]
    while todo:
        chosen = todo.pop()
        part = [sequences[i] for i in chosen]
        try:
            with with_collisions() if collisions else nullcontext():
                scores = batch_scores(model, pack(part, layout, pad_id).to(device))
            values = scores.logps if scores.collisions is None else scores.collisions.exp()
        except torch.OutOfMemoryError:
            if len(chosen) == 1 or isinstance(model, FSDPModule):  # other ranks cannot turn back
                raise
            half = len(chosen) // 2
            todo += [chosen[half:], chosen[:half]]
            torch.cuda.empty_cache()
            continue
        lengths = [len(s.response_ids) for s in part]
        pieces = values.cpu().split(lengths)
        what = "collision probabilities" if collisions else "log-probs"
        check_values(pieces, [s.record for s in part], f"The {what} of {type(model).__name__}")
        for i, piece in zip(chosen, pieces, strict=True):
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
        layout: ``auto`` proves tree = padded on the first triples and falls back to padded;
            ``tree``; ``padded``.
        batch_size: triples per forward.
        max_length: tokens kept of prompt + response; None truncates nothing.

    Returns:
        Per name, (sums (N,) float64 in nats, lengths (N,) int64), in the order of ``triples``.
        Per-token float32 values are added in float64.

    Raises:
        ConfigError: an unknown layout, or ``tree`` on a model that cannot take it.
        DataError: a triple lacks a response or principles that a sequence needs.
    """
    chat = ChatFormat(tokenizer)
    encoded = [chat.sequence(t, name, max_length) for t in triples for name in sequences]
    was_training = model.training
    model.eval()
    probe = encoded[: 2 * len(sequences)]
    size = batch_size * max(len(sequences), 1)
    installed = tree.is_installed(model)
    try:
        settled = settle_layout(model, layout, probe, next(model.parameters()).dtype)
        values = score_sequences(model, encoded, layout=settled, batch_size=size)
    finally:
        if not installed:
            tree.uninstall(model)
        model.train(was_training)
    parts = {name: values[k :: len(sequences)] for k, name in enumerate(sequences)}
    return {
        name: (
            torch.tensor([float(v.double().sum()) for v in part], dtype=torch.float64),
            torch.tensor([len(v) for v in part], dtype=torch.int64),
        )
        for name, part in parts.items()
    }
