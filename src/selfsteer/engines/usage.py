"""What a run has asked of a server: counts in a file of the run folder."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict  # pydantic asks for this one on Python 3.11

from selfsteer.data.artifacts import read_json
from selfsteer.data.jsonl import write_atomic
from selfsteer.recipe.sections import Price

#: What is counted of all requests; those that failed for good are counted by their reason.
COUNTED = ("requests", "retried", "prompt_tokens", "completion_tokens")

#: What of those tokens was asked in batches; stored where there are any.
BATCHED = ("batch_prompt_tokens", "batch_completion_tokens")

#: Seconds between two writings of the counts, at most while a server is asked.
SAVE_EVERY_S = 2.0


def as_stored(counts: Counter[str], price: Price | None = None) -> dict[str, Any]:
    """Counts as they stand in files and in the ledger: the reasons of failures under ``failed``.

    Where the price is known, ``cost`` is in its currency.
    """
    reasons = sorted((+counts).keys() - {*COUNTED, *BATCHED})
    known = (*COUNTED, *(n for n in BATCHED if counts[n]))
    cost = {} if price is None else {"cost": round(price.of(counts), 6)}
    return {**{n: counts[n] for n in known}, "failed": {n: counts[n] for n in reasons}, **cost}


class Kept(TypedDict, total=False):
    """What the file holds, as `as_stored` writes it."""

    requests: int
    retried: int
    prompt_tokens: int
    completion_tokens: int
    batch_prompt_tokens: int
    batch_completion_tokens: int
    batches: list[str]
    failed: Required[dict[str, int]]
    cost: float


class Usage:
    """Counts of a run's requests to a server, over all its stages and tries.

    Args:
        path: file that keeps the counts; None keeps them in memory.
        price: per million tokens; None if it is not known.
    """

    def __init__(self, path: Path | None = None, price: Price | None = None) -> None:
        kept: Any = {"failed": {}}
        if path and path.exists():
            kept = read_json(Kept, path)
        #: what the counts in the file came to, at the price of then
        self.cost: float | None = kept.pop("cost", None)
        #: marks of the batches that are counted
        self.batches = set(kept.pop("batches", ()))
        self.counts = Counter[str](kept.pop("failed") | kept)
        self.path, self.price = path, price
        #: tokens that requests under way may still use
        self.under_way = 0
        self._before, self._saved = self.counts.copy(), time.monotonic()
        self._stored: dict[str, Any] = {}

    @property
    def here(self) -> Counter[str]:
        """Counts since this object was made."""
        return self.counts - self._before

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Adds the tokens of a reply."""
        self.counts["prompt_tokens"] += prompt_tokens
        self.counts["completion_tokens"] += completion_tokens

    def save(self, *, now: bool = False) -> None:
        """Writes the counts if there is anything new, every other second or now."""
        if self.path is not None and (now or time.monotonic() - self._saved > SAVE_EVERY_S):
            batches = {"batches": sorted(self.batches)} if self.batches else {}
            stored = as_stored(self.counts, self.price) | batches
            if stored != self._stored:
                write_atomic(self.path, json.dumps(stored) + "\n")
                self._stored, self._saved = stored, time.monotonic()
