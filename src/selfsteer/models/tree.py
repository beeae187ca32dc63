"""The tree layout: each prompt computed once, its responses as branches, no padding.

A micro-batch becomes one row. Sequences with the same prompt form a tree::

    ids        p p p p a a a b b | q q q c c …      two responses a, b under prompt p, …
    positions  0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 …      restart after the prompt

Every response sees its prompt and itself. It runs through the model's own forward: an attention
function registered with transformers works on the segments, so no mask over the row exists.
The last token of a response predicts nothing and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from selfsteer.models.head import TokenScores, head_scores, wide
from selfsteer.terminal import warn

if TYPE_CHECKING:
    from selfsteer.models.chat import EncodedSequence

#: The name under which the segment attention is known to transformers.
ATTENTION = "selfsteer_tree"

#: Layer types that are masked attention; anything else mixes tokens in ways a mask cannot stop.
MASKED_ATTENTION = {"full_attention", "sliding_attention"}


#: Where a tree lies in the row: its first token, prompt tokens, tokens of each branch. A plain
#: tuple, which data loaders and DDP take apart and put together again.
Tree = tuple[int, int, tuple[int, ...]]


class TreeRow(NamedTuple):
    """One row of trees and, flat over all sequences, where each response token is predicted."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    trees: tuple[Tree, ...]

    def to(self, device: torch.device) -> TreeRow:
        """The same row elsewhere."""
        ids, positions, row, position, target = (t.to(device) for t in self[:5])
        return TreeRow(ids, positions, row, position, target, self.trees)


def plant(sequences: Sequence[EncodedSequence]) -> TreeRow:
    """Lays sequences out as one row; those with equal prompts share it.

    >>> row = plant([EncodedSequence((5, 6), (7, 8)), EncodedSequence((5, 6), (9, 1, 2))])
    >>> row.input_ids_1T.tolist(), row.position_ids_1T.tolist()
    ([[5, 6, 7, 9, 1]], [[0, 1, 2, 2, 3]])
    >>> row.position.tolist(), row.target.tolist(), row.row.tolist()
    ([1, 2, 1, 3, 4], [7, 8, 9, 1, 2], [0, 0, 1, 1, 1])
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(sequences):
        by_prompt.setdefault(s.prompt_ids, []).append(i)
    ids: list[int] = []
    positions: list[int] = []
    trees: list[Tree] = []
    predicts: list[list[int]] = [[] for _ in sequences]
    for prompt, members in by_prompt.items():
        start, size = len(ids), len(prompt)
        ids += prompt
        positions += range(size)
        branches = []
        for i in members:
            inner = sequences[i].response_ids[:-1]
            predicts[i] = [start + size - 1, *range(len(ids), len(ids) + len(inner))]
            ids += inner
            positions += range(size, size + len(inner))
            branches.append(len(inner))
        trees.append((start, size, tuple(branches)))
    return TreeRow(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor([i for i, s in enumerate(sequences) for _ in s.response_ids]),
        torch.tensor([p for where in predicts for p in where]),
        torch.tensor([t for s in sequences for t in s.response_ids]),
        tuple(trees),
    )


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    trees: Sequence[Tree] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention inside each tree: a call per segment, or one with a block mask on a GPU.

    Args:
        module: the attention module of the model.
        query: (1, H, T, D).
        key: (1, K, T, D); each of the K heads serves H/K of the query's.
        value: like key.
        attention_mask: not used with trees.
        dropout: must be 0.
        scaling: of the scores; None is 1/√D.
        sliding_window: tokens a query sees, itself included.
        softcap: scores become softcap · tanh(score / softcap), as in Gemma 2.
        trees: the segments.
        kwargs: what else the model passes.

    Returns:
        (1, T, H, D), as transformers wants it, and no weights.

    Raises:
        RuntimeError: the model swallowed the segments on the way, or asks for dropout.
    """
    if trees is None:
        raise RuntimeError("the model does not pass the segments on to its attention")
    if dropout:
        raise RuntimeError("the tree layout has no dropout in attention")
    if query.is_cuda and query.dtype != torch.float64 and not _flex_errors:
        try:
            flexed = flex_tree_attention(
                query, key, value, tuple(trees), scaling, sliding_window, softcap, _compiled
            )
            return flexed.transpose(1, 2), None
        except torch.OutOfMemoryError:
            raise  # says nothing of flex_attention; whoever chose the row makes it smaller
        except Exception as e:
            _flex_failed(e)
    # split, not slices: the gradient of a slice is a whole row of zeros, once per segment
    spans = [(prompt + branches[0], *branches[1:]) for _, prompt, branches in trees]
    pieces = [(prompt, *branches) for _, prompt, branches in trees]
    queries = iter(query.split([n for span in spans for n in span], dim=2))
    keys = iter(key.split([n for sizes in pieces for n in sizes], dim=2))
    values = iter(value.split([n for sizes in pieces for n in sizes], dim=2))
    out = []
    for sizes in pieces:
        prompt_key, prompt_value = next(keys), next(values)
        for _ in sizes[1:]:
            segment = next(queries)
            own_key, own_value = next(keys), next(values)
            if segment.shape[2]:
                out.append(
                    _attend(
                        segment,
                        torch.cat([prompt_key, own_key], dim=2),
                        torch.cat([prompt_value, own_value], dim=2),
                        scaling,
                        sliding_window,
                        softcap,
                    )
                )
    return torch.cat(out, dim=2).transpose(1, 2), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention aligned at the end: the last query sees the last key."""
    size, total = query.shape[2], key.shape[2]
    mask = None
    if size != total or softcap is not None or (window is not None and window < total):
        at = torch.arange(total - size, total, device=query.device).unsqueeze(1)
        keys = torch.arange(total, device=query.device).unsqueeze(0)
        mask = keys <= at
        if window is not None:
            mask = mask & (keys > at - window)
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    if grouped:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    assert mask is not None
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=wide(scores.dtype)).to(value.dtype) @ value


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    trees: tuple[Tree, ...],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    wrap: Callable[[Any], Any],
) -> Tensor:
    """The same attention as one flex_attention call over the row, (1, H, T, D).

    Args:
        query: (1, H, T, D).
        key: (1, K, T, D).
        value: like key.
        trees: the segments.
        scaling: as in `tree_attention`.
        window: as in `tree_attention`.
        softcap: as in `tree_attention`.
        wrap: compiles torch's functions, or returns them as they are.
    """

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out: Tensor = wrap(flex_attention)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=_block_mask(trees, window, query.device, wrap),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


@lru_cache(maxsize=4)  # the layers of a forward share it; windows of two sizes may alternate
def _block_mask(
    trees: tuple[Tree, ...], window: int | None, device: torch.device, wrap: Callable[[Any], Any]
) -> BlockMask:
    of_tree: list[int] = []
    of_branch: list[int] = []
    at: list[int] = []
    for number, (_, prompt, branches) in enumerate(trees):
        for branch, (first, size) in enumerate([(0, prompt), *((prompt, n) for n in branches)]):
            of_tree += [number] * size
            of_branch += [branch] * size  # 0 is the prompt
            at += range(first, first + size)
    tree_T, branch_T, at_T = (torch.tensor(v, device=device) for v in (of_tree, of_branch, at))

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (branch_T[k] == 0) | (branch_T[k] == branch_T[q])
        seen = (tree_T[k] == tree_T[q]) & own & (at_T[k] <= at_T[q])
        return seen if window is None else seen & (at_T[q] - at_T[k] < window)

    size = len(of_tree)
    mask: BlockMask = wrap(create_block_mask)(sees, None, None, size, size, device=device)
    return mask


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


_flex_errors: list[str] = []


def _flex_failed(error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    _flex_errors.append(reason)
    warn(f"flex_attention does not work here ({reason}); attention runs segment by segment")


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def obstacle(model: Any) -> str | None:
    """Why a model cannot take the tree layout; None if nothing speaks against it."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds - MASKED_ATTENTION:
        return "its layers mix tokens by other means than masked attention"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced through transformers' AttentionInterface"
    if not hasattr(model, "get_decoder") or model.get_output_embeddings() is None:
        return "its decoder and output embedding cannot be told apart"
    return None


def is_installed(model: Any) -> bool:
    """Whether the model answers ``tree_row``."""
    return hasattr(model, "_selfsteer_own_attention")


def install(model: Any) -> None:
    """Teaches a causal language model to answer ``forward(tree_row=…)`` with log-probs.

    The model's own forward is called for anything else. Wrappers (DDP, peft) pass the argument
    on, so that their hooks see an ordinary forward.
    """
    if is_installed(model):
        return
    own_forward, own_attention = model.forward, model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)

    def forward(*args: Any, tree_row: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        if tree_row is not None:
            return _row_scores(model, TreeRow(*tree_row))
        model.set_attn_implementation(own_attention)
        try:
            return own_forward(*args, **kwargs)
        finally:
            model.set_attn_implementation(ATTENTION)

    head = model.get_output_embeddings()
    own_head = head.forward

    def head_forward(hidden: Tensor, target: Tensor | None = None) -> Any:
        return own_head(hidden) if target is None else head_scores(model, hidden, target)

    # through the module's call, whose hooks gather its weights where ranks hold parts of them
    head.forward = head_forward
    model.forward = forward
    model._selfsteer_own_attention = own_attention


def uninstall(model: Any) -> None:
    """Gives a model its own forward and attention back."""
    if is_installed(model):
        model.set_attn_implementation(model._selfsteer_own_attention)
        del model.forward, model.get_output_embeddings().forward, model._selfsteer_own_attention


def _row_scores(model: Any, row: TreeRow) -> TokenScores:
    # a mask of four dimensions is taken as it is; the segments say all there is to say
    no_mask = row.input_ids_1T.new_zeros(1, 1, 1, 1)
    hidden = model.get_decoder()(
        input_ids=row.input_ids_1T,
        position_ids=row.position_ids_1T,
        attention_mask=no_mask,
        use_cache=False,
        trees=row.trees,
    ).last_hidden_state
    scores: TokenScores = model.get_output_embeddings()(hidden[0, row.position], row.target)
    return scores
