"""Many requests at once, to a server that fails in every way that servers do."""

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfsteer.data.records import Message
from selfsteer.engines import pace
from selfsteer.engines.answers import answers, read_answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.openai import OpenAIEngine
from selfsteer.engines.usage import Usage
from selfsteer.recipe.sections import EngineConfig
from tests.fakes import completion

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=8)

#: What befalls the first try of a request, by its number.
KINDS = ("nothing", "429 after", "429", "503", "cut", "cut inside", "malformed", "slow")

#: Arrivals, counted over all requests, that meet an outage.
OUTAGE = range(40, 80)


class RoughServer:
    """One event loop for all connections: hundreds of threads would be the bottleneck.

    No request is answered before a crowd of so many is under way at once. With a room for so many
    nothing else befalls requests than that those above it are refused.
    """

    def __init__(self, crowd: int, room: int | None) -> None:
        self.crowd, self.complete, self.room = crowd, asyncio.Event(), room
        self.tries, self.answered = Counter[str](), Counter[str]()
        self.under_way = self.most_under_way = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
        body = json.loads(await reader.readexactly(int(length)))
        query = body["messages"][-1]["content"]
        self.tries[query] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        kind = KINDS[int(query.split()[1]) % len(KINDS)] if self.tries[query] == 1 else "nothing"
        if self.tries.total() in OUTAGE:
            kind = "503"
        if self.room is not None:
            kind = "429" if self.under_way > self.room else "slow"
        try:
            if self.under_way >= self.crowd:
                self.complete.set()
            await self.complete.wait()
            return await self._answer(kind, query, writer)
        finally:
            self.under_way -= 1

    async def _answer(self, kind: str, query: str, writer: asyncio.StreamWriter) -> bool:
        def head(status: int, length: int, more: str = "") -> bytes:
            said = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\n{more}"
            return f"{said}Content-Length: {length}\r\n\r\n".encode()

        data = json.dumps(completion(f"Answer to {query}.")).encode()
        if kind == "cut":
            return False
        if kind == "cut inside":
            writer.write(head(200, len(data)) + data[:40])
        elif kind == "malformed":
            writer.write(head(200, 40) + data[:40])
        elif kind in ("429 after", "429", "503"):
            more = "Retry-After: 0.05\r\n" if kind == "429 after" else ""
            writer.write(head(int(kind[:3]), 2, more) + b"{}")
        else:
            writer.write(head(200, len(data)))
            size = 16 if kind == "slow" else len(data)
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                await writer.drain()
                await asyncio.sleep(0.002 if kind == "slow" else 0)
            self.answered[query] += 1
        await writer.drain()
        return kind != "cut inside"


@contextmanager
def rough(crowd: int = 0, room: int | None = None) -> Iterator[RoughServer]:
    found, loop, ready = RoughServer(crowd, room), asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(found.handle, "127.0.0.1", 0, backlog=1024)
        found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            server.close()

    serving = loop.create_task(serve())  # a loop holds no task that waits
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield found
    finally:

        async def end() -> None:
            mine = {serving, *asyncio.all_tasks()} - {asyncio.current_task()}
            for task in mine:
                task.cancel()
            await asyncio.gather(*mine, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def asking(url: str, concurrency: int) -> Iterator[OpenAIEngine]:
    settings = EngineConfig(
        kind="openai",
        base_url=url,
        model="m",
        concurrency=concurrency,
        retries=8,
        backoff=0.02,
        timeout=60,
    )
    engine = OpenAIEngine(settings, "m", url, Usage())
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("concurrency", "count"), [(32, 96), pytest.param(512, 2048, marks=pytest.mark.slow)]
)
def test_rough_weather_loses_nothing_and_asks_nothing_twice(
    concurrency: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "FIRST", concurrency)  # all at once, from the start
    requests = [Request(f"q{i}", (Message("user", f"Query {i}"),), i) for i in range(count)]
    expected = {f"q{i}": f"Answer to Query {i}." for i in range(count)}
    with rough(concurrency) as server, asking(server.url, concurrency) as engine:
        found = answers(engine, requests, GREEDY, store=tmp_path / "whole.jsonl")
        assert {i: c.text for i, c in found.items()} == expected
        assert server.answered == Counter(f"Query {i}" for i in range(count)), "each once"
        assert server.most_under_way == concurrency
        assert engine.usage.counts["requests"] == server.tries.total()
        assert engine.usage.counts["retried"] == server.tries.total() - count
    store, seen = tmp_path / "cut.jsonl", 0

    def dies(items: int, tokens: int) -> None:
        nonlocal seen
        seen += items
        if seen > count // 2:
            raise KeyboardInterrupt

    with rough() as server:
        with pytest.raises(KeyboardInterrupt), asking(server.url, concurrency) as engine:
            answers(engine, requests, GREEDY, store=store, advance=dies)
        kept, _ = read_answers(store)
        assert len(kept) == count // 2
        server.tries.clear()
        with asking(server.url, concurrency) as engine:
            found = answers(engine, requests, GREEDY, store=store)
    assert {i: c.text for i, c in found.items()} == expected
    assert not {f"Query {i[1:]}" for i in kept} & server.tries.keys(), "what was there is not asked"


def test_a_server_with_little_room_gets_few_requests_at_a_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    requests = [Request(f"q{i}", (Message("user", f"Query {i}"),), i) for i in range(600)]
    with rough(room=10) as server, asking(server.url, 256) as engine:
        found = answers(engine, requests, GREEDY)
        assert {i: c.text for i, c in found.items()} == {
            r.id: f"Answer to {r.messages[0].content}." for r in requests
        }
        assert server.most_under_way < 64
        assert engine.usage.counts["retried"] < len(requests) / 2
    assert re.search(r"gets \d+ requests at a time; ", capsys.readouterr().err)
