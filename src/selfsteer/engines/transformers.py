"""Sampling in process with transformers: length-sorted batches that shrink as rows finish.

``generate()`` keeps decoding rows that have ended until the longest one has; here they leave the
batch and its cache. Stateful caches (state-space models) cannot give up rows, so those models go
through ``generate()``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from selfsteer.data.records import Message
from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    Advance,
    Completion,
    SamplingParams,
    completion,
    no_news,
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
    sampling time; here a token is written behind the others, and a copy is made once per GROW.
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
        self.loaded = loaded
        self.batch_size = batch_size
        stops = {loaded.chat.end_of_turn}
        configured = getattr(loaded.model.generation_config, "eos_token_id", None)
        if configured is not None:
            stops |= set(configured if isinstance(configured, list) else [configured])
        self.stop_ids = sorted(stops)

    @torch.no_grad()
    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: SamplingParams,
        seed: int,
        advance: Advance = no_news,
    ) -> list[Completion]:
        """See `Engine.generate`; texts are stripped of surrounding white space."""
        model, chat = self.loaded.model, self.loaded.chat
        prompts = [chat.prompt_ids(c) for c in conversations]
        limit = self.loaded.context_length
        rng = torch.Generator(device=self.loaded.device).manual_seed(seed)
        out: list[Completion | None] = [None] * len(prompts)
        for i, prompt in enumerate(prompts):
            if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
                out[i] = Completion("", PROMPT_TOO_LONG, len(prompt), 0)
        fitting = [i for i, c in enumerate(out) if c is None]
        if len(fitting) < len(prompts):
            advance(len(prompts) - len(fitting), 0)
        order = sorted(fitting, key=lambda i: len(prompts[i]), reverse=True)
        was_training = model.training
        model.eval()
        decode = self._generate if getattr(model, "_is_stateful", False) else self._decode
        try:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                with self.loaded.precision():
                    answers = decode([prompts[i] for i in rows], sampling, rng)
                for i, ids in zip(rows, answers, strict=True):
                    out[i] = completion(chat, self.stop_ids, len(prompts[i]), ids)
                advance(len(rows), sum(map(len, answers)))
        finally:
            model.train(was_training)
        return [c for c in out if c is not None]

    def _left_pad(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        pad = self.stop_ids[0]
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        return ids.to(self.loaded.device), mask.to(self.loaded.device)

    def _decode(
        self, prompts: list[tuple[int, ...]], sampling: SamplingParams, rng: torch.Generator
    ) -> list[list[int]]:
        """Token ids of each answer, the stop token included where one was sampled."""
        model = self.loaded.model
        ids, mask = self._left_pad(prompts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache: Any = DynamicCache(config=model.config)
        cache.layers = [RoomyLayer() if type(c) is DynamicLayer else c for c in cache.layers]
        stops = torch.tensor(self.stop_ids, device=ids.device)
        rows = torch.arange(len(prompts), device=ids.device)  # which prompt each batch row answers
        alive = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
        steps: list[tuple[Tensor, Tensor]] = []
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
            token = draw(logits.float(), sampling, rng)
            steps.append((rows[alive], token[alive]))
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
        answers: list[list[int]] = [[] for _ in prompts]
        for row, token in steps:
            for r, t in zip(row.tolist(), token.tolist(), strict=True):
                answers[r].append(t)
        return answers

    def _generate(
        self, prompts: list[tuple[int, ...]], sampling: SamplingParams, rng: torch.Generator
    ) -> list[list[int]]:
        ids, mask = self._left_pad(prompts)
        greedy = sampling.temperature == 0
        config = GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
        )
        with torch.random.fork_rng():  # generate() draws from the global generator only
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
            full = self.loaded.model.generate(ids, attention_mask=mask, generation_config=config)
        answers = []
        for row in full[:, ids.shape[1] :].tolist():
            end = next((i for i, t in enumerate(row) if t in self.stop_ids), len(row) - 1)
            answers.append(row[: end + 1])
        return answers


def draw(logits_BV: Tensor, sampling: SamplingParams, rng: torch.Generator) -> Tensor:
    """One token per row, shape (B,): temperature, then the smallest nucleus of mass ≥ top_p.

    Greedy at temperature 0. The most likely token is always in the nucleus.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = (logits_BV / sampling.temperature).softmax(dim=-1)
    if sampling.top_p >= 1:
        return torch.multinomial(probs_BV, 1, generator=rng).squeeze(1)
    width = min(NUCLEUS, probs_BV.shape[1])
    top_BV, index_BV = probs_BV.topk(width, dim=-1)
    if bool((top_BV.sum(dim=-1) < sampling.top_p).any()):
        top_BV, index_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = top_BV.cumsum(dim=-1) - top_BV
    top_BV = top_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    choice = torch.multinomial(top_BV, 1, generator=rng)
    return index_BV.gather(1, choice).squeeze(1)
