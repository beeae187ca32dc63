"""What a run has asked of a server: counts in a file of the run folder."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import write_atomic

#: What is counted of all requests; those that failed for good are counted by their reason.
COUNTED = ("requests", "retried", "prompt_tokens", "completion_tokens")

#: Seconds between two writings of the counts.
SAVE_EVERY_S = 2.0


def as_stored(counts: Counter[str]) -> dict[str, Any]:
    """Counts as they stand in files and in the ledger: the reasons of failures under ``failed``."""
    reasons = sorted((+counts).keys() - set(COUNTED))
    return {**{n: counts[n] for n in COUNTED}, "failed": {n: counts[n] for n in reasons}}


class Usage:
    """Counts of a run's requests to a server, over all its stages and tries.

    Args:
        path: file that keeps the counts; None keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        kept = json.loads(path.read_bytes()) if path and path.exists() else {"failed": {}}
        self.counts = Counter[str](kept.pop("failed") | kept)
        self.path = path
        #: tokens that requests under way may still use
        self.under_way = 0
        self._before, self._saved = self.counts.copy(), time.monotonic()

    @property
    def here(self) -> Counter[str]:
        """Counts since this object was made."""
        return self.counts - self._before

    def save(self, *, now: bool = False) -> None:
        """Writes the counts, every other second or now."""
        if self.path is not None and (now or time.monotonic() - self._saved > SAVE_EVERY_S):
            write_atomic(self.path, json.dumps(as_stored(self.counts)) + "\n")
            self._saved = time.monotonic()
