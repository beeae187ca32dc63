"""Answers that are kept as they come: nothing finished is asked for again, nothing changes."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from selfsteer import stopping
from selfsteer.data.records import Message
from selfsteer.engines.answers import answers, read_answers
from selfsteer.engines.base import Completion, Contrast, Request, SamplingParams, cut
from tests.fakes import FakeEngine, Said

PARAMS = SamplingParams()
REQUESTS = [Request(f"r{i}", (Message("user", "x" * (i * 7 % 11)),), i) for i in range(11)]


class Killed(Exception):
    pass


def told(request: Request) -> Said:
    """What batches it was in shows in no answer; one is cut off and one too long."""
    reasons = {3: "length", 5: "prompt_too_long"}
    return f"{request.seed} said\n\u2028", reasons.get(request.seed, "stop")


def killed_after(count: int, size: int | None) -> FakeEngine:
    def say(request: Request) -> Said:
        if len(engine.asked) > count:
            raise Killed
        return told(request)

    engine = FakeEngine(say, size)
    return engine


class Progress:
    items = 0

    def advance(self, items: int, tokens: int) -> None:
        self.items += items


def test_answers_come_in_the_order_of_the_requests() -> None:
    engine = FakeEngine(told)
    found = answers(engine, REQUESTS, PARAMS)
    assert list(found) == [r.id for r in REQUESTS]
    assert found["r4"] == Completion("r4", "4 said\n\u2028", "stop", 10, 5)
    with pytest.raises(ValueError, match="same id"):
        answers(engine, [*REQUESTS, REQUESTS[0]], PARAMS)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_between_any_two_answers_it_ends_the_same(
    tmp_path: Path, size: int | None, torn: bool
) -> None:
    expected = answers(FakeEngine(told, size), REQUESTS, PARAMS)
    batches = cut(REQUESTS, size) if size else [[r] for r in REQUESTS]
    order = [r for batch in batches for r in batch]  # a real engine answers batch by batch
    for count in range(len(order)):
        store = tmp_path / f"{count}.jsonl"
        with pytest.raises(Killed):
            answers(killed_after(count, size), order, PARAMS, store=store)
        if torn:
            store.write_bytes(store.read_bytes()[:-9])
        kept = count - 1 if torn and count else count
        whole = kept // (size or 1) * (size or 1)
        engine = FakeEngine(told, size)
        progress = Progress()
        found = answers(engine, REQUESTS, PARAMS, store=store, advance=progress.advance)
        assert found == expected
        assert {r.id for r in engine.asked} == {r.id for r in order[whole:]}
        assert progress.items == len(REQUESTS)
        again = FakeEngine(told, size)
        assert answers(again, REQUESTS, PARAMS, store=store) == expected
        assert not again.calls


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("number", [0, 1, 3, 10])
def test_asked_to_stop_it_finishes_the_batch_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def say(request: Request) -> Said:
        if len(engine.asked) == number + 1:
            signal.raise_signal(signal.SIGTERM)
        return told(request)

    engine, store = FakeEngine(say, 4), tmp_path / "a.jsonl"
    order = [r for batch in cut(REQUESTS, 4) for r in batch]
    with pytest.raises(KeyboardInterrupt):
        answers(engine, order, PARAMS, store=store)
    kept = [r.id for r in order[: number // 4 * 4 + 4]]
    assert store.read_text().count('"request"') == len(kept)
    monkeypatch.setattr(stopping, "_asked", None)
    again = FakeEngine(told, 4)
    assert answers(again, REQUESTS, PARAMS, store=store) == answers(engine, REQUESTS, PARAMS)
    assert {r.id for r in again.asked} == {r.id for r in REQUESTS} - set(kept)


def test_what_was_pushed_otherwise_is_asked_for_again(tmp_path: Path) -> None:
    (first, *_), store = REQUESTS, tmp_path / "a.jsonl"
    other = (Message("user", "y"),)
    ways = [None, Contrast(other, 1.0), Contrast(other, 2.0), Contrast(first.messages, 2.0)]
    for contrast in [*ways, ways[-1]]:
        engine = FakeEngine(told)
        answers(engine, [replace(first, contrast=contrast)], PARAMS, store=store)
    assert not engine.asked
    assert len(store.read_text().split()) > 4
    assert store.read_text().count('"request"') == len(ways)


def test_what_failed_is_asked_for_again(tmp_path: Path) -> None:
    store = tmp_path / "a.jsonl"
    failing = FakeEngine(lambda r: ("", "request_failed:timeout") if r.seed == 2 else told(r))
    assert answers(failing, REQUESTS, PARAMS, store=store)["r2"].missing
    engine = FakeEngine(told)
    assert answers(engine, REQUESTS, PARAMS, store=store)["r2"].text == "2 said\n\u2028"
    assert [r.id for r in engine.asked] == ["r2"]


def test_what_the_template_refused_is_not_asked_for_again(tmp_path: Path) -> None:
    store = tmp_path / "a.jsonl"
    refusing = FakeEngine(lambda r: ("", "request_failed:template") if r.seed == 2 else told(r))
    found = answers(refusing, REQUESTS, PARAMS, store=store)
    engine = FakeEngine(told)
    assert answers(engine, REQUESTS, PARAMS, store=store) == found
    assert not engine.asked


def test_an_answer_that_changed_on_disk_is_asked_for_again(tmp_path: Path) -> None:
    store = tmp_path / "a.jsonl"
    expected = answers(FakeEngine(told), REQUESTS, PARAMS, store=store)
    store.write_text(store.read_text().replace("2 said", "3 said"))
    engine = FakeEngine(told)
    assert answers(engine, REQUESTS, PARAMS, store=store) == expected
    assert [r.id for r in engine.asked] == ["r2"]


@pytest.mark.parametrize("size", [None, 4])
def test_a_stored_answer_to_another_request_of_that_name_does_not_count(
    tmp_path: Path, size: int | None
) -> None:
    store = tmp_path / "a.jsonl"
    answers(FakeEngine(lambda r: r.messages[0].content, size), REQUESTS, PARAMS, store=store)
    other = replace(REQUESTS[3], messages=(Message("user", "y" * 10),))
    requests = [*REQUESTS[:3], other, *REQUESTS[4:]]
    engine = FakeEngine(lambda r: r.messages[0].content, size)
    assert answers(engine, requests, PARAMS, store=store)["r3"].text == "y" * 10
    assert other in engine.asked
    assert len(engine.asked) == (size or 1)


def test_answers_of_another_model_do_not_count(tmp_path: Path) -> None:
    """Stores of an audit lie side by side, one a model, and every model has the same seeds."""
    with pytest.raises(Killed):
        answers(
            killed_after(5, None), REQUESTS, PARAMS, store=tmp_path / "answers-00000c0ffee.partial"
        )
    engine = FakeEngine(lambda r: "another model")
    found = answers(engine, REQUESTS, PARAMS, store=tmp_path / "answers-00000decade.partial")
    assert {a.text for a in found.values()} == {"another model"}


def test_a_store_with_a_bad_line_is_read_once_it_is_asked_again(tmp_path: Path) -> None:
    store = tmp_path / "a.jsonl"
    expected = answers(FakeEngine(told), REQUESTS, PARAMS, store=store)
    store.write_text('{"id": "r7", "te\nnull\n' + store.read_text().replace("2 said", "3 said"))
    found, damaged = read_answers(store)
    assert (damaged, expected.keys() - found.keys()) == (3, {"r2"})
    answers(FakeEngine(told), REQUESTS, PARAMS, store=store)
    assert read_answers(store) == (expected, 3)
