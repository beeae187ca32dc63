"""What many readers of the live page cost: turns, and one reading for all."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.report import server
from selfsteer.report.server import LONGEST, MOST_A_SECOND, NEXT, Shared, Turns


def test_a_few_pages_ask_every_two_seconds_and_many_take_turns() -> None:
    turns = Turns()
    assert turns.next(100.0) == NEXT
    assert turns.next(101.0) == NEXT, "the same page, or another one"
    waits = [turns.next(200.0) for _ in range(200)]
    assert waits[0] == NEXT
    assert waits[-1] == pytest.approx(NEXT + 199 / MOST_A_SECOND)
    assert sorted(waits) == waits
    assert turns.next(300.0) == NEXT, "they have gone"
    for _ in range(1000):  # one that asks without a pause delays the others by so much at most
        assert turns.next(200.0) <= LONGEST


def test_a_run_is_read_once_for_all_who_look(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def now(path: Path) -> dict[str, Any]:
        read.append(path)
        return {"number": len(read)}

    shared, one, other = Shared(now), Path("one"), Path("other")
    found = [shared(one), shared(one), shared(other)]
    assert [json.loads(f)["number"] for f in found] == [1, 1, 2]
    monkeypatch.setattr(server, "FRESH", -1.0)
    assert json.loads(shared(one)) == {"number": 3}
