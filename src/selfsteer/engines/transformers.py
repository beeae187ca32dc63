"""Sampling in process with transformers: prompts computed without waste, batches that shrink.

What all prompts of a batch begin with is computed once, and so are equal prompts. ``generate()``
keeps decoding rows that have ended until the longest one has; here they leave the batch and its
cache. Stateful caches (state-space models) can neither share prompts nor give up rows, so those
models go through ``generate()``. Each row draws from the random stream of its own request.

An answer that is written by contrast has a second row, its other context, which gets the same
tokens. Those rows come last, in the order of their requests.

Shape legend: B requests or rows, R some or more of them, V vocabulary, K candidates, N blocks.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList

from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    Advance,
    Completion,
    Request,
    SamplingParams,
    completion,
    cut,
    no_news,
    refusals,
    stop_ids,
)
from selfsteer.engines.cache import can_share, keeps_tokens, roomy_cache, token_bytes
from selfsteer.errors import NumericsError, named
from selfsteer.models.finite import ADVICE
from selfsteer.models.load import LoadedModel, stop_tokens
from selfsteer.models.score import keeps_part

#: Token ids of a prompt, or of a part of one.
Ids = tuple[int, ...]

#: Rows leave the cache when this share of the batch has ended: copying it costs about a step.
COMPACT_AT = 0.125

#: Prompts are computed together if the shortest has this share of the longest one's tokens, or
#: if they are fewer than so many tokens; saving fewer tokens is not worth a forward either.
ALIKE, FEW_TOKENS = 0.8, 256

#: Keys and values of what is decoded together may take this share of a CPU's memory.
CACHE_SHARE = 0.25

#: Tokens tried for the nucleus; a whole vocabulary is sorted only for rows where they fall short.
NUCLEUS = (64, 1024)

#: Without a nucleus, tokens are drawn in two steps: a block of this many, then one of its tokens.
BLOCK = 64

#: Temperatures and nuclei below it are taken for it: float32 would round some of them to 0.
LEAST = 1e-30

#: The largest share below 1: the product of any mass and it rounds to less than that mass.
BELOW_ONE = 1 - 2.0**-52


class Batch(NamedTuple):
    """What is decoded together.

    Args:
        prompts: of each row: one of every request, then the other contexts of some.
        owner_R: the request that each row belongs to; ascending among either kind.
        ratio_B: of each request's contrast; 0 without one.
        numbers_BT: the random stream of each request.
        ids: of the requests.
    """

    prompts: Sequence[Ids]
    owner_R: Tensor
    ratio_B: Tensor
    numbers_BT: Tensor
    ids: Sequence[str]

    def check(self, logits_RV: Tensor, rows: Tensor) -> None:
        """Refuses logits that no token can be drawn from.

        Raises:
            NumericsError: names the requests.
        """
        # NaN and +inf pass through a maximum, and -inf is one where no token is left
        bad_R = ~logits_RV.amax(dim=-1).isfinite()
        if bool(bad_R.any()):
            whose = named(self.ids[i] for i in rows[bad_R].tolist())
            raise NumericsError(f"The logits became NaN or infinite on {whose}. {ADVICE}")


class TransformersEngine:
    """Answers with a model that is already in memory.

    A batch that is too large for the memory is decoded in parts: on a GPU in halves; on a CPU,
    where the system would end the process, in as many as answers of full length would need.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int = 32) -> None:
        self.loaded, self.batch_size = loaded, batch_size
        configured = getattr(loaded.model.generation_config, "eos_token_id", None)
        self.stop_ids = stop_ids(loaded.chat, stop_tokens(loaded.source, configured))

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        """See `Engine.generate`; texts are stripped of surrounding white space.

        Raises:
            NumericsError: the model's logits are NaN or infinite; names the requests.
        """
        for batch in cut(requests, self.batch_size):
            told: list[int] = []

            def news(items: int, tokens: int, told: list[int] = told) -> None:
                told.append(tokens)
                advance(items, tokens)

            found = self._answer(batch, sampling, news)
            advance(len(found), sum(c.completion_tokens for c in found) - sum(told))
            yield from found

    @torch.no_grad()
    def _answer(
        self, batch: Sequence[Request], sampling: SamplingParams, news: Advance
    ) -> list[Completion]:
        """One batch, decoded together if there is room."""
        chat, limit = self.loaded.chat, self.loaded.context_length
        refused = refusals(chat, batch)
        batch = [r for r in batch if r.id not in refused]
        prompts = {r.id: chat.prompt_ids(r.messages) for r in batch}
        others = {r.id: chat.prompt_ids(r.contrast.messages) for r in batch if r.contrast}
        room = None if limit is None else limit - sampling.max_new_tokens
        fitting = [
            r
            for r in batch
            if room is None or max(len(prompts[r.id]), len(others.get(r.id, ()))) <= room
        ]
        drawn: dict[str, list[int]] = {}
        todo = self._parts(prompts, others, fitting, sampling)[::-1]
        with self.loaded.evaluating():
            while todo:
                part = todo.pop()
                try:
                    rows = self._decode(prompts, others, part, sampling, news)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                else:
                    drawn |= {r.id: row for r, row in zip(part, rows, strict=True)}
                    continue
                # only here is the error gone, whose traceback held on to the tensors
                half = len(part) // 2
                todo += [part[half:], part[:half]]
                torch.cuda.empty_cache()
        answered = (
            completion(name, chat, self.stop_ids, len(prompt), drawn[name])
            if name in drawn
            else Completion(name, "", PROMPT_TOO_LONG, len(prompt), 0)
            for name, prompt in prompts.items()
        )
        return [*refused.values(), *answered]

    def _parts(
        self,
        prompts: Mapping[str, Ids],
        others: Mapping[str, Ids],
        requests: Sequence[Request],
        sampling: SamplingParams,
    ) -> list[list[Request]]:
        """What a CPU's memory has room for together, in order; all of them on other devices."""
        model = self.loaded.model
        if self.loaded.device.type != "cpu" or not keeps_tokens(model):
            return [list(requests)]
        room = CACHE_SHARE * psutil.virtual_memory().total / token_bytes(model.config, model.dtype)
        parts: list[list[Request]] = []
        rows = longest = 0
        for request in requests:
            contexts = [ids[request.id] for ids in (prompts, others) if request.id in ids]
            rows += len(contexts)
            longest = max(longest, *map(len, contexts))
            if not parts or rows * (longest + sampling.max_new_tokens) > room:
                parts.append([])
                rows, longest = len(contexts), max(map(len, contexts))
            parts[-1].append(request)
        return parts

    def _decode(
        self,
        prompts: Mapping[str, Ids],
        others: Mapping[str, Ids],
        requests: Sequence[Request],
        sampling: SamplingParams,
        news: Advance,
    ) -> list[list[int]]:
        """Sampled ids of each request; what follows its first stop token means nothing."""
        if not requests:
            return []
        model, device = self.loaded.model, self.loaded.device
        pushed = [i for i, r in enumerate(requests) if r.id in others]
        batch = Batch(
            [prompts[r.id] for r in requests] + [others[requests[i].id] for i in pushed],
            torch.tensor([*range(len(requests)), *pushed], device=device),
            torch.tensor([r.contrast.ratio if r.contrast else 0.0 for r in requests]).to(device),
            streams([r.seed for r in requests], sampling.max_new_tokens).to(device),
            [r.id for r in requests],
        )
        if keeps_tokens(model):
            drawn = self._shrinking_batch(batch, sampling, news)
        else:
            drawn = self._whole_batch(batch, sampling)
        rows: list[list[int]] = drawn.tolist()
        return rows

    def _shrinking_batch(self, batch: Batch, sampling: SamplingParams, news: Advance) -> Tensor:
        """Rows that have ended leave the batch and its cache; tokens are reported as drawn."""
        prompts, rows = batch.prompts, batch.owner_R  # rows: which request each belongs to
        budget, device = sampling.max_new_tokens, self.loaded.device
        cache = self._prefill(prompts)
        length_B1 = torch.tensor([[len(p)] for p in prompts], device=device)
        width = int(length_B1.max())
        mask = torch.arange(width, device=device) >= width - length_B1
        mask = pad(mask.long(), (0, budget), value=1)
        token = torch.tensor([p[-1] for p in prompts], device=device)
        stops = torch.tensor(self.stop_ids, device=device)
        answering = len(batch.numbers_BT)
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        drawn = torch.full((answering, budget), self.stop_ids[0], device=device)
        for step in range(budget):
            at = length_B1 - 1 + step
            logits = self._logits(token.unsqueeze(1), mask[:, : width + step], at, cache)
            batch.check(logits, rows)
            token = next_tokens(
                logits, rows, batch.ratio_B, sampling, batch.numbers_BT[rows[:answering], step]
            )
            drawn[rows, step] = token
            before, alive = alive, alive & ~torch.isin(token, stops)
            # together: a GPU is waited for once
            tokens, living = torch.stack([before[:answering].sum(), alive.sum()]).tolist()
            # answers are reported with the batch: the first to end do not tell the time left
            news(0, tokens)
            if living == 0:
                break
            if living <= len(alive) * (1 - COMPACT_AT):
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                answering = int(alive[:answering].sum())
                rows, token, mask, alive = rows[keep], token[keep], mask[keep], alive[keep]
                length_B1 = length_B1[keep]
        return drawn

    def _prefill(self, prompts: Sequence[Ids]) -> Any:
        """Keys and values of all prompts without their last tokens, ending together, else 0."""
        rows: dict[Ids, list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows.setdefault(prompt[:-1], []).append(i)
        heads = sorted(rows, key=len, reverse=True)
        config = self.loaded.model.config
        shared = common(heads) if can_share(config) else ()
        if len(shared) * (len(heads) - 1) < FEW_TOKENS:
            shared = ()
        begun = self._extended(roomy_cache(config), [shared])
        cache = roomy_cache(config)
        for group in alike(heads, len(shared)):
            part = self._extended(begun, [h[len(shared) :] for h in group])
            for layer, given in zip(cache.layers, part.layers, strict=True):
                if not given.is_initialized:
                    continue
                if not layer.is_initialized:
                    layer.make_room(given, len(prompts), len(heads[0]))
                for source, head in enumerate(group):
                    layer.place(given, source, len(head), rows[head])
        return cache

    def _extended(self, begun: Any, rows: Sequence[Ids]) -> Any:
        """A cache of rows that all go on from the one row of another, padded on the right.

        No token sees what follows it, so padding changes nothing but what is cached of it.
        """
        cache, device = roomy_cache(self.loaded.model.config), self.loaded.device
        for layer, given in zip(cache.layers, begun.layers, strict=True):
            if given.is_initialized:
                layer.repeat(given, len(rows))
        seen, width = cache.get_seq_length(), max(map(len, rows))
        if width:
            ids = [[*r, *[self.stop_ids[0]] * (width - len(r))] for r in rows]
            mask = torch.ones(len(rows), seen + width, dtype=torch.long, device=device)
            at = torch.arange(seen, seen + width, device=device).expand(len(rows), -1)
            self._logits(torch.tensor(ids, device=device), mask, at, cache)
        return cache

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits after the last token of each row, (B, V); the cache grows."""
        model = self.loaded.model
        last_only = {"logits_to_keep": 1} if keeps_part(model) else {}
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _whole_batch(self, batch: Batch, sampling: SamplingParams) -> Tensor:
        """Through generate() of transformers, which draws as we say."""
        prompts, numbers_BT = batch.prompts, batch.numbers_BT
        width, device = max(map(len, prompts)), self.loaded.device
        ids = [[*[self.stop_ids[0]] * (width - len(p)), *p] for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]

        def only_the_drawn(so_far: Tensor, logits_RV: Tensor) -> Tensor:
            step = so_far.shape[1] - width
            batch.check(logits_RV, batch.owner_R)
            token_R = next_tokens(
                logits_RV, batch.owner_R, batch.ratio_B, sampling, numbers_BT[:, step]
            )
            return torch.full_like(logits_RV, -torch.inf).scatter(1, token_R.unsqueeze(1), 0.0)

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
        )
        full = self.loaded.model.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            logits_processor=LogitsProcessorList([only_the_drawn]),
        )
        drawn: Tensor = full[: len(numbers_BT), width:]
        return drawn


def common(heads: Collection[Ids]) -> Ids:
    """What all of them begin with."""
    first, last = min(heads), max(heads)
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), len(first))]


def alike(heads: Sequence[Ids], shared: int) -> Iterator[list[Ids]]:
    """Prompts in groups that are computed together, padded to the longest.

    Args:
        heads: from the longest to the shortest.
        shared: tokens of each that need no computing.
    """
    group: list[Ids] = []
    for head in heads:
        longest = len(group[0]) - shared if group else 0
        if len(head) - shared < ALIKE * longest and len(group) * longest >= FEW_TOKENS:
            yield group
            group = []
        group.append(head)
    yield group


def streams(seeds: Iterable[int], length: int) -> Tensor:
    """The first numbers of each seed's stream, uniform in [0, 1); float64, shape (B, length)."""
    numbers = np.stack([np.random.default_rng(seed).random(length) for seed in seeds])
    return torch.from_numpy(numbers * BELOW_ONE)


def next_tokens(
    logits_RV: Tensor,
    owner_R: Tensor,
    ratio_B: Tensor,
    sampling: SamplingParams,
    uniform_B: Tensor,
) -> Tensor:
    """A token per row, shape (R,); other contexts get the token of the answer pushed from them.

    Args:
        logits_RV: next-token logits of the rows that answer, then of the other contexts.
        owner_R: the request of each row, ascending among either kind.
        ratio_B: of each request.
        sampling: temperature and nucleus.
        uniform_B: a number in [0, 1) for each row that answers, float64.
    """
    size = len(uniform_B)
    here_BV, there_RV = logits_RV.float().split([size, len(logits_RV) - size])
    token_B = draw(here_BV, sampling, uniform_B)
    if not len(there_RV):
        return token_B
    pushed_R = torch.searchsorted(owner_R[:size], owner_R[size:])
    ratio_R1 = ratio_B[owner_R[size:]].unsqueeze(1)
    logits_RV = contrast_step(here_BV[pushed_R], there_RV, ratio_R1, sampling)
    token_B[pushed_R] = draw(logits_RV, replace(sampling, top_p=1.0), uniform_B[pushed_R])
    return torch.cat([token_B, token_B[pushed_R]])


def contrast_step(
    here_BV: Tensor, there_BV: Tensor, ratio_B1: Tensor, sampling: SamplingParams
) -> Tensor:
    """Next-token logits pushed from one context towards another, shape (B, V).

    z = (1 + r) · z(·|here) − r · z(·|there), after Linear Alignment (arXiv 2401.11458): −inf
    outside the nucleus of the context here, so that no token is chosen only because the other
    context dislikes it. Tokens as likely as the last one of the nucleus are in it too.

    Args:
        here_BV: logits in the context that is answered.
        there_BV: logits in the other context, after the same tokens.
        ratio_B1: r of each row; 0 changes nothing, below 0 mixes the two.
        sampling: temperature and mass of the nucleus. At temperature 0, where the nucleus would
            be one token, that of temperature 1 is taken.
    """
    probs_BV = (here_BV / max(sampling.temperature or 1.0, LEAST)).softmax(dim=-1)
    size = probs_BV.shape[1]
    for width in (*(n for n in NUCLEUS if n < size), size):
        top_BK = probs_BV.topk(width, dim=-1).values
        if width == size or bool((top_BK.sum(dim=-1) >= sampling.top_p).all()):
            break
    beyond_BK = top_BK.cumsum(dim=-1) - top_BK >= max(sampling.top_p, LEAST)
    least_B1 = top_BK.masked_fill(beyond_BK, torch.inf).amin(dim=-1, keepdim=True)
    pushed_BV = here_BV + ratio_B1 * (here_BV - there_BV)
    return pushed_BV.masked_fill(probs_BV < least_B1, -torch.inf)


def draw(logits_BV: Tensor, sampling: SamplingParams, uniform_B: Tensor) -> Tensor:
    """One token per row, shape (B,): temperature, then the smallest nucleus of mass ≥ top_p.

    Greedy at temperature 0. The most likely token is always in the nucleus. Each row is drawn by
    the inverse of its own cumulative distribution, so that other rows have no say in it.

    Args:
        logits_BV: next-token logits.
        sampling: temperature and nucleus.
        uniform_B: a number in [0, 1) for each row, float64.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = (logits_BV / max(sampling.temperature, LEAST)).softmax(dim=-1)
    if sampling.top_p >= 1:
        return _from_blocks(probs_BV, uniform_B)
    token_B = torch.empty_like(uniform_B, dtype=torch.long)
    row_R = torch.arange(len(token_B), device=token_B.device)
    size = probs_BV.shape[1]
    for width in (*(n for n in NUCLEUS if n < size), size):
        if width < size:
            top_RK, index_RK = probs_BV.topk(width, dim=-1)
        else:
            top_RK, index_RK = probs_BV.sort(dim=-1, descending=True, stable=True)
        top_p = max(sampling.top_p, LEAST)
        token_B[row_R] = _from_nucleus(top_RK, index_RK, top_p, uniform_B)
        short_R = top_RK.sum(dim=-1) < sampling.top_p
        if not bool(short_R.any()):
            break
        probs_BV, row_R, uniform_B = probs_BV[short_R], row_R[short_R], uniform_B[short_R]
    return token_B


def _from_nucleus(top_BK: Tensor, index_BK: Tensor, top_p: float, uniform_B: Tensor) -> Tensor:
    """A token per row from descending probabilities and the tokens that have them."""
    before_BK = top_BK.cumsum(dim=-1) - top_BK
    place_B = _inverse(top_BK.masked_fill(before_BK >= top_p, 0.0), uniform_B)
    return index_BK.gather(1, place_B.unsqueeze(1)).squeeze(1)


def _from_blocks(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """What `_inverse` finds, without summing up the whole vocabulary in float64."""
    blocks_BNK = pad(probs_BV, (0, -probs_BV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    mass_BN = blocks_BNK.sum(dim=-1, dtype=torch.float64)
    block_B = _inverse(mass_BN, uniform_B)
    row_B = torch.arange(len(probs_BV), device=probs_BV.device)
    before_B = mass_BN.cumsum(dim=-1)[row_B, block_B] - mass_BN[row_B, block_B]
    rest_B = (uniform_B * mass_BN.sum(dim=-1) - before_B) / mass_BN[row_B, block_B]
    inside_B = _inverse(blocks_BNK[row_B, block_B], rest_B.clamp(0.0, BELOW_ONE))
    return block_B * BLOCK + inside_B


def _inverse(weights_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """The place per row where the cumulative weight first exceeds that share of the whole."""
    mass_BK = weights_BK.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = uniform_B.unsqueeze(1) * mass_BK[:, -1:]
    return torch.searchsorted(mass_BK, target_B1, right=True).squeeze(1)
