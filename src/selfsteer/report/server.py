"""The pages of runs, served live: read-only, to whoever may see them.

A request names a run and a set of triples, and both must be among those found in the folder: no
path of a request is ever opened. The server answers to hosts that an attacker's name cannot be
made to mean (against DNS rebinding), and where others can reach it, only with its token.
"""

import contextlib
import errno
import hashlib
import ipaddress
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, quote, urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfsteer.data.digests import digest
from selfsteer.errors import ArtifactError, ConfigError, DataError, SelfsteerError, short
from selfsteer.report import live
from selfsteer.report.browser import Index, Wanted, index_file
from selfsteer.report.colours import LEVELS
from selfsteer.report.page import asset, finite, render
from selfsteer.view import RunView, Sampled

#: Where a bookmark finds it again; any free port where this one is taken.
PORT = 8327

#: A page asks again after so many seconds; where many are open, all together so often a second, and
#: each after so many seconds at the latest.
NEXT, MOST_A_SECOND, LONGEST = 2.0, 10.0, 30.0

#: Seconds for which what was read of a run is shown to whoever asks.
FRESH = 2.0

#: Rows of one page of the list at most.
MOST_ROWS = 500

#: Sent with every answer; a page's own policy stands in the page (report/page.py).
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Who may ask, and what: reading only, a host that is ours, the token where there is one."""

    def __init__(self, app: ASGIApp, token: str | None, hosts: Sequence[str]) -> None:
        self.app, self.token = app, token
        # what the cookie holds: plain letters, and no way back to the token
        self.key = hashlib.sha256((token or "").encode()).hexdigest()
        self.hosts = {"localhost", socket.gethostname().lower(), *(h.lower() for h in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself where it refuses."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks anything else
            return
        request = Request(scope)

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        answer = self._refusal(request) or self._welcome(request)
        await (answer or self.app)(scope, receive, safely)

    def _refusal(self, request: Request) -> Response | None:
        fetch = {k: request.headers.get(f"sec-fetch-{k}") for k in ("site", "mode", "dest")}
        # a link may lead here, but to nothing that starts a job, and into no frame
        link = (fetch["mode"], fetch["dest"]) == ("navigate", "document")
        elsewhere = fetch["site"] in ("cross-site", "same-site")
        reasons = {
            (405, "This server only shows."): request.method not in ("GET", "HEAD"),
            (
                421,
                "This server does not go by that name; see selfsteer view --allow-host.",
            ): not self._is_ours(request.headers.get("host", "")),
            # they could not read the answer, but start work
            (403, "Pages of other sites cannot ask for this; open the address by hand."): elsewhere
            and not (link and not request.url.path.startswith(("/api/", "/report"))),
            (
                401,
                "The token is missing or wrong; open the address that selfsteer view printed.",
            ): self.token is not None and not self._knows_token(request),
        }
        return next((refusal(request, *why) for why, applies in reasons.items() if applies), None)

    def _is_ours(self, host: str) -> bool:
        """An address in numbers cannot be rebound; a name must be one of ours."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.removeprefix("[").removesuffix("]").lower()
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name in self.hosts

    def _knows_token(self, request: Request) -> bool:
        given = request.query_params.get("token", "").encode()
        if secrets.compare_digest(given, (self.token or "").encode()):
            return True
        cookie = request.cookies.get(_cookie(request), "")
        return secrets.compare_digest(cookie.encode(), self.key.encode())

    def _welcome(self, request: Request) -> Response | None:
        """Takes a token out of the address, where history and screenshots would keep it."""
        if self.token is None or "token" not in request.query_params:
            return None
        if request.url.path.startswith("/api/"):
            return None
        rest = [(k, v) for k, v in parse_qsl(request.url.query) if k != "token"]
        target = request.url.path.lstrip("/")
        answer = RedirectResponse(f"/{target}{f'?{urlencode(rest)}' if rest else ''}", 303)
        # lax: a link in a chat or a notebook leads here from another site
        answer.set_cookie(_cookie(request), self.key, httponly=True, samesite="lax")
        return answer


def refusal(request: Request, status: int, error: str) -> Response:
    """Why there is no answer: as JSON to a script, as a page to a person."""
    if request.scope["path"].startswith("/api/"):
        return Figures({"error": error}, status)
    title = HTTPStatus(status).phrase
    return HTMLResponse(render("error.html.j2", title=title, error=error), status)


class Figures(JSONResponse):
    """JSON in which a figure that is no number, as a broken file may hold it, is null."""

    def render(self, content: Any) -> bytes:
        """As the base class, which refuses such figures."""
        return super().render(finite(content))


def _cookie(request: Request) -> str:
    # cookies are shared between the ports of a host
    return f"selfsteer-{(request.scope.get('server') or ('', 0))[1]}"


@dataclass
class Job:
    """A piece of work in a process of its own, and the file that it prints into."""

    key: str
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    began: float
    ended: float | None = None

    def lines(self) -> list[str]:
        """What it has printed so far."""
        # not by seeking: the process writes at the same place
        said = os.pread(self.said.fileno(), os.fstat(self.said.fileno()).st_size, 0)
        return said.decode(errors="replace").splitlines()


class Jobs:
    """Work that takes seconds, each piece in a process of its own; one at a time by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.running: dict[Any, Job] = {}

    def ask(self, name: Any, key: str, arguments: Sequence[str]) -> dict[str, Any] | None:
        """Starts a job, unless it works already or did a moment ago; says how far it is.

        Args:
            name: what is made.
            key: of the state that it is made from.
            arguments: of a Python that makes it, and may print ``done total`` lines.

        Returns:
            None where it is not working now: it will be asked again.

        Raises:
            SelfsteerError: the last try, from this very state, failed; says why.
        """
        with self._lock:
            job, now = self.running.get(name), time.monotonic()
            if job is not None and (code := job.process.poll()) is not None:
                job.ended = job.ended or now
                if code and job.key == key:
                    raise SelfsteerError((job.lines() or [f"exit code {code}"])[-1])
                # a stage that is being sampled changes every few seconds
                if now - job.ended < 2 * (job.ended - job.began):
                    return None
                job.said.close()
                job = None
            if job is None:
                said = tempfile.TemporaryFile()  # noqa: SIM115
                # nothing is imported from where somebody stands
                command = [sys.executable, "-P", *arguments]
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
                )
                job = self.running[name] = Job(key, process, said, now)
            counted = [x.split() for x in job.lines() if re.fullmatch(r"\d+ \d+", x)]
            done, total = counted[-1] if counted else (0, 0)
            return {"done": int(done), "total": int(total)}

    def close(self) -> None:
        """Ends what is being made."""
        with self._lock:
            for job in self.running.values():
                job.process.terminate()
                job.process.wait()
                job.said.close()


class Turns:
    """When a page that is open may ask again: two seconds on, or later where many are.

    Reading a run must not cost the run its processor, however many look on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0.0

    def next(self, now: float) -> float:
        """Seconds until the next free turn, which is taken by this.

        Args:
            now: a clock's seconds.
        """
        with self._lock:
            free = max(now + NEXT, self._last + 1 / MOST_A_SECOND)
            # a reader that asks without a pause must not stop the others
            self._last = min(free, now + LONGEST)
            return self._last - now


class Shared:
    """What was read of a run a moment ago, as JSON, the same for all who ask."""

    def __init__(self, read: Callable[[Path], dict[str, Any]]) -> None:
        self._lock, self._read = threading.Lock(), read
        self._known: dict[Path, tuple[float, bytes]] = {}

    def __call__(self, path: Path) -> bytes:
        """What was read of it, at most `FRESH` seconds old; read by one of them at a time."""
        with self._lock:
            found = self._known.get(path)
            if found is None or time.monotonic() - found[0] > FRESH:
                made = bytes(Figures(self._read(path)).body)
                found = self._known[path] = (time.monotonic(), made)
            return found[1]


class Pages:
    """The routes of one folder or run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.turns, self.now = Turns(), Shared(live.now)
        self._live = lru_cache(maxsize=64)(self._live_page)
        self.single = (root / "resolved.json").is_file()
        self.jobs = Jobs()
        self._open = lru_cache(maxsize=8)(Index)
        self._drawn = tempfile.TemporaryDirectory(prefix="selfsteer-view-")

    def close(self) -> None:
        """Ends the running jobs and removes the temporary pages."""
        self.jobs.close()
        self._drawn.cleanup()

    # -- what a request names ---------------------------------------------------------------------

    def run(self, request: Request) -> tuple[str, Path]:
        """The run that is asked for.

        Raises:
            HTTPException: 404 where the folder has none of that name.
        """
        runs, name = live.discover(self.root), request.query_params.get("run", "")
        if self.single:
            ((name, path),) = runs.items()
            return name, path
        if name not in runs:
            raise HTTPException(404, f"There is no run {short(name)} in {self.root.name}.")
        return name, runs[name]

    def rows(self, request: Request) -> Sampled:
        """The set of triples that is asked for; by default the first.

        Raises:
            HTTPException: 404 where the run has none of that name.
        """
        _, path = self.run(request)
        name = request.query_params.get("set", "")
        for found in RunView.open(path).sampled:
            if name in (found.name, ""):
                return found
        raise HTTPException(404, f"There are no triples {short(name)} yet." if name else NO_TRIPLES)

    def index(self, rows: Sampled) -> tuple[Index | None, dict[str, Any] | None]:
        """The newest index of a set, perhaps of an earlier state, and how far the next one is.

        Raises:
            SelfsteerError: it cannot be made.
        """
        path, run = index_file(rows), rows.round.run.folder
        if path.exists():
            with contextlib.suppress(FileNotFoundError, ArtifactError):  # damaged: made again
                return self._open(path), None
        arguments = ["-m", "selfsteer.report.browser", str(run), rows.name]
        building = self.jobs.ask((run, rows.name), path.name, arguments)
        # the one that a job has just replaced may go while it is looked at
        with contextlib.suppress(FileNotFoundError, ArtifactError):
            earlier = sorted(path.parent.glob(f"{path.stem}.*"), key=lambda p: p.stat().st_mtime)
            return self._open(earlier[-1]) if earlier else None, building
        return None, building

    # -- pages ------------------------------------------------------------------------------------

    def home(self, request: Request) -> Response:
        """All runs; of a single one, what it does now."""
        if self.single:
            return RedirectResponse("/live", 303)
        return self._page("runs.html.j2", "runs", "", ["runs.js"], folder=self.root.resolve().name)

    def live(self, request: Request) -> Response:
        """What a run does now."""
        name, _ = self.run(request)
        return HTMLResponse(self._live(name))

    def _live_page(self, name: str) -> bytes:
        return bytes(self._page("live.html.j2", name, name, ["live.js"]).body)

    def data(self, request: Request) -> Response:
        """The data browser."""
        name, path = self.run(request)
        sets = [s.name for s in RunView.open(path).sampled]
        start = {"run": name, "sets": sets, "rows": None, "levels": LEVELS}
        return self._page("browser.html.j2", f"{name}: triples", name, ["browser.js"], start=start)

    def report(self, request: Request) -> Response:
        """The report of a run as it is now; drawn again when a stage has ended."""
        name, path = self.run(request)
        key = digest([[s.name, s.done, s.fingerprint, s.time] for s in RunView.open(path).stages])
        drawn = Path(self._drawn.name) / digest(str(path)) / key / "report.html"
        if drawn.exists():
            return HTMLResponse(drawn.read_text("utf-8"))
        self.jobs.ask(
            path, key, ["-m", "selfsteer.cli", "report", "--out", str(drawn), "--", str(path)]
        )
        return self._page("wait.html.j2", f"{name}: report", name, [])

    def _page(
        self, template: str, title: str, run: str, scripts: list[str], **values: Any
    ) -> Response:
        html = render(
            template,
            title=title,
            scripts=["dom.js", *scripts],
            connect="'self'",
            wide=template not in ("live.html.j2", "wait.html.j2"),
            run=run,
            several=not self.single,
            browser_style=asset("browser.css"),
            **values,
        )
        return HTMLResponse(html)

    # -- data -------------------------------------------------------------------------------------

    def api_runs(self, request: Request) -> Response:
        """A row per run."""
        return Figures({"runs": live.compare(live.discover(self.root))})

    def api_live(self, request: Request) -> Response:
        """A run as it is now, and in how many seconds to ask again."""
        _, path = self.run(request)
        wait = self.turns.next(time.monotonic())
        body = self.now(path).removesuffix(b"}") + f',"next":{wait:.2f}}}'.encode()
        return Response(body, media_type="application/json")

    def api_rows(self, request: Request) -> Response:
        """A page of the list."""
        rows, query, wanted = self.rows(request), request.query_params, _wanted(request)
        offset, limit = _whole(query.get("offset"), 0), _whole(query.get("limit"), 50)
        index, building = self.index(rows)
        working = rows.round.run.state == "working"
        answer: dict[str, Any] = {"building": building, "working": working, "total": 0, "of": 0}
        if index is None:
            # the next answer has it: making one takes seconds, even of nothing
            empty = {"rows": [], "building": building or {"done": 0, "total": 0}}
            return Figures(answer | empty)
        found = index.find(wanted)
        answer |= {"rows": index.page(wanted, offset, min(limit, MOST_ROWS)), "total": len(found)}
        return Figures(answer | index.summary())

    def api_triple(self, request: Request) -> Response:
        """One triple, whole."""
        index, building = self.index(self.rows(request))
        identity = request.query_params.get("id", "")
        if index is None:
            return Figures({"building": building or {"done": 0, "total": 0}})
        number = index.number(identity)
        if number is None:
            raise HTTPException(404, f"There is no triple {short(identity)} here, or not yet.")
        return Figures(next(index.records([number])))

    def api_export(self, request: Request) -> Response:
        """The triples of a selection as JSONL."""
        rows, wanted = self.rows(request), _wanted(request)
        index, _ = self.index(rows)
        if index is None:
            raise HTTPException(503, "The index is being made; try again in a moment.")
        name = f"{rows.round.run.folder.resolve().name}-{rows.name.replace('/', '-')}.jsonl"
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
        lines = index.export(wanted)
        return StreamingResponse(lines, media_type="application/jsonl", headers=headers)

    def routes(self) -> list[Route]:
        """All there is."""
        return [
            Route("/", self.home),
            Route("/live", self.live),
            Route("/data", self.data),
            Route("/report", self.report),
            Route("/api/runs", self.api_runs),
            Route("/api/live", self.api_live),
            Route("/api/rows", self.api_rows),
            Route("/api/triple", self.api_triple),
            Route("/api/export", self.api_export),
        ]


NO_TRIPLES = "There are no triples: no shard is finished yet, or the method samples none."


def _whole(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise HTTPException(400, f"offset and limit are whole numbers, found {text[:20]!r}.")
    return int(text)


def _wanted(request: Request) -> Wanted:
    texts = {f.name: request.query_params.get(f.name, "") for f in fields(Wanted)}
    try:
        return Wanted(**{**texts, "ascending": bool(texts["ascending"])})  # type: ignore[arg-type]
    except DataError as e:
        raise HTTPException(400, str(e)) from None


def app(root: Path, token: str | None = None, hosts: Sequence[str] = ()) -> Guard:
    """The server of a run or of a folder of runs, as an ASGI application.

    Args:
        root: the run folder, or the folder of runs.
        token: what a visitor has to know; None where only this machine can ask.
        hosts: more names that it goes by.
    """
    pages = Pages(root)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        pages.close()

    def refused(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = error.detail if isinstance(error, HTTPException) else str(error)
        return refusal(request, status, text)

    inner = Starlette(
        routes=pages.routes(),
        lifespan=lifespan,
        exception_handlers={HTTPException: refused, SelfsteerError: refused, Exception: refused},
    )
    return Guard(inner, token, hosts)


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket; without a port `PORT`, or a free one where that is taken.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in [PORT, 0] if port is None else [port]:
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, wanted))
        except OSError as e:
            bound.close()
            if port is None and wanted == PORT and e.errno == errno.EADDRINUSE:
                continue
            raise ConfigError(
                f"{host}:{wanted} cannot be listened on ({e.strerror}). Choose another --port, "
                "leave it out for a free one, or another --host."
            ) from e
        bound.listen()
        return bound
    raise AssertionError


def serve(root: Path, bound: socket.socket, token: str | None, hosts: Sequence[str]) -> None:
    """Serves until it is interrupted."""
    import uvicorn

    config = uvicorn.Config(
        app(root, token, hosts),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])
