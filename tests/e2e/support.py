"""Runs the real command line, in a process of its own or in this one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from selfsteer import cli
from selfsteer.data import jsonl
from selfsteer.data.digests import digest
from selfsteer.run.folder import logged, sealed
from selfsteer.run.sums import sums_of

TESTBED = "package:selfsteer.testbed/checkpoint"

#: The smoke recipe, smaller still: two shards of eight queries.
TINY = (
    "queries.limit=16",
    "principles.shard_size=8",
    "sampling.shard_size=8",
    "evaluation.queries.limit=8",
    "generator.batch_size=4",
    "training.batch_size=4",
    "generator.save_every_steps=2",
    "training.save_every_steps=2",
    "policy.threads=1",
)


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "selfsteer.cli", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", **more}


def spawn(*args: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Here:
    """The command line in this process: the same main(), without a new interpreter."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *args: Any) -> Ended:
        code = 0
        with mock.patch.object(sys, "argv", ["selfsteer", *map(str, args)]):
            try:
                cli.main()
            except SystemExit as e:
                code = int(e.code or 0)
        captured = self.capsys.readouterr()
        return Ended(code, captured.out, captured.err)


def fails(ended: Ended, code: int, *said: str) -> None:
    """One paragraph on stderr, this exit code, and these words in it."""
    assert ended.code == code, ended
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("selfsteer: "), ended.err
    assert "Traceback" not in ended.err
    for words in said:
        assert words in last, last


def full_for(name: str) -> Any:
    """A patch under which every write to a file of this name meets a device that is always full."""

    def opened(path: Any, mode: str = "r", **kwargs: Any) -> Any:
        full = mode == "wb" and Path(path).name == f".{name}.partial"
        return open("/dev/full" if full else path, mode, **kwargs)

    return mock.patch.object(jsonl, "open", opened, create=True)


def artefacts(run: Path) -> dict[str, bytes]:
    """The text that a run made: what must not depend on interruptions."""
    found = {}
    for pattern in (
        "queries.jsonl",
        "**/principles.jsonl",
        "**/filtered.jsonl",
        "**/shard-*.jsonl",
    ):
        for path in run.glob(pattern):
            if "superseded" not in path.parts:
                found[str(path.relative_to(run))] = path.read_bytes()
    found["evaluation.json"] = (run / "evaluation.json").read_bytes()
    return found


def accepted(run: Path, edit: Callable[[str], str] = lambda line: line) -> None:
    """Has a run's ledger know its files as they are now, as if its stages had made them so.

    Args:
        run: what a test made of a finished run.
        edit: what else it makes of each line of the ledger.
    """
    path, known, out = run / "ledger.jsonl", logged(run / "metrics.jsonl"), []
    for line in path.read_text().splitlines():
        entry = json.loads(edit(line))
        entry.pop("crc32", None)
        if "sums" in entry:
            entry["sums"] = sums_of(run, [n for n in entry["sums"] if (run / n).is_file()])
        if "logged" in entry.get("notes", {}):
            entry["notes"]["logged"] = digest(known.get(entry["stage"], []))
        out.append(sealed(json.dumps(entry, ensure_ascii=False)) + "\n")
    path.write_text("".join(out))


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def finished(run: Path) -> dict[str, dict[str, Any]]:
    return {e["stage"]: e for e in ledger(run) if e["event"] == "finish"}


#: The command line, but it stops itself where the stage begins that is its first argument.
PAUSING = Path(__file__).with_name("pausing.py")


def wait_until_stopped(running: subprocess.Popen[str]) -> None:
    """Until it has stopped itself; fails if it ends instead."""
    _, status = os.waitpid(running.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), running.communicate()


@contextmanager
def process(
    *args: Any, cwd: Path | None = None, program: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A running command, or ``program``, that is killed at the end of the block, always."""
    running = subprocess.Popen(
        [sys.executable, str(program), *map(str, args)] if program else command(*args),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell hands down a Ctrl-C that is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def until(
    condition: Callable[[], bool], running: subprocess.Popen[str], seconds: float = 600
) -> None:
    """Waits for something that a running command does; its own end is an error."""
    end = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
