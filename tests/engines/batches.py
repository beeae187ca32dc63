"""A server of files and batches on loopback, and a run of its own process that can be killed.

A batch is over after some looks at it. What becomes of its requests is up to `Ending`; the lines of
answers stand in the files in reverse order.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from selfsteer.data.records import Message
from selfsteer.engines import batch
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Completion, Request, SamplingParams
from selfsteer.engines.batch import BatchEngine
from selfsteer.engines.usage import Usage
from selfsteer.recipe.sections import EngineConfig
from tests.fakes import Handler, Server, completion

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=64)


@dataclass
class Ending:
    """How a batch ends.

    Args:
        status: its last one.
        looks: at which it is over.
        errors: of the batch itself.
        lines: what becomes of a request's line, by the number of its query: (HTTP status, error) in
            the file of errors, or None, which leaves it out of both files.
    """

    status: str = "completed"
    looks: int = 2
    errors: Any = None
    lines: dict[int, tuple[int, Any] | None] = field(default_factory=dict)


class BatchServer(Server):
    """Remembers each request that it answered in ``paid``, by the text of its query.

    ``endings`` are those of the batches as they are made; the last one is that of all further ones.
    ``seen`` has method and path of each request, ``before`` is called with each request's number
    before it is looked at, and ``after`` before it is answered; True drops the connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = BatchHandler
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.endings = [Ending()]
        self.paid = Counter[str]()
        self.seen: list[str] = []
        self.before: Callable[[int], bool] = lambda number: False
        self.after: Callable[[int], bool] = lambda number: False
        self.page = 100
        self.lacks = ""

    def make(self, file: str, metadata: Any) -> dict[str, Any]:
        name = f"batch_{len(self.batches)}"
        ending = self.endings[min(len(self.batches), len(self.endings) - 1)]
        lines = [json.loads(line) for line in self.files[file].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        made = {"id": name, "status": "validating", "metadata": metadata, "left": ending.looks}
        self.batches[name] = {**made, "ending": ending, "lines": lines}
        return self.shown(name)

    def shown(self, name: str) -> dict[str, Any]:
        hidden = ("left", "ending", "lines")
        return {k: v for k, v in self.batches[name].items() if k not in hidden}

    def look(self, name: str) -> dict[str, Any]:
        one = self.batches[name]
        ending: Ending = one["ending"]
        one["left"] -= 1
        if one["status"] in ("validating", "in_progress"):
            one["status"] = "in_progress" if one["left"] > 0 else ending.status
            if one["left"] <= 0:
                self.end(name, one, ending)
        return self.shown(name)

    def end(self, name: str, one: dict[str, Any], ending: Ending) -> None:
        if ending.status == "failed":
            one["errors"] = {"object": "list", "data": [ending.errors]}
            return
        said, failed = [], []
        for line in reversed(one["lines"]):
            query = line["body"]["messages"][-1]["content"]
            fate = ending.lines.get(int(re.findall(r"\d+", query)[0]), (200, None))
            if fate is None:
                continue
            status, error = fate
            row = {"id": "x", "custom_id": line["custom_id"], "error": None}
            if status == 200:
                self.paid[query] += 1
                body = completion(self.answer(line["body"]))
                said.append({**row, "response": {"status_code": 200, "body": body}})
            elif status:
                failed.append(
                    {**row, "response": {"status_code": status, "body": {"error": error}}}
                )
            else:
                failed.append({**row, "response": None, "error": error})
        for kind, rows in (("output", said), ("error", failed)):
            if rows:
                text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
                self.files[f"{kind}_{name}"] = text.encode()
                one[f"{kind}_file_id"] = f"{kind}_{name}"
        done = len(said) + len(failed)
        one["request_counts"] = {"total": len(one["lines"]), "completed": done, "failed": 0}


class BatchHandler(Handler):
    server: BatchServer
    disable_nagle_algorithm = True  # else each answer waits 40 ms

    def do_GET(self) -> None:
        self._do(lambda path, query: self._get(path, query))

    def do_POST(self) -> None:
        if self.path.endswith("/chat/completions"):
            super().do_POST()
            return
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self._do(lambda path, query: self._post(path, data))

    def _do(self, work: Callable[[str, dict[str, list[str]]], tuple[int, Any]]) -> None:
        server, place = self.server, urlsplit(self.path)
        path = place.path.removeprefix("/v1")
        with server.lock:
            number = len(server.seen)
            server.seen.append(f"{self.command} {path}")
            server.keys.add(self.headers["Authorization"])
            dropped = server.before(number)
            found = (404, {}) if dropped else work(path, parse_qs(place.query))
            dropped = dropped or server.after(number)
        if dropped:
            self.close_connection = True
        elif server.always is None or not server.always(self):
            self.send(*found)

    def _get(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        server, (_, kind, *rest) = self.server, path.split("/")
        if kind == server.lacks:
            return 404, {"error": {"message": "Not Found", "code": None}}
        if kind == "models":
            return 200, {"object": "list", "data": [{"id": "canned", "object": "model"}]}
        if kind == "files":
            return 200, server.files[rest[0]]
        if rest:
            if rest[0] in server.batches:
                return 200, server.look(rest[0])
            return 404, {"error": {"message": "No such batch", "code": None}}
        names = list(reversed(server.batches))
        start = names.index(query["after"][0]) + 1 if "after" in query else 0
        part = names[start : start + server.page]
        listed = {"data": [server.shown(n) for n in part], "object": "list"}
        return 200, {**listed, "has_more": start + server.page < len(names)}

    def _post(self, path: str, data: bytes) -> tuple[int, Any]:
        server = self.server
        if path == f"/{server.lacks}":
            return 404, {"error": {"message": "Not Found", "code": None}}
        if path == "/files":
            assert b'name="purpose"\r\n\r\nbatch\r\n' in data
            text = data.split(b"application/jsonl\r\n\r\n")[1].rsplit(b"\r\n--", 2)[0]
            name = f"file_{len(server.files)}"
            server.files[name] = text.split(b"\r\n--")[0]
            return 200, {"id": name, "object": "file"}
        body = json.loads(data)
        assert (body["endpoint"], body["completion_window"]) == ("/v1/chat/completions", "24h")
        return 200, server.make(body["input_file_id"], body["metadata"])


@contextmanager
def serving_batches() -> Iterator[BatchServer]:
    server = BatchServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def requests(count: int) -> list[Request]:
    return [Request(f"q{i}", (Message("user", f"Query {i}"),), i) for i in range(count)]


@contextmanager
def asking(url: str, folder: Path, **settings: Any) -> Iterator[BatchEngine]:
    """An engine of the run in this folder."""
    values = {"kind": "openai", "base_url": url, "model": "canned", "batch": True, **settings}
    config = EngineConfig(**{"backoff": 0.001, "timeout": 20, **values})
    usage = Usage(folder / "usage.json", config.price)
    with closing(BatchEngine(folder / "batches", config, "canned", url, usage)) as engine:
        yield engine


def ask(engine: BatchEngine, folder: Path, asked: Sequence[Request]) -> dict[str, Completion]:
    return answers(engine, asked, GREEDY, store=folder / "answers.jsonl")


def run(url: str, folder: Path, count: int, most: int) -> None:
    """What a process of its own does; it may be killed at any moment."""
    batch.FIRST_LOOK, batch.MOST_REQUESTS = 0.001, most
    with asking(url, folder) as engine:
        ask(engine, folder, requests(count))
