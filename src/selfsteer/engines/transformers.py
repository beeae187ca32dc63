"""Sampling in process with transformers: length-sorted batches that shrink as rows finish.

``generate()`` keeps decoding rows that have ended until the longest one has; here they leave the
batch and its cache. Stateful caches (state-space models) cannot give up rows, so those models go
through ``generate()``. Each row draws from the random stream of its own request.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    Advance,
    Completion,
    Request,
    SamplingParams,
    completion,
    cut,
    no_news,
    stop_ids,
)
from selfsteer.models.load import LoadedModel
from selfsteer.models.score import keeps_part

#: Rows leave the cache when this share of the batch has ended: copying it costs about a step.
COMPACT_AT = 0.125


#: Tokens tried first for the nucleus; a whole vocabulary is sorted only where they fall short.
NUCLEUS = 64


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room to grow.

    ``DynamicLayer`` copies the whole cache at every token, which on a CPU was half of all
    sampling time; here a token is written after the others, and a copy is made once per GROW.
    """

    GROW = 64

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends along the sequence; returns all keys and values, (B, H, T, D) each."""
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        room = getattr(self, "_room", None)
        if room is None or end > room[0].shape[-2] or room[0].shape[0] != key_states.shape[0]:
            room = tuple(
                new.new_empty((*new.shape[:2], end + self.GROW, new.shape[3]))
                for new in (key_states, value_states)
            )
            if used:
                room[0][:, :, :used] = self.keys
                room[1][:, :, :used] = self.values
            self._room = room
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        room[0][:, :, used:end] = key_states
        room[1][:, :, used:end] = value_states
        self.keys, self.values = room[0][:, :, :end], room[1][:, :, :end]
        return self.keys, self.values


class TransformersEngine:
    """Answers with a model that is already in memory."""

    def __init__(self, loaded: LoadedModel, batch_size: int = 32) -> None:
        self.loaded, self.batch_size = loaded, batch_size
        configured = getattr(loaded.model.generation_config, "eos_token_id", None)
        self.stop_ids = stop_ids(loaded.chat, configured)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        """See `Engine.generate`; texts are stripped of surrounding white space."""
        for batch in cut(requests, self.batch_size):
            found = self._answer(batch, sampling)
            advance(len(found), sum(c.completion_tokens for c in found))
            yield from found

    @torch.no_grad()
    def _answer(self, batch: Sequence[Request], sampling: SamplingParams) -> list[Completion]:
        """One batch, decoded together."""
        chat, limit = self.loaded.chat, self.loaded.context_length
        prompts = {r.id: chat.prompt_ids(r.messages) for r in batch}
        room = None if limit is None else limit - sampling.max_new_tokens
        fitting = [r for r in batch if room is None or len(prompts[r.id]) <= room]
        with self.loaded.evaluating():
            rows = self._decode([prompts[r.id] for r in fitting], fitting, sampling)
        drawn = {r.id: row for r, row in zip(fitting, rows, strict=True)}
        return [
            completion(name, chat, self.stop_ids, len(prompt), drawn[name])
            if name in drawn
            else Completion(name, "", PROMPT_TOO_LONG, len(prompt), 0)
            for name, prompt in prompts.items()
        ]

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        sampling: SamplingParams,
    ) -> list[list[int]]:
        """Sampled ids, a row per prompt; what follows a row's first stop token means nothing."""
        if not prompts:
            return []
        width, pad, device = max(map(len, prompts)), self.stop_ids[0], self.loaded.device
        left = [width - len(p) for p in prompts]
        ids = torch.tensor([[pad] * n + [*p] for n, p in zip(left, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in left])
        numbers_BT = streams([r.seed for r in requests], sampling.max_new_tokens)
        stateful = getattr(self.loaded.model, "_is_stateful", False)
        decode = self._whole_batch if stateful else self._shrinking_batch
        found = decode(ids.to(device), mask.to(device), sampling, numbers_BT.to(device))
        rows: list[list[int]] = found.tolist()
        return rows

    def _shrinking_batch(
        self, ids: Tensor, mask: Tensor, sampling: SamplingParams, numbers_BT: Tensor
    ) -> Tensor:
        """Rows that have ended leave the batch and its cache."""
        model, size = self.loaded.model, len(ids)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache: Any = DynamicCache(config=model.config)
        cache.layers = [RoomyLayer() if type(c) is DynamicLayer else c for c in cache.layers]
        stops = torch.tensor(self.stop_ids, device=ids.device)
        rows = torch.arange(size, device=ids.device)  # which prompt each batch row answers
        alive = torch.ones(size, dtype=torch.bool, device=ids.device)
        drawn = torch.full((size, sampling.max_new_tokens), self.stop_ids[0], device=ids.device)
        last_only = {"logits_to_keep": 1} if keeps_part(model) else {}
        for step in range(sampling.max_new_tokens):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **last_only,
            ).logits[:, -1]
            token = draw(logits.float(), sampling, numbers_BT[rows, step])
            drawn[rows, step] = token
            alive = alive & ~torch.isin(token, stops)
            living = int(alive.sum())
            if living == 0 or step + 1 == sampling.max_new_tokens:
                break
            if living <= len(alive) * (1 - COMPACT_AT):
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token, mask, positions = rows[keep], token[keep], mask[keep], positions[keep]
                alive = alive[keep]
            ids = token.unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return drawn

    def _whole_batch(
        self, ids: Tensor, mask: Tensor, sampling: SamplingParams, numbers_BT: Tensor
    ) -> Tensor:
        """Through generate() of transformers, which draws as we say."""
        width = ids.shape[1]

        def only_the_drawn(so_far: Tensor, logits_BV: Tensor) -> Tensor:
            step = so_far.shape[1] - width
            token_B = draw(logits_BV.float(), sampling, numbers_BT[:, step])
            return torch.full_like(logits_BV, -torch.inf).scatter(1, token_B.unsqueeze(1), 0.0)

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
        )
        full = self.loaded.model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([only_the_drawn]),
        )
        drawn: Tensor = full[:, width:]
        return drawn


def streams(seeds: Iterable[int], length: int) -> Tensor:
    """The first numbers of each seed's stream, uniform in [0, 1); float64, shape (B, length)."""
    numbers = np.stack([np.random.default_rng(seed).random(length) for seed in seeds])
    # the product of any mass and a number rounds to less than that mass
    return torch.from_numpy(numbers * (1 - 2.0**-52))


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
    probs_BV = (logits_BV / sampling.temperature).softmax(dim=-1)
    if sampling.top_p >= 1:
        return _inverse(probs_BV, uniform_B)
    top_BK, index_BK = probs_BV.topk(min(NUCLEUS, probs_BV.shape[1]), dim=-1)
    token_B = _from_nucleus(top_BK, index_BK, sampling.top_p, uniform_B)
    short = (top_BK.sum(dim=-1) < sampling.top_p).nonzero().squeeze(1)
    if len(short):
        ordered = probs_BV[short].sort(dim=-1, descending=True, stable=True)
        token_B[short] = _from_nucleus(*ordered, sampling.top_p, uniform_B[short])
    return token_B


def _from_nucleus(top_BK: Tensor, index_BK: Tensor, top_p: float, uniform_B: Tensor) -> Tensor:
    """A token per row from descending probabilities and the tokens that have them."""
    before_BK = top_BK.cumsum(dim=-1) - top_BK
    place_B = _inverse(top_BK.masked_fill(before_BK >= top_p, 0.0), uniform_B)
    return index_BK.gather(1, place_B.unsqueeze(1)).squeeze(1)


def _inverse(weights_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """The place per row where the cumulative weight first exceeds that share of the whole."""
    mass_BK = weights_BK.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = uniform_B.unsqueeze(1) * mass_BK[:, -1:]
    return torch.searchsorted(mass_BK, target_B1, right=True).squeeze(1)
