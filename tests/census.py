"""How many records are in memory at once."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import batched, dump_lines, write_atomic
from selfsteer.data.records import Preference, Query, Triple

RECORDS = 150
SHARD = 10


def line(number: int) -> dict[str, Any]:
    """A triple with everything in it."""
    return {
        "id": f"q{number:04d}",
        "messages": [{"role": "user", "content": f"What is the colour of number {number}?"}],
        "principles": {"good": "Be true.", "bad": "Be false.", "features": ["Accuracy"]},
        "responses": {
            "plain": f"It may be {number}.",
            "good": f"It is green, as number {number} should be.",
            "bad": f"It is a smell of {number}.",
        },
    }


def write_shards(folder: Path) -> Path:
    """A folder of shards with `RECORDS` triples."""
    for number, part in enumerate(batched(map(line, range(RECORDS)), 64)):
        write_atomic(folder / f"shard-{number:05d}.jsonl", dump_lines(part))
    return folder


class Census:
    """How many of the records that were made are still there, at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.alive = self.most = 0
        for kind in (Query, Triple, Preference):
            monkeypatch.setattr(kind, "__post_init__", self._counting(kind.__post_init__))

    def _counting(self, check: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(record: Any) -> None:
            check(record)
            self.made += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(record, self._gone)

        return counted

    def _gone(self) -> None:
        self.alive -= 1


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    gc.collect()
    gc.disable()
    yield Census(monkeypatch)
    gc.enable()
