"""Batches against a server on loopback: nothing is lost, nothing is asked twice."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.artifacts import read_json
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Message, Query, Verdict
from selfsteer.engines import batch, openai
from selfsteer.engines.answers import answers
from selfsteer.engines.base import PROMPT_TOO_LONG, SamplingParams
from selfsteer.engines.load import Engines, check_engine
from selfsteer.engines.openai import OpenAIEngine
from selfsteer.engines.usage import Usage
from selfsteer.errors import EngineError
from selfsteer.judges import store
from selfsteer.judges.base import Pair
from selfsteer.judges.load import load_judge
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import (
    EngineConfig,
    JudgeConfig,
    Loading,
    PrinciplesConfig,
    resolve_path,
)
from selfsteer.run import folder as run_folder
from selfsteer.run.folder import RunFolder
from selfsteer.run.stage import Artifact
from selfsteer.stages.principles import WritePrinciples
from tests.engines.batches import (
    GREEDY,
    BatchServer,
    Ending,
    ask,
    asking,
    requests,
    run,
    serving_batches,
)
from tests.fakes import sends, status
from tests.make import write_jsonl

EXPIRED = (0, {"code": "batch_expired", "message": "This request could not be executed."})
BUSY = (503, {"message": "overloaded"})
KEY = "sk-3f9c0d/Ae71b62+84d5c9a0f21=="


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setattr(batch, "FIRST_LOOK", 0.001)
    monkeypatch.setattr(batch, "LAST_LOOK", 0.002)
    with serving_batches() as found:
        yield found


def calls(server: BatchServer) -> list[str]:
    """What was asked, without repeated looks."""
    seen = [s for i, s in enumerate(server.seen) if i == 0 or server.seen[i - 1] != s]
    return [s.replace("/batches/batch_", "/batch_") for s in seen]


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((folder / "batches").iterdir())]


def test_a_batch_answers_as_requests_one_by_one_do(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = EngineConfig(kind="openai", base_url=server.url, model="canned")
    one_by_one = OpenAIEngine(direct, "canned", server.url, Usage())
    expected = answers(one_by_one, requests(7), GREEDY)
    one_by_one.close()
    server.asked.clear()
    server.endings = [Ending(looks=4)]
    with asking(server.url, tmp_path, extra_body={"top_k": 5}) as engine:
        told = list[tuple[int, int]]()
        found = answers(engine, requests(7), GREEDY, advance=lambda *n: told.append(n))
        assert found == expected
    assert sum(n for n, _ in told) == 7
    assert not server.asked, "nothing but the batch"
    looks = ["GET /batch_0", "GET /files/output_batch_0/content"]
    assert calls(server) == ["POST /files", "POST /batches", *looks]
    (lines,) = (b["lines"] for b in server.batches.values())
    assert {(x["method"], x["url"], x["body"]["top_k"]) for x in lines} == {
        ("POST", "/v1/chat/completions", 5)
    }
    assert max(server.paid.values()) == 1
    usage = Usage(tmp_path / "usage.json").counts
    assert usage["requests"] == 7
    assert usage["prompt_tokens"] == usage["batch_prompt_tokens"] == 70
    shown = capsys.readouterr()
    assert "batch batch_0: 7 requests" in shown.err + shown.out
    assert "7 of 7 answered" in shown.err + shown.out


def test_a_hot_engine_is_looked_at_first_one_by_one(server: BatchServer, tmp_path: Path) -> None:
    hot = SamplingParams(0.7, 0.8, 64)
    with asking(server.url, tmp_path) as engine:
        answers(engine, requests(3), hot)
    assert len(server.asked) == 8
    usage = Usage(tmp_path / "usage.json").counts
    assert (usage["requests"], usage["prompt_tokens"], usage["batch_prompt_tokens"]) == (
        11,
        110,
        30,
    )


def test_what_failed_or_expired_is_asked_again_and_nothing_else(
    server: BatchServer, tmp_path: Path
) -> None:
    """The line of query 4 is nowhere."""
    server.endings = [
        Ending("expired", lines={1: EXPIRED, 2: BUSY, 4: None}),
        Ending(lines={2: BUSY}),
        Ending(),
    ]
    with asking(server.url, tmp_path) as engine:
        found = ask(engine, tmp_path, requests(6))
        assert {c.finish_reason for c in found.values()} == {"stop"}
        assert engine.usage.counts["retried"] == 4
    assert [len(b["lines"]) for b in server.batches.values()] == [6, 3, 1]
    assert server.paid == {f"Query {i}": 1 for i in range(6)}


def test_what_fails_every_time_is_counted_by_its_reason(
    server: BatchServer, tmp_path: Path
) -> None:
    long = (400, {"message": "maximum context length is 9", "code": "context_length_exceeded"})
    wrong = (400, {"message": "bad seed"})
    server.endings = [Ending(lines={0: EXPIRED, 1: long, 2: wrong, 3: (0, {"message": "no"})})]
    with asking(server.url, tmp_path, retries=2) as engine:
        found = ask(engine, tmp_path, requests(9))
    assert [found[f"q{i}"].finish_reason for i in range(5)] == [
        "request_failed:batch_expired",
        PROMPT_TOO_LONG,
        "request_failed:http_400",
        "request_failed:batch_error",
        "stop",
    ]
    assert [len(b["lines"]) for b in server.batches.values()] == [9, 2, 2]
    # another run of the command asks for what failed, and for nothing else
    server.endings = [Ending()]
    with asking(server.url, tmp_path) as engine:
        found = ask(engine, tmp_path, requests(9))
    assert [c.id for c in found.values() if c.finish_reason != "stop"] == ["q1"]
    assert len(server.batches["batch_3"]["lines"]) == 3
    assert max(server.paid.values()) == 1


def test_what_cannot_be_used_counts_as_what_is_paid_for(
    server: BatchServer, tmp_path: Path
) -> None:
    server.answer = lambda body: None  # type: ignore[assignment,return-value]
    with asking(server.url, tmp_path, retries=1) as engine:
        found = ask(engine, tmp_path, requests(2))
        assert {c.missing for c in found.values()} == {"request_failed:no_answer"}
        assert engine.usage.counts["prompt_tokens"] == 40
        assert engine.usage.counts["batch_prompt_tokens"] == 40


def test_a_server_that_answers_nothing_stops_the_stage(server: BatchServer, tmp_path: Path) -> None:
    server.endings = [Ending(lines=dict.fromkeys(range(9), (400, {"message": "bad seed"})))]
    with (
        asking(server.url, tmp_path) as engine,
        pytest.raises(EngineError, match=r"refuses one request after .* bad seed"),
    ):
        ask(engine, tmp_path, requests(9))


@pytest.mark.parametrize("bound", ["requests", "bytes"])
def test_files_are_bounded_and_all_are_under_way_at_once(
    bound: str, server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bound == "requests":
        monkeypatch.setattr(batch, "MOST_REQUESTS", 3)
    else:
        monkeypatch.setattr(batch, "MOST_BYTES", 900)
    with asking(server.url, tmp_path) as engine:
        ask(engine, tmp_path, requests(8))
    assert [len(b["lines"]) for b in server.batches.values()] == [3, 3, 2]
    assert all(len(server.files[f"file_{i}"]) < 900 for i in range(3))
    made = [s.partition(" ")[0] for s in calls(server)]
    assert made == ["POST"] * 6 + ["GET"] * 6
    assert server.paid == {f"Query {i}": 1 for i in range(8)}


def killed(server: BatchServer, folder: Path) -> int | None:
    """The exit code of a run in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engines.batches"])
    process = context.Process(target=run, args=(server.url, folder, 5, 3))
    server.process = process  # type: ignore[attr-defined]
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_at_any_call_pays_nothing_twice(
    when: str, server: BatchServer, tmp_path: Path
) -> None:
    """Before the server takes a request, or before it answers; one batch fails in part."""
    number, ended = 0, False
    while not ended:
        with serving_batches() as one:
            one.endings = [Ending("expired", 1, lines={1: EXPIRED}), Ending(looks=1)]

            def die(at: int, one: BatchServer = one, number: int = number) -> bool:
                if at == number:
                    os.kill(one.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
                return at == number

            setattr(one, when, die)
            folder = tmp_path / str(number)
            ended = killed(one, folder) == 0
            assert ended or killed(one, folder) == 0
            assert one.paid == {f"Query {i}": 1 for i in range(5)}, one.seen
            assert [len(b["lines"]) for b in one.batches.values()] == [3, 2, 1], one.seen
            usage = Usage(folder / "usage.json")
            assert {row["mark"] for row in kept(folder) if row["id"]} == usage.batches
            counts = usage.counts
            assert (counts["requests"], counts["prompt_tokens"]) == (6, 50)
        number += 1
    assert number == 14


def test_a_file_is_read_again_only_where_it_has_changed(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()

    def noted(kind: Any, path: Path) -> Any:
        read.append(path.name)
        return read_json(kind, path)

    monkeypatch.setattr(batch, "read_json", noted)
    with asking(server.url, tmp_path) as engine:
        for most in range(1, 5):
            ask(engine, tmp_path, requests(most))
        # the file of the batch that is refused is gone, and another one has its name
        server.endings = [*[Ending()] * 4, FULL, Ending()]
        ask(engine, tmp_path, requests(6))
        ask(engine, tmp_path, requests(7))
    assert read == [f"{i:05d}.json" for i in range(6)]
    assert server.paid == {f"Query {i}": 1 for i in range(7)}


def test_a_lost_reply_makes_no_second_batch(server: BatchServer, tmp_path: Path) -> None:
    """It is on the second page of the server's list."""
    server.page = 2
    server.files["file_x"] = b""
    dropped = list[int]()

    def drop(number: int) -> bool:
        if dropped or server.seen[number] != "POST /batches":
            return False
        dropped.append(number)
        for mark in "abc":
            server.make("file_x", {"selfsteer": mark})
        return True

    server.after = drop
    with asking(server.url, tmp_path) as engine:
        ask(engine, tmp_path, requests(4))
    assert server.seen.count("POST /batches") == 1
    assert server.seen.count("GET /batches") == 2
    assert server.paid == {f"Query {i}": 1 for i in range(4)}


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_requests": 3}, r"4 requests .* max_requests 3: .* come to 4 .* They were not sent"),
        ({"max_tokens_total": 100}, "max_tokens_total 100"),
        ({"price": {"input": 0, "output": 1e4}, "max_cost": 1.2}, r"max_cost 1\.2: .* to 1\.28 "),
    ],
)
def test_nothing_is_sent_that_could_pass_a_limit(
    limits: dict[str, Any], said: str, server: BatchServer, tmp_path: Path
) -> None:
    """4 requests of 64 tokens at 0.01 apiece, half of that in batches."""
    with asking(server.url, tmp_path, **limits) as engine:
        with pytest.raises(EngineError, match=said):
            ask(engine, tmp_path, requests(4))
        assert not server.seen
        if "price" in limits:
            ask(engine, tmp_path, requests(3))
            written = engine.usage.counts["completion_tokens"]
            cost = json.loads((tmp_path / "usage.json").read_text())["cost"]
            assert cost == pytest.approx(written * 0.005)


def test_the_price_of_a_batch_may_be_another_one(server: BatchServer, tmp_path: Path) -> None:
    price = {"input": 1e6, "output": 0, "batch": 0.25}
    with asking(server.url, tmp_path, price=price) as engine:
        ask(engine, tmp_path, requests(4))
        assert engine.settings.price
        assert engine.settings.price.of(engine.usage.counts) == pytest.approx(10)


def test_a_full_queue_gets_fewer_requests_at_a_time(server: BatchServer, tmp_path: Path) -> None:
    full = Ending("failed", errors={"code": "token_limit_exceeded", "message": "Limit: 90,000"})
    server.endings = [full, full, Ending()]
    with asking(server.url, tmp_path, retries=0) as engine:
        found = ask(engine, tmp_path, requests(8))
        assert engine.usage.counts["requests"] == 8
    assert {c.finish_reason for c in found.values()} == {"stop"}
    assert [len(b["lines"]) for b in server.batches.values()] == [8, 4, 2, 2, 2, 2]
    assert server.paid == {f"Query {i}": 1 for i in range(8)}


FULL = Ending("failed", errors={"code": "token_limit_exceeded", "message": "Limit: 90,000"})


@pytest.mark.parametrize(
    ("count", "endings", "sizes"),
    [
        # the last one of a request is refused because of the other one
        (9, [Ending(), FULL, Ending()], [8, 1, 1]),
        # what is short says nothing of how long the others may be
        (18, [FULL, FULL, Ending(), Ending(), FULL, Ending()], [8, 8, 2, 8, 8, 8]),
        (18, [FULL, FULL, FULL, Ending()], [8, 8, 2, 4, 4, 4, 4, 2]),
    ],
)
def test_a_queue_that_our_own_batches_fill_is_waited_for(
    count: int,
    endings: list[Ending],
    sizes: list[int],
    server: BatchServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch, "MOST_REQUESTS", 8)
    server.endings = endings
    with asking(server.url, tmp_path, retries=0) as engine:
        assert len(ask(engine, tmp_path, requests(count))) == count
        assert engine.usage.counts["requests"] == count
    assert [len(b["lines"]) for b in server.batches.values()] == sizes
    assert server.paid == {f"Query {i}": 1 for i in range(count)}


@pytest.fixture(autouse=True)
def _deaf() -> Iterator[None]:
    """A Ctrl-C that comes late must not end the tests that follow."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def stopped() -> Iterator[None]:
    """What is in it hears a Ctrl-C, which must come."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted(server: BatchServer, folder: Path, at: int, **settings: Any) -> None:
    """A run of seven requests that is stopped by Ctrl-C after so many calls."""

    def interrupt(number: int) -> bool:
        if number == at:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return False

    server.after = interrupt
    with asking(server.url, folder, **settings) as engine, stopped():
        ask(engine, folder, requests(7))
    server.after = lambda number: False


def end(server: BatchServer, name: str = "batch_0") -> None:
    """Ends a batch, whoever looks at it."""
    server.batches[name]["left"] = 1


def test_a_batch_that_is_left_behind_is_counted_and_holds_the_limits(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other settings: first while it waits, and then when it is over."""
    server.endings = [Ending(looks=10**9), Ending()]
    interrupted(server, tmp_path, 4)
    other: dict[str, Any] = {"extra_body": {"top_k": 5}}
    with (
        asking(server.url, tmp_path, **other, max_requests=13) as engine,
        pytest.raises(EngineError, match="come to 14"),
    ):
        ask(engine, tmp_path, requests(7))
    assert "batch_0 goes on at" in "".join(capsys.readouterr())
    with asking(server.url, tmp_path, **other) as engine:
        ask(engine, tmp_path, requests(7))
        assert engine.usage.counts["requests"] == 7
    end(server)
    with asking(server.url, tmp_path, **other) as engine:
        (tmp_path / "answers.jsonl").unlink()
        ask(engine, tmp_path, requests(7))
    counts = Usage(tmp_path / "usage.json").counts
    assert (counts["requests"], counts["prompt_tokens"]) == (14, 140)
    assert len(server.batches) == 2


def test_a_batch_is_counted_once_if_the_run_ends_right_after_that(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Usage.save

    def dies(self: Usage, *, now: bool = False) -> None:
        save(self, now=now)
        if self.counts["prompt_tokens"]:
            raise EngineError("no power")

    with monkeypatch.context() as patch, asking(server.url, tmp_path) as engine:
        patch.setattr(Usage, "save", dies)
        with pytest.raises(EngineError, match="no power"):
            ask(engine, tmp_path, requests(2))
        patch.undo()
    with asking(server.url, tmp_path) as engine:
        ask(engine, tmp_path, requests(2))
        assert engine.usage.counts["prompt_tokens"] == 20
    assert len(server.batches) == 1


def test_a_queue_that_a_batch_left_behind_fills_is_waited_for(
    server: BatchServer, tmp_path: Path
) -> None:
    server.endings = [Ending(looks=30), FULL, Ending()]
    interrupted(server, tmp_path, 4)
    with asking(server.url, tmp_path, extra_body={"top_k": 5}) as engine:
        ask(engine, tmp_path, requests(7))
        assert engine.usage.counts["requests"] == 14
    assert [len(b["lines"]) for b in server.batches.values()] == [7, 7, 7]


def test_a_run_that_is_interrupted_drops_what_another_one_drops(
    server: BatchServer, tmp_path: Path
) -> None:
    """Six requests fail every time, which is no dead server, as the seventh was answered."""
    fail: dict[int, tuple[int, Any] | None] = dict.fromkeys(range(6), BUSY)
    for at in (None, 5, 9):
        with serving_batches() as one:
            one.endings = [Ending(lines=fail, looks=2), Ending(lines=fail, looks=10)]
            folder = tmp_path / str(at)
            if at is not None:
                interrupted(one, folder, at, retries=2)
            with asking(one.url, folder, retries=2) as engine:
                found = ask(engine, folder, requests(7))
            reasons = [c.finish_reason for c in found.values()]
            assert reasons == ["request_failed:http_503"] * 6 + ["stop"]
            assert [len(b["lines"]) for b in one.batches.values()] == [7, 6, 6], at


def test_a_batch_that_nothing_waits_for_is_named(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"kind": "openai", "base_url": server.url, "model": "canned"}
    server.endings = [Ending(looks=10**9)]

    def interrupt(number: int) -> bool:
        if number == 4:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return False

    server.after = interrupt
    with Engines(tmp_path) as engines:
        engine = engines.get(EngineConfig(**given, batch=True), "", Loading(), 1)
        with stopped():
            answers(engine, requests(3), GREEDY)
    capsys.readouterr()
    with Engines(tmp_path) as engines:
        engines.get(EngineConfig(**given), "", Loading(), 1)
    assert "may go on with batch_0 and charge for it" in "".join(capsys.readouterr())


def test_files_are_cut_to_what_their_answers_may_take(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 tokens of 16 bytes and 2,048 of all else are 3,072 bytes."""
    monkeypatch.setattr(batch, "LONGEST_FILE", 3 * 3072)
    with asking(server.url, tmp_path) as engine:
        ask(engine, tmp_path, requests(7))
    assert [len(b["lines"]) for b in server.batches.values()] == [3, 3, 1]


def test_a_file_may_take_longer_than_a_request(server: BatchServer, tmp_path: Path) -> None:
    """A second apart from its timeout for each 100,000 bytes that it may have."""

    def slowly(h: Any) -> bool:
        if not h.path.endswith("/content"):
            return False
        data = server.files[h.path.split("/")[-2]]
        h.send_response(200)
        h.send_header("Content-Length", str(len(data)))
        h.end_headers()
        for start in range(0, len(data), len(data) // 4):
            h.wfile.write(data[start : start + len(data) // 4])
            h.wfile.flush()
            time.sleep(0.15)
        return True

    server.always = slowly
    with asking(server.url, tmp_path, timeout=0.4, retries=0) as engine:
        assert len(ask(engine, tmp_path, requests(7))) == 7


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (
            Ending("failed", errors={"code": "x", "message": f"bad file {KEY}"}),
            r"refuses batch batch_0 of 4 requests: bad file \[key\]",
        ),
        (
            Ending("failed", errors={"code": "token_limit_exceeded", "message": "Limit: 9"}),
            "batch_2 of 1 requests: Limit: 9",
        ),
        (Ending("cancelled", lines={2: None}), "batch_0 was cancelled"),
        (
            Ending(lines=dict.fromkeys(range(4), (401, {"message": f"wrong key {KEY}"}))),
            r"refuses model .* wrong key \[key\]",
        ),
    ],
)
def test_a_batch_that_cannot_succeed_stops_and_the_next_run_goes_on(
    ending: Ending,
    said: str,
    server: BatchServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.endings = [ending]
    with asking(server.url, tmp_path) as engine:
        with pytest.raises(EngineError, match=said) as caught:
            ask(engine, tmp_path, requests(4))
        assert KEY[:6] not in str(caught.value)
        server.endings = [Ending()]
        assert {c.finish_reason for c in ask(engine, tmp_path, requests(4)).values()} == {"stop"}
    assert server.paid == {f"Query {i}": 1 for i in range(4)}
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("lacking", ["files", "batches"])
def test_a_server_without_batches_is_named(
    lacking: str, server: BatchServer, tmp_path: Path
) -> None:
    server.lacks = lacking
    with (
        asking(server.url, tmp_path) as engine,
        pytest.raises(EngineError, match=r"has no batch endpoint; remove batch .* Not Found"),
    ):
        ask(engine, tmp_path, requests(2))
    if lacking == "batches":
        with pytest.raises(EngineError, match=r"does not list its batches; remove batch"):
            check_engine(engine.settings)
    else:
        check_engine(engine.settings)


def test_a_batch_that_is_gone_is_not_paid_for_again_unasked(
    server: BatchServer, tmp_path: Path
) -> None:
    with asking(server.url, tmp_path) as engine:
        ask(engine, tmp_path, requests(2))
        (tmp_path / "answers.jsonl").unlink()
        assert len(ask(engine, tmp_path, requests(2))) == 2, "it is looked at again"
        assert server.paid.total() == 2
        assert engine.usage.counts["prompt_tokens"] == 20
        (tmp_path / "answers.jsonl").unlink()
        server.batches.clear()
        with pytest.raises(EngineError, match=r"does not have batch batch_0 .*00000\.json"):
            ask(engine, tmp_path, requests(2))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (sends(b"not JSON"), "malformed_json"),
        (sends([]), "malformed_answer"),
        (sends({"id": "../models"}), "malformed_batch"),
        (sends({"id": ".."}), "malformed_batch"),
        (sends({"id": KEY.replace("/", "_")}), "malformed_batch"),
        (sends({"id": "k" + KEY[:2], "object": "x" * 300}), "long_reply|is longer"),
        (status(500, f"about {KEY}"), r"about \[key\]"),
        (status(307, "elsewhere", location=f"http://127.0.0.1:9/?{KEY}"), r"on to .*\[key\]"),
    ],
)
def test_replies_are_guarded(
    reply: Callable[[Any], bool],
    said: str,
    server: BatchServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY.replace("/", "_") if "batch" in said else KEY)
    monkeypatch.setattr(openai, "LONGEST_REPLY", 200)
    server.always = reply
    with (
        asking(server.url, tmp_path, retries=1) as engine,
        pytest.raises(EngineError, match=said) as caught,
    ):
        ask(engine, tmp_path, requests(1))
    assert KEY[:8] not in str(caught.value)


def test_every_call_of_a_batch_waits_as_long_as_the_server_asks(
    server: BatchServer, tmp_path: Path
) -> None:
    """The one further try would otherwise come after a millisecond."""
    for call in range(4):
        allowed = 0.0

        def busy(h: Any, call: int = call) -> bool:
            nonlocal allowed
            if len(server.seen) > call + 1 and not allowed:
                allowed = time.monotonic() + 0.2
                return status(429, retry_after="0.2")(h)
            return allowed > time.monotonic() and status(429)(h)

        server.always = busy
        folder = tmp_path / str(call)
        with asking(server.url, folder, retries=1) as engine:
            ask(engine, folder, requests(1))
        assert allowed
        server.seen.clear()


def test_no_backoff_never_overflows(server: BatchServer, tmp_path: Path) -> None:
    with asking(server.url, tmp_path, backoff=0) as engine:
        engine._start(engine._wait(openai.Fault("connection", "lost"), 1100)).result()


def test_a_server_that_does_not_list_its_batches_in_time_is_too_slow(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for more patience than the check has."""
    monkeypatch.setattr(batch, "LOOK_S", 0.1)
    server.always = lambda h: "batches" in h.path and status(429, retry_after="2000")(h)
    with (
        asking(server.url, tmp_path) as engine,
        pytest.raises(EngineError, match="too slow: asked for its batches"),
    ):
        engine.check()


def test_a_file_of_answers_may_be_longer_than_a_reply_but_not_endless(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai, "LONGEST_REPLY", 2000)
    server.answer = lambda body: "long \u2028 " * 2000
    with asking(server.url, tmp_path, retries=3) as engine:
        found = ask(engine, tmp_path, requests(2))
        assert found["q1"].text == ("long \u2028 " * 2000).strip()
        monkeypatch.setattr(openai, "LONGEST_FILE", 3000)
        with pytest.raises(EngineError, match="longer than 3,000 bytes"):
            ask(engine, tmp_path, requests(3)[2:])
    assert server.seen.count("GET /files/output_batch_1/content") == 1


def test_a_line_that_cannot_be_read_is_asked_again(server: BatchServer, tmp_path: Path) -> None:
    def garble(number: int) -> bool:
        if server.seen[number] == "GET /files/output_batch_0/content":
            return False
        if (name := "output_batch_0") in server.files and server.seen[number].startswith("GET /b"):
            first, *rest = server.files[name].splitlines()
            server.files[name] = b"\n".join([first[:40], *rest, b"[]", b"null", first[:20]])
        return False

    server.after = garble
    with asking(server.url, tmp_path) as engine:
        found = ask(engine, tmp_path, requests(3))
    assert {c.finish_reason for c in found.values()} == {"stop"}
    assert [len(b["lines"]) for b in server.batches.values()] == [3, 1]


def test_a_request_that_is_answered_twice_is_told(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def repeat(number: int) -> bool:
        name = "output_batch_0"
        if name in server.files and server.seen[number].startswith("GET /batches"):
            first, *rest = server.files[name].splitlines()
            second = json.loads(first)
            second["response"]["body"]["choices"][0]["message"]["content"] = "Another answer."
            server.files[name] = b"\n".join([first, *rest, json.dumps(second).encode()])
        return False

    server.after = repeat
    with asking(server.url, tmp_path) as engine:
        found = ask(engine, tmp_path, requests(3))
    assert "Another answer." not in {c.text for c in found.values()}
    said = " ".join(capsys.readouterr().err.split())
    assert "answers 1 of the 3 requests of batch batch_0 more than once; the first answer" in said


def test_a_batch_without_an_end_is_given_up(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.endings = [Ending(looks=10**9)]
    monkeypatch.setattr(batch, "LONGEST_BATCH", 0.01)
    with (
        asking(server.url, tmp_path) as engine,
        pytest.raises(EngineError, match=r"batch_0 .* is not over after"),
    ):
        ask(engine, tmp_path, requests(1))


def test_ctrl_c_says_that_the_batch_goes_on(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.endings = [Ending(looks=40)]

    def interrupt(number: int) -> bool:
        if number == 4:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return False

    server.after = interrupt
    with asking(server.url, tmp_path) as engine, stopped():
        ask(engine, tmp_path, requests(3))
    shown = capsys.readouterr()
    assert "goes on with batch_0 and charges for it; the same command" in shown.err + shown.out
    with asking(server.url, tmp_path) as engine:
        ask(engine, tmp_path, requests(3))
    assert server.seen.count("POST /batches") == 1


def test_ctrl_c_names_no_batch_that_is_over(
    server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with asking(server.url, tmp_path) as engine:
        ask(engine, tmp_path, requests(2))
    (tmp_path / "answers.jsonl").unlink()
    capsys.readouterr()
    first = len(server.seen)

    def interrupt(number: int) -> bool:
        if number == first:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return False

    server.after = interrupt
    with asking(server.url, tmp_path) as engine, stopped():
        ask(engine, tmp_path, requests(3))
    assert server.seen[first] == "POST /files"
    assert "goes on with batch_0" not in "".join(capsys.readouterr())


def test_a_budget_under_its_new_name_costs_no_try(server: BatchServer, tmp_path: Path) -> None:
    new = (400, {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."})
    server.endings = [Ending(lines={0: new, 1: new}), Ending()]
    with asking(server.url, tmp_path, retries=0) as engine:
        found = ask(engine, tmp_path, requests(2))
    assert {c.finish_reason for c in found.values()} == {"stop"}
    bodies = [line["body"] for b in server.batches.values() for line in b["lines"]]
    assert [sorted(k for k in b if k.startswith("max")) for b in bodies] == [
        *[["max_tokens"]] * 2,
        *[["max_completion_tokens"]] * 2,
    ]


def test_an_engine_of_a_run_asks_in_batches_and_one_without_does_not(
    server: BatchServer, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"kind": "openai", "base_url": server.url, "model": "canned"}
    plain, batched = EngineConfig(**given), EngineConfig(**given, batch=True)
    assert plain.identity == batched.identity
    with Engines(None) as engines:
        assert type(engines.get(batched, "", Loading(), 1)) is OpenAIEngine
    with Engines(tmp_path) as engines:
        assert type(engines.get(plain, "", Loading(), 1)) is OpenAIEngine
        answers(engines.get(batched, "", Loading(), 1), requests(3), GREEDY)
    (name,) = (tmp_path / "usage").iterdir()
    assert (tmp_path / "batches" / name.stem / "00000.json").exists()


def test_a_judge_asks_all_in_one_batch_and_nothing_twice(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK", 2)
    server.answer = lambda body: "Verdict: " + "BA"["Answer A ===\\nlong" in str(body)]
    engine = {"kind": "openai", "base_url": server.url, "batch": True}
    values = {"kind": "chat", "model": "canned", "engine": engine}
    pairs = [
        Pair(Query(f"q{i}", (Message("user", f"Query {i}"),)), f"long {i}", "no") for i in range(5)
    ]
    for _ in range(2):
        judge = load_judge(validate(JudgeConfig, values, "judge"), tmp_path)
        assert judge is not None
        assert {j.verdict for j in judge.compare_all(pairs)} == {Verdict.FIRST}
    assert [len(b["lines"]) for b in server.batches.values()] == [10]


def principles(server: BatchServer, folder: RunFolder, **writer: Any) -> WritePrinciples:
    """Of five queries in three shards."""
    server.answer = lambda body: f"Good: Say {body['seed']}.\nBad: Say nothing."
    writer = {"kind": "openai", "base_url": server.url, "model": "canned", **writer}
    given = {"features": "random", "mode": "generated", "shard_size": 2, "writer": writer}
    rows = ({"id": f"q{i}", "prompt": f"Query {i}"} for i in range(5))
    return WritePrinciples(
        Artifact(write_jsonl(folder / "queries.jsonl", *rows)),
        Artifact(Path(resolve_path("package:selfsteer.testbed/checkpoint"))),
        PrinciplesConfig.model_validate(given),
        EngineConfig(),
    )


def test_a_stage_asks_for_all_its_shards_in_one_batch(server: BatchServer, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    result = principles(server, folder, batch=True).run(folder)
    assert (result.n_out, result.notes["sources"]) == (5, {"generated": 5})
    assert [len(b["lines"]) for b in server.batches.values()] == [5]
    (asked,) = result.notes["asked"].values()
    assert asked["batch_prompt_tokens"] == 50


@pytest.mark.parametrize("batched", [True, False])
def test_no_shard_is_paid_for_again_after_a_stop_between_two(
    batched: bool, server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next run asks one by one."""
    folder = RunFolder(tmp_path)

    def stop(path: Path, *args: Any) -> None:
        if path.name == "shard-00001.jsonl":
            raise KeyboardInterrupt
        write_atomic(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomic", stop)
        with stopped():
            principles(server, folder, batch=True).run(folder)
    asked, seen = len(server.asked), len(server.seen)
    result = principles(server, folder, batch=batched).run(folder)
    assert result.n_out == 5
    assert (len(server.asked), len(server.seen)) == (asked, seen)
    assert not list(tmp_path.rglob("answers-*"))
