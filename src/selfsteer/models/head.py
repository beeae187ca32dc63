"""From hidden states at response positions to log-probs, without keeping the logits.

Shape legend: R response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Logits are made in chunks of so many bytes; the first few chunks are kept for backward and the
#: others made again. Both grow where memory does.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1024 << 20}
KEEP_BYTES = {"cpu": 96 << 20, "cuda": 2048 << 20}

#: Fewest rows of a chunk: each walks over the whole weight and its gradient once more.
CHUNK_ROWS = 256

#: One of so many response tokens is looked at for entropy and accuracy: a mean needs no more, and
#: the soft-max of all of them would cost a tenth of the head.
STRIDE = 8


_COLLISIONS: ContextVar[bool] = ContextVar("collisions", default=False)


@contextmanager
def with_collisions() -> Iterator[None]:
    """Forwards inside also say ``TokenScores.collisions``, at the price of one more soft-max."""
    token = _COLLISIONS.set(True)
    try:
        yield
    finally:
        _COLLISIONS.reset(token)


#: From logits (r, V) of consecutive response tokens and the place of the first: losses, (r,).
TokenLoss = Callable[[Tensor, int], Tensor]

_TOKEN_LOSS: ContextVar[TokenLoss | None] = ContextVar("token_loss", default=None)


def token_loss() -> TokenLoss | None:
    """The loss that forwards are to give; None: log-probs."""
    return _TOKEN_LOSS.get()


@contextmanager
def with_token_loss(loss: TokenLoss) -> Iterator[None]:
    """Forwards inside give a loss of whole distributions, in place of log-probs of the tokens."""
    token = _TOKEN_LOSS.set(loss)
    try:
        yield
    finally:
        _TOKEN_LOSS.reset(token)


class TokenScores(NamedTuple):
    """What a forward says of its response tokens."""

    #: Log-probs in nats, (R,), flat over the sequences in their order; the loss of each token
    #: inside `with_token_loss`.
    logps: Tensor
    #: Entropy in nats and whether the model's first choice is the token itself, summed over the
    #: `sampled_positions`, and how many those are: (3,), without gradient. None without gradients.
    sampled: Tensor | None
    #: log Σ_v π(v)² at each response token, (R,), without gradient; None unless asked for.
    collisions: Tensor | None = None


def sampled_positions(begin: int, end: int) -> list[int]:
    """One of every `STRIDE` positions, scattered, that lies in [begin, end).

    A fixed step would meet responses of like length always at the same place.

    >>> sampled_positions(0, 40)
    [4, 9, 22, 27, 32]
    >>> [p for part in ((0, 10), (10, 40)) for p in sampled_positions(*part)]
    [4, 9, 22, 27, 32]
    """
    blocks = range(begin // STRIDE, -(-end // STRIDE))
    picked = [k * STRIDE + ((k + 1) * 0x9E3779B1 % 2**32 * STRIDE >> 32) for k in blocks]
    return [p for p in picked if begin <= p < end]


def sampled_statistics(logits_RV: Tensor, log_sum_R: Tensor, target_R: Tensor) -> Tensor:
    """The sums that `TokenScores.sampled` holds, over all rows given."""
    entropy_R = log_sum_R - ((logits_RV - log_sum_R.unsqueeze(1)).exp() * logits_RV).sum(dim=1)
    hits_R = logits_RV.argmax(dim=1) == target_R
    return torch.stack(
        [entropy_R.sum(), hits_R.sum().to(entropy_R), entropy_R.new_tensor(len(entropy_R))]
    )


def log_collisions(logits_RV: Tensor, log_sum_R: Tensor) -> Tensor | None:
    """Log Σ_v π(v)², (R,), from logits and their log-sum-exp; None unless asked for."""
    if not _COLLISIONS.get():
        return None
    with torch.no_grad():
        doubled = [(2 * part).logsumexp(dim=1) for part in logits_RV.split(64)]
        return torch.cat(doubled) - 2 * log_sum_R


def head_scores(model: Any, hidden_RD: Tensor, target_R: Tensor) -> TokenScores:
    """Log-prob in nats of each target under the model's output embedding, (R,) float32.

    Honours a bias, final soft-capping (Gemma 2) and logit scaling (Cohere, Granite). Reduces in
    float32, in float64 where the hidden states are: a bfloat16 log-sum-exp is off by whole nats.
    """
    parts = _projection(model)
    if (loss := token_loss()) is not None:
        return _token_losses(hidden_RD, parts, target_R, loss)
    logps, sampled, collisions = _HeadLogps.apply(  # type: ignore[no-untyped-call]
        hidden_RD, *parts[:2], target_R, *parts[2:]
    )
    return TokenScores(logps, sampled, collisions)


def head_logits(model: Any, hidden_RD: Tensor) -> Tensor:
    """Logits under the model's output embedding, (R, V), as `head_scores` makes them in chunks."""
    return _logits(hidden_RD, *_projection(model))


def chunk_rows(width: int, device: str) -> int:
    """Rows of a chunk whose rows take ``width`` bytes each."""
    return max(CHUNK_ROWS, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // width)


def _projection(model: Any) -> tuple[Tensor, Tensor | None, float, float]:
    """Weight, bias, scale and soft-cap of the output embedding."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    return head.weight, getattr(head, "bias", None), float(scale), float(softcap)


def _token_losses(
    hidden_RD: Tensor,
    parts: tuple[Tensor, Tensor | None, float, float],
    target_R: Tensor,
    loss: TokenLoss,
) -> TokenScores:
    """Chunk by chunk; a chunk's logits are forgotten and made again for the backward."""
    if torch.is_autocast_enabled(hidden_RD.device.type):
        hidden_RD = hidden_RD.to(torch.get_autocast_dtype(hidden_RD.device.type))
    weight = parts[0].to(hidden_RD.dtype)

    def part(chunk_RD: Tensor, start: int) -> tuple[Tensor, Tensor]:
        logits_RV = _logits(chunk_RD, weight, *parts[1:])
        end = start + len(chunk_RD)
        some = [p - start for p in sampled_positions(start, end)]
        with torch.no_grad():
            few_RV, target = logits_RV[some], target_R[start:end][some]
            sampled = sampled_statistics(few_RV, few_RV.logsumexp(dim=1), target)
        return loss(logits_RV, start), sampled

    rows = chunk_rows(len(weight) * wide(hidden_RD.dtype).itemsize, hidden_RD.device.type)
    starts = range(0, len(hidden_RD), rows)
    made = [
        checkpoint(part, hidden_RD[i : i + rows], i, use_reentrant=False, preserve_rng_state=False)
        for i in starts
    ]
    losses, sampled = zip(*made, strict=True)
    return TokenScores(torch.cat(losses), torch.stack(sampled).sum(dim=0))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that sums over many values of a narrower one are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(
    hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, softcap: float
) -> Tensor:
    logits_RV = (hidden_RD @ weight_VD.to(hidden_RD.dtype).T).to(wide(hidden_RD.dtype))
    if bias_V is not None:
        logits_RV += bias_V
    if scale != 1.0:
        logits_RV *= scale
    return softcap * torch.tanh(logits_RV / softcap) if softcap else logits_RV


class _HeadLogps(torch.autograd.Function):
    """Chunked projection and log-softmax; gradients of soft-max minus one-hot, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_R: Tensor,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if torch.is_autocast_enabled(hidden_RD.device.type):
            hidden_RD = hidden_RD.to(torch.get_autocast_dtype(hidden_RD.device.type))
        weight = weight_VD.to(hidden_RD.dtype)
        dtype = wide(hidden_RD.dtype)
        width, device = weight.shape[0] * dtype.itemsize, hidden_RD.device.type
        rows = chunk_rows(width, device)
        # inside forward gradients are off, and weights ask for one while scoring, too
        training = ctx.needs_input_grad[0]
        budget = KEEP_BYTES.get(device, KEEP_BYTES["cuda"]) if training else 0
        logps, log_sums, kept, collisions = [], [], [], []
        sampled = hidden_RD.new_zeros(3, dtype=dtype) if training else None
        begin = 0
        for chunk_RD, target in zip(hidden_RD.split(rows), target_R.split(rows), strict=True):
            logits_RV = _logits(chunk_RD, weight, bias_V, scale, softcap)
            log_sum_R = torch.cat([part.logsumexp(dim=1) for part in logits_RV.split(64)])
            logps.append(logits_RV.gather(1, target.unsqueeze(1)).squeeze(1) - log_sum_R)
            log_sums.append(log_sum_R)
            collisions.append(log_collisions(logits_RV, log_sum_R))
            if sampled is not None:
                some = [p - begin for p in sampled_positions(begin, begin + len(target))]
                sampled += sampled_statistics(logits_RV[some], log_sum_R[some], target[some])
            begin += len(target)
            if begin * width <= budget:
                kept.append(logits_RV)
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, target_R, torch.cat(log_sums))
        ctx.scale, ctx.softcap, ctx.rows = scale, softcap, rows
        ctx.kept, ctx.spent = kept[::-1], False
        known = [c for c in collisions if c is not None]
        collided = torch.cat(known) if known else None
        ctx.mark_non_differentiable(*(t for t in (sampled, collided) if t is not None))
        return torch.cat(logps), sampled, collided

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad_R = grad_outputs[0]
        if ctx.spent:
            raise RuntimeError("the logits were used up by an earlier backward")
        ctx.spent = True
        hidden_RD, weight_VD, bias_V, target_R, log_sum_R = ctx.saved_tensors
        weight = weight_VD.to(hidden_RD.dtype)
        dtype = wide(hidden_RD.dtype)
        grad_hidden = torch.empty_like(hidden_RD)
        grad_weight: Tensor | None = None
        grad_bias = (
            torch.zeros_like(bias_V, dtype=dtype)
            if bias_V is not None and ctx.needs_input_grad[2]
            else None
        )
        for start in range(0, hidden_RD.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            chunk_RD = hidden_RD[part]
            logits_RV = (
                ctx.kept.pop()
                if ctx.kept
                else _logits(chunk_RD, weight, bias_V, ctx.scale, ctx.softcap)
            )
            slope = 1 - (logits_RV / ctx.softcap) ** 2 if ctx.softcap else None
            delta_RV = logits_RV.sub_(log_sum_R[part].unsqueeze(1)).exp_().neg_()
            delta_RV.scatter_add_(1, target_R[part].unsqueeze(1), torch.ones_like(delta_RV[:, :1]))
            delta_RV *= grad_R[part].unsqueeze(1) * ctx.scale
            if slope is not None:
                delta_RV *= slope
            if grad_bias is not None:
                grad_bias += delta_RV.sum(dim=0)
            delta_RV = delta_RV.to(hidden_RD.dtype)
            grad_hidden[part] = delta_RV @ weight
            if not ctx.needs_input_grad[1]:
                continue
            # bfloat16 sums over thousands of tokens lose the small ones
            if grad_weight is None:
                grad_weight = (delta_RV.T @ chunk_RD).to(dtype)
            elif delta_RV.dtype == dtype:
                grad_weight.addmm_(delta_RV.T, chunk_RD)
            else:
                grad_weight += delta_RV.T @ chunk_RD
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
            None,
            None,
            None,
        )
