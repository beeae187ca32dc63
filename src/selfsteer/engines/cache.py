"""The cache of the transformers engine: layers with room to grow, filled row by row."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

#: Stands where a layer has no cache of its own; transformers 5.17 has no such class.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room to grow.

    ``DynamicLayer`` copies the whole cache at every token, which on a CPU was half of all
    sampling time; here a token is written after the others, and a copy is made once per GROW.
    Sliding windows are kept whole as well: the model's mask hides what is out of sight.
    """

    GROW = 64
    keys: Any  # None until something is there
    values: Any
    _room: tuple[Tensor, ...]

    def hold(self, room: Iterable[Tensor], used: int) -> None:
        """Takes keys and values, (B, H, T, D) each; the first ``used`` tokens are there."""
        self._room = keys, values = tuple(room)
        self.keys, self.values = keys[:, :, :used], values[:, :, :used]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends along the sequence; returns all keys and values, (B, H, T, D) each."""
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        if not used or end > self._room[0].shape[-2]:
            grown = [
                new.new_empty((*new.shape[:2], end + self.GROW, new.shape[3]))
                for new in (key_states, value_states)
            ]
            if used:
                grown[0][:, :, :used], grown[1][:, :, :used] = self.keys, self.values
            self.hold(grown, used)
        self._room[0][:, :, used:end] = key_states
        self._room[1][:, :, used:end] = value_states
        self.hold(self._room, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, and the room to grow."""
        if self.get_seq_length():
            self.hold((x[indices] for x in self._room), self.get_seq_length())

    def make_room(self, like: "RoomyLayer", rows: int, width: int) -> None:
        """Holds ``width`` tokens of zeros in each of so many rows."""
        shapes = (
            (rows, x.shape[1], width + self.GROW, x.shape[3]) for x in (like.keys, like.values)
        )
        self.hold((like.keys.new_zeros(shape) for shape in shapes), width)

    def repeat(self, other: "RoomyLayer", rows: int) -> None:
        """Begins with the one row of another layer, ``rows`` times."""
        whole = (x.expand(rows, -1, -1, -1) for x in (other.keys, other.values))
        self.hold(whole, other.get_seq_length())  # without room: appending copies

    def place(self, other: "RoomyLayer", source: int, length: int, rows: list[int]) -> None:
        """Copies ``length`` tokens of one row of another layer to the end of these rows."""
        for mine, given in ((self.keys, other.keys), (self.values, other.values)):
            mine[rows, :, mine.shape[2] - length :] = given[source, :, :length]


def roomy_cache(config: Any) -> Any:
    """An empty cache; None for a model whose cache is more than keys and values of tokens."""
    cache = DynamicCache(config=config)
    if {type(c) for c in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}:
        return None
    cache.layers = [c if type(c) is DummyLayer else RoomyLayer() for c in cache.layers]
    return cache


def keeps_tokens(model: Any) -> bool:
    """Whether the cache of a model is keys and values of tokens and nothing else."""
    return not getattr(model, "_is_stateful", False) and roomy_cache(model.config) is not None


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """About the bytes of one token's keys and values in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)


def can_share(config: Any) -> bool:
    """Whether a prompt can be computed in two parts.

    Not where rotary angles depend on the length of what is computed together (``dynamic`` and
    ``longrope`` scaling).
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return not any(part.get("rope_type") in ("dynamic", "longrope") for part in kinds)
