"""How many requests at once: found out by servers that are simulated event by event."""

import heapq
from collections.abc import Callable

import pytest

from selfsteer.engines.pace import FIRST, Pace, Sent


def ask(
    pace: Pace, count: int, seconds: Callable[[int], float], room: float = float("inf")
) -> tuple[int, float]:
    """Has a server answer so many requests, as many at once as the pace allows.

    Args:
        pace: decides.
        count: of answers.
        seconds: that an answer takes by the requests under way when it is sent.
        room: requests above that are refused, after a tenth of a second.

    Returns:
        How many requests were refused, and the seconds of everything.
    """
    now, under_way, refused, answers = 0.0, 0, 0, 0
    events: list[tuple[float, int, bool, Sent, float]] = []
    number = 0
    while answers < count:
        while under_way < pace.limit:
            under_way, number = under_way + 1, number + 1
            kept, sent = under_way <= room, pace.sent(under_way)
            took = seconds(under_way) if kept else 0.1
            heapq.heappush(events, (now + took, number, kept, sent, took))
        now, _, kept, sent, took = heapq.heappop(events)
        under_way -= 1
        if kept:
            answers += 1
            pace.answered(sent, took)
        else:
            refused += 1
            pace.refused(sent)
    return refused, now


def test_a_server_that_batches_gets_all_that_is_allowed() -> None:
    pace = Pace(256)
    assert pace.limit == FIRST
    ask(pace, 2000, lambda n: 1 + n / 256)
    assert pace.limit == 256
    assert "concurrency" in pace.why


@pytest.mark.parametrize("slots", [1, 4, 40])
def test_a_server_that_queues_gets_little_more_than_it_answers_at_once(slots: int) -> None:
    pace = Pace(256)
    ask(pace, 600, lambda n: max(1.0, n / slots))
    assert pace.limit <= max(FIRST, 2 * slots)
    assert pace.limit >= min(slots, FIRST)
    assert "not answered faster" in pace.why


@pytest.mark.parametrize("room", [3, 10, 100])
def test_a_server_that_refuses_gets_about_what_it_takes(room: int) -> None:
    pace = Pace(256)
    refused, seconds = ask(pace, 5000, lambda n: 1.0, room)
    assert room // 3 <= pace.limit <= 1.5 * room
    assert refused < 0.1 * 5000, "the rest of the time it was not asked for too much"
    assert 5000 / seconds > 0.5 * room
    assert "refused" in pace.why


def test_an_outage_is_got_over() -> None:
    pace = Pace(128)
    ask(pace, 1000, lambda n: 1.0)
    for _ in range(20):
        pace.refused(pace.sent(1))
    assert pace.limit == 1
    ask(pace, 3000, lambda n: 1.0)
    assert pace.limit == 128


def test_refusals_of_one_limit_halve_it_once() -> None:
    pace = Pace(64)
    sent = [pace.sent(n + 1) for n in range(FIRST)]
    for one in sent:
        pace.refused(one)
    assert pace.limit == FIRST // 2


def test_answers_while_the_server_was_not_full_say_nothing() -> None:
    pace = Pace(64)
    for _ in range(100):
        pace.answered(pace.sent(FIRST - 1), 1.0)
    assert pace.limit == FIRST
