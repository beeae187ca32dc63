"""Stand-ins: engines and judges that say what they are told, and a server with faults on order.

The server speaks OpenAI's chat completions on loopback. What it says is a function of prompt and
seed, so that a disturbed run can be held against an undisturbed one.
"""

import gzip
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from selfsteer.data.records import Query, Verdict
from selfsteer.engines.base import Advance, Completion, Request, SamplingParams, no_news
from selfsteer.engines.load import Engines
from selfsteer.judges.base import Judgement, Pair

if TYPE_CHECKING:
    import pytest

# -- engines ---------------------------------------------------------------------------------------

#: What a fake says: a text that ended by itself, text and finish reason, or everything.
Said = str | tuple[str, str] | Completion


class FakeEngine:
    """Answers each request by a function of it, and remembers what it was asked.

    Args:
        say: the answer to a request.
        batch_size: see `Engine`.
        tokens: of each prompt and answer.
    """

    def __init__(
        self,
        say: Callable[[Request], Said],
        batch_size: int | None = None,
        tokens: tuple[int, int] = (10, 5),
    ) -> None:
        self.say, self.batch_size, self.tokens = say, batch_size, tokens
        self.asked: list[Request] = []
        self.calls = 0

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance = no_news
    ) -> Iterator[Completion]:
        """See `Engine.generate`."""
        self.calls += 1
        for request in requests:
            self.asked.append(request)
            said = self.say(request)
            if isinstance(said, Completion):
                found = replace(said, id=request.id)
            else:
                text, reason = (said, "stop") if isinstance(said, str) else said
                found = Completion(request.id, text, reason, *self.tokens)
            advance(1, found.completion_tokens)
            yield found


def answer_with(monkeypatch: "pytest.MonkeyPatch", engine: FakeEngine) -> FakeEngine:
    """Makes this engine the one that stages ask, whatever the model."""
    for way in ("sampler", "get"):
        monkeypatch.setattr(Engines, way, lambda *args, **kwargs: engine)
    return engine


# -- judges ----------------------------------------------------------------------------------------


class FakeJudge:
    """A judge that is a function of query and responses; counts what it was asked."""

    name = "fake"

    def __init__(self, verdict: Callable[[Pair], Verdict]) -> None:
        self.verdict, self.asked = verdict, 0

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`."""

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge.compare_all`."""
        self.asked += len(pairs)
        return [Judgement(self.verdict(p)) for p in pairs]


def longer(pair: Pair) -> Verdict:
    """The longer response is the better one; one with a question mark cannot be read."""
    a, b = len(pair.first), len(pair.second)
    if "?" in pair.first + pair.second:
        return Verdict.UNPARSEABLE
    return Verdict.FIRST if a > b else Verdict.SECOND if b > a else Verdict.TIE


class ScoringFake(FakeJudge):
    """Likes length, as a score as well; has none for what begins with an X."""

    scale = "characters"

    def __init__(self) -> None:
        super().__init__(longer)

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`."""
        return [None if a.startswith("X") else float(len(a)) for _, a in answers]


# -- a server --------------------------------------------------------------------------------------

WORDS = [
    "bees",
    "dance",
    "near",
    "warm",
    "honey",
    "while",
    "old",
    "bears",
    "sleep",
    "under",
    "tall",
    "green",
    "trees",
    "by",
    "rivers",
]

#: A fault answers a request in place of the server; True when it did.
Fault = Callable[["Handler"], bool]


def say(body: dict[str, Any]) -> str:
    """The answer to a request."""
    asked = json.dumps([body["messages"], body["seed"] if body.get("temperature") else 0])
    digest = hashlib.sha256(asked.encode()).digest()
    return " ".join(WORDS[b % len(WORDS)] for b in digest[: 6 + digest[0] % 12]) + "."


class Server(ThreadingHTTPServer):
    """Counts what it is asked; ``faults`` has the n-th request's fault, ``always`` that of all.

    ``listing`` is the fault of the list of its models.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model = "canned"
        self.listing: Fault | None = None
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.faults: dict[int, Fault] = {}
        self.always: Fault | None = None
        self.answer = say
        self.seconds = 0.0
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    body: dict[str, Any]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.server.listing
        if fault is None or not fault(self):
            listed = {"object": "list", "data": [{"id": self.server.model, "object": "model"}]}
            self.send(200, listed)

    def do_POST(self) -> None:
        server = self.server
        body = self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.asked)
            server.asked.append(body)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            time.sleep(server.seconds)
            fault = server.faults.get(number, server.always)
            if fault is None or not fault(self):
                self.send(200, completion(server.answer(body)))
        finally:
            with server.lock:
                server.under_way -= 1

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def completion(*texts: str | None, reason: str = "stop") -> dict[str, Any]:
    """The reply with one choice per text; 10 tokens in, one per word out."""
    words = sum(len((t or "").split()) for t in texts)
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "canned",
        "choices": [
            {"index": i, "finish_reason": reason, "message": {"role": "assistant", "content": t}}
            for i, t in enumerate(texts)
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": words, "total_tokens": 10 + words},
    }


def with_tokens(**counts: int) -> dict[str, Any]:
    """A reply that took so many tokens."""
    found = completion("Hi.")
    return {**found, "usage": {**found["usage"], **counts}}


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    server = Server(port)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# -- faults ----------------------------------------------------------------------------------------


def status(code: int, said: str = "no", **headers: str) -> Fault:
    """An HTTP error; ``retry_after`` becomes the header Retry-After."""
    named = {k.replace("_", "-"): v for k, v in headers.items()}

    def fault(h: Handler) -> bool:
        h.send(code, {"error": {"message": said, "type": "t", "code": None}}, named)
        return True

    return fault


def sends(value: Any) -> Fault:
    """These bytes, or this JSON value, with status 200."""

    def fault(h: Handler) -> bool:
        h.send(200, value)
        return True

    return fault


def packed(h: Handler) -> bool:
    """A mebibyte of nothing, as a kilobyte that nobody asked for."""
    h.send(200, gzip.compress(bytes(1 << 20)), {"Content-Encoding": "gzip"})
    return True


def drips(h: Handler) -> bool:
    """An answer without an end, a byte at a time, until the client is gone."""
    h.send_response(200)
    h.send_header("Content-Type", "application/json")
    h.send_header("Content-Length", "1000000")
    h.end_headers()
    h.close_connection = True
    while True:
        h.wfile.write(b" ")
        time.sleep(0.05)


def hangs(h: Handler) -> bool:
    """Longer than any test's time-out."""
    time.sleep(6)
    h.close_connection = True
    return True


def closes(h: Handler) -> bool:
    """Without a word."""
    h.close_connection = True
    return True


def closes_inside(h: Handler) -> bool:
    """In the middle of the answer."""
    h.send_response(200)
    h.send_header("Content-Type", "application/json")
    h.send_header("Content-Length", "500")
    h.end_headers()
    h.wfile.write(b'{"id": "c", "choices": [{"ind')
    h.close_connection = True
    return True


#: Everything that another try mends.
FAULTS: dict[str, Fault] = {
    "http_500": status(500),
    "http_503": status(503),
    "http_408": status(408),
    "http_409": status(409),
    "http_429": status(429, retry_after="0.2"),
    "timeout": hangs,
    "connection": closes,
    "connection_inside": closes_inside,
    "malformed_json": sends(b'{"choices": [{"message"'),
    "malformed_answer": sends({"choices": "none"}),
    "no_usage": sends({k: v for k, v in completion("Hi.").items() if k != "usage"}),
    "no_reason": sends({**completion("Hi."), "choices": [{"message": {"content": "Hi."}}]}),
    "0_choices": sends(completion()),
    "2_choices": sends(completion("Hi.", "Ho.")),
    "invalid_utf8": sends(b'{"choices": [{"message": {"content": "caf\xff"}}]}'),
    "packed": packed,
    "no_count": sends(with_tokens(completion_tokens=True)),
    "countless": sends(with_tokens(completion_tokens=10**400)),
    "half_a_surrogate": sends(json.dumps(completion("\ud83d")).encode()),
}


def main(model: str, port: str, dies_at: str = "0") -> None:
    """A process of its own: MODEL PORT [N]; it dies at the N-th request."""

    def enough(h: Handler) -> bool:
        print("that is enough", flush=True)
        os._exit(3)

    with serving(int(port)) as server:
        server.model = model
        if int(dies_at):
            server.faults[int(dies_at) - 1] = enough
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
