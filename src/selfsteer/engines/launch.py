"""A server of one's own choice, started for one model on loopback and ended with its stage."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from selfsteer.errors import ConfigError, EngineError
from selfsteer.terminal import progress_bar, say

#: Seconds between two looks at a server that is starting.
LOOK_EVERY_S = 0.25

#: Last characters of a server's log that an error shows.
LOG_TAIL = 400


#: Set by `run.ranks.launch` for its ranks: the process id of the one that started them.
LAUNCHER = "SELFSTEER_LAUNCHER"

#: What a rank inherits from its launcher; servers that it starts must not take themselves for one.
_OF_RANKS = ("RANK", "LOCAL_RANK", "GROUP_", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_")
_OF_LAUNCHERS = (LAUNCHER, "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def in_world() -> bool:
    """Whether this process is one of several ranks, even where the several are one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def plain_environment() -> dict[str, str]:
    """This process's environment without what makes it a rank."""
    theirs = (*_OF_RANKS, *_OF_LAUNCHERS)
    return {k: v for k, v in os.environ.items() if not in_world() or not k.startswith(theirs)}


@contextmanager
def out_of_world() -> Iterator[None]:
    """For this block the process has that environment: for libraries that start others by it.

    Without it they would take themselves for a rank, and wait for peers that do something else.
    """
    plain = plain_environment()
    removed = {k: os.environ.pop(k) for k in os.environ.keys() - plain.keys()}
    try:
        yield
    finally:
        os.environ.update(removed)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def check_command(launch: str) -> None:
    """Fails if the program of a ``launch`` command is not there.

    Raises:
        ConfigError: says which.
    """
    try:
        words = shlex.split(launch)
    except ValueError as e:
        raise ConfigError(f"launch cannot be read as a command ({e}): {launch!r}.") from None
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"launch starts {words[0]!r}, which is no program here. Install it, or give its path."
        )


class LaunchedServer:
    """A server that lives until `close`, or until this process is gone.

    Args:
        launch: the command; ``{model}`` and ``{port}`` are filled in. No shell reads it.
        model: folder or hub id.
        log: file that gets what the server prints.
        hidden: environment variable that the server does not get: the key of hosted servers.
    """

    def __init__(self, launch: str, model: str, log: Path, hidden: str) -> None:
        check_command(launch)
        self.log, self.port = log, free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        words = [
            w.replace("{model}", model).replace("{port}", str(self.port))
            for w in shlex.split(launch)
        ]
        self.name = Path(words[0]).name
        self.failed = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "selfsteer.engines.keeper", *words],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in plain_environment().items() if k != hidden},
                start_new_session=True,  # Ctrl-C is for this process, which ends the server
            )

    def wait(self, seconds: float) -> None:
        """Returns when the server answers.

        Raises:
            EngineError: it ended, or did not answer in time.
        """
        start = time.monotonic()
        with progress_bar(f"starting {self.name}", None) as bar:
            while not self._answers():
                self.check()
                if time.monotonic() - start > seconds:
                    self.failed = True
                    raise EngineError(
                        f"{self.name} did not answer on port {self.port} within {seconds:g} s. "
                        f"Raise launch_timeout, or look at its log {self.log}: {self._tail()}"
                    )
                time.sleep(LOOK_EVERY_S)
                bar.advance(0)
        say(f"  {self.name} answers after {time.monotonic() - start:.0f} s")

    def check(self) -> None:
        """Fails if the server has ended.

        Raises:
            EngineError: with the end of its log.
        """
        code = self._process.poll()
        if code is not None:
            self.failed = True
            raise EngineError(
                f"{self.name} ended with exit code {code}; finished shards are kept. See its log "
                f"{self.log}: {self._tail()}"
            )

    def close(self) -> None:
        """Ends the server and its children."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tail(self) -> str:
        text = self.log.read_text("utf-8", errors="replace")[-LOG_TAIL:]
        return " ".join(text.split()) or "it is empty"

    def _answers(self) -> bool:
        # llama.cpp lists its model while it is still loading; only /health says so
        health = self._status("/health")
        if health in (None, 200, 503):
            return health == 200
        return self._status("/v1/models") == 200

    def _status(self, path: str) -> int | None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as e:
            e.close()
            return e.code
        except (OSError, HTTPException):
            return None
