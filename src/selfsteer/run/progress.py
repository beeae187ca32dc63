"""What a run is doing right now, for whoever looks at its folder: ``progress.json``.

The process that works writes it, once a second at most, and says in it who it is; so a reader can
tell a run that works from one that was killed, without touching the run's lock::

    {"state": "working", "pid": 41, "host": "gpu1", "process_began": 1763742000.0,
     "began": 1763742003.1, "time": 1763742100.7, "error": null,
     "stage": "iteration-1/triples", "todo": ["queries", "iteration-1/principles", …],
     "bar": {"label": "triples", "done": 512, "total": 1200, "tokens": 34000,
             "items_per_s": 5.4, "tokens_per_s": 6050.0, "seconds_left": 127.0}}
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
from typing_extensions import TypedDict  # pydantic asks for this one on Python 3.11

from selfsteer.data.artifacts import read_json
from selfsteer.data.jsonl import write_atomic
from selfsteer.errors import ArtifactError, SelfsteerError
from selfsteer.run.folder import RunFolder
from selfsteer.terminal import Bar, is_main_process, watched

FILE = "progress.json"

#: A run on another machine that has said nothing for so long may be gone.
SILENT_AFTER_S = 600.0


class _Bar(TypedDict):
    label: str
    done: int
    total: int | None
    tokens: int
    items_per_s: float
    tokens_per_s: float
    seconds_left: float | None


class _Progress(TypedDict):
    state: Literal["working", "ended", "interrupted", "failed"]
    pid: int
    host: str
    process_began: float
    began: float
    time: float
    error: str | None
    stage: str | None
    todo: list[str]
    bar: _Bar | None


class Reporter:
    """Keeps a run folder's ``progress.json``; a disk that refuses it does not end the run."""

    def __init__(self, run: RunFolder, stages: Sequence[str]) -> None:
        self._path = run / FILE
        self._turn = threading.Lock()
        pid = os.getpid()
        self._now: dict[str, Any] = {
            **dict.fromkeys(("stage", "bar", "error")),
            "pid": pid,
            "host": socket.gethostname(),
            "process_began": psutil.Process(pid).create_time(),
            "began": time.time(),
            "todo": list(stages),
        }
        self.write(state="working")

    def stage(self, name: str) -> None:
        """The stage that begins now."""
        self.write(stage=name, bar=None)

    def bar(self, bar: Bar) -> None:
        """How far the bar on the screen is."""
        items, tokens = bar.rates
        found = {name: getattr(bar, name) for name in ("label", "done", "total", "tokens")}
        rates = {"items_per_s": items, "tokens_per_s": tokens, "seconds_left": bar.seconds_left}
        self.write(bar={**found, **rates})

    def write(self, **news: Any) -> None:
        """Puts what is new into the file, unless another rank does."""
        if not is_main_process():
            return
        with self._turn, suppress(ArtifactError, OSError):
            self._now |= news
            text = json.dumps({**self._now, "time": time.time()}, ensure_ascii=False) + "\n"
            write_atomic(self._path, text, sync=False)


@contextmanager
def reported(run: RunFolder, stages: Sequence[str]) -> Iterator[Reporter]:
    """Reports on the block's work in a run folder that this process has locked.

    Args:
        run: the folder.
        stages: names of those that are to be done, in order.
    """
    reporter, ending = Reporter(run, stages), {"state": "ended"}
    try:
        with watched(reporter.bar):
            yield reporter
    except KeyboardInterrupt:
        ending = {"state": "interrupted"}
        raise
    except BaseException as e:
        said = str(e) if isinstance(e, SelfsteerError) else f"{type(e).__name__}: {e}"
        ending = {"state": "failed", "error": said}
        raise
    finally:
        reporter.write(bar=None, **ending)


def progress_of(run: Path) -> dict[str, Any] | None:
    """What a run's folder says of its last or present process; None where it says nothing sound.

    ``state`` is ``working``, ``ended``, ``interrupted`` or ``failed`` as the process wrote it;
    ``killed`` where that process is gone without a word; ``silent`` where it works, or worked, on
    another machine and has written nothing for `SILENT_AFTER_S`.
    """
    try:
        found: dict[str, Any] = read_json(_Progress, run / FILE)
    except ArtifactError:
        return None
    if found["state"] == "working":
        elsewhere = found["host"] != socket.gethostname()
        if elsewhere and time.time() - found["time"] > SILENT_AFTER_S:
            found["state"] = "silent"
        elif not elsewhere and _began(found["pid"]) != found["process_began"]:
            found["state"] = "killed"
    return found


def _began(pid: int) -> float | None:
    with suppress(psutil.Error, ValueError):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    return None
