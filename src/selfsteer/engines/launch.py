"""Servers and libraries that start processes of their own, outside of the ranks of a training."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Self

from selfsteer.errors import ConfigError, EngineError, short
from selfsteer.recipe import secrets
from selfsteer.terminal import progress_bar, say

#: Seconds between two looks at a server that is starting.
LOOK_EVERY_S = 0.25

#: Last characters of a server's log that an error shows.
LOG_TAIL = 400

#: Variables that make a process a rank of a launcher's world.
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "GROUP_", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_"),
    *("SELFSTEER_LAUNCHER", "TORCHELASTIC_", "ACCELERATE_", "FSDP_"),
)


def plain_environment() -> dict[str, str]:
    """This process's environment without what makes it one of several ranks."""
    in_world = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    return {k: v for k, v in os.environ.items() if not in_world or not k.startswith(_OF_RANKS)}


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


def check_command(launch: str) -> None:
    """Fails if the program of a ``launch`` command is not there.

    Raises:
        ConfigError: says which.
    """
    try:
        program = shlex.split(launch)[0]
    except ValueError as e:
        raise ConfigError(
            f"launch cannot be read as a command ({e}): {short(launch, 200)}."
        ) from None
    if shutil.which(program) is None:
        raise ConfigError(
            f"launch starts {short(program, 200)}, which is not a program here. Install it, or "
            "give its path."
        )


class LaunchedServer:
    """A server for one model on loopback; it ends with this block, or with this process.

    The log of a server that served well is removed.

    Args:
        launch: the command; ``{model}`` and ``{port}`` are filled in. No shell reads it.
        model: folder or hub id.
        log: file that gets what the server prints, with ``[key]`` in place of secrets.

    It gets this process's environment without keys of hosted servers (`secrets.KEYS`);
    the hub's token, which may be such a key as well, is not withheld.
    """

    def __init__(self, launch: str, model: str, log: Path) -> None:
        check_command(launch)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        words = [
            w.replace("{model}", model).replace("{port}", str(self.port))
            for w in shlex.split(launch)
        ]
        self.name, self.log, self.failed = Path(words[0]).name, log, False
        log.parent.mkdir(parents=True, exist_ok=True)
        withheld = secrets.KEYS - secrets.HUB_TOKENS
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "selfsteer.engines.keeper", *words],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in plain_environment().items() if k not in withheld},
                start_new_session=True,  # Ctrl-C is for this process, which ends the server
            )
        kept = secrets.KEYS | secrets.HUB_TOKENS | set(secrets.named_like_secrets())
        hidden = secrets.spellings(secrets.values_of(kept).values())
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended at once; `check` says so
            os.write(self._process.stdin.fileno(), f"{json.dumps(hidden)}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object = None, *rest: object) -> None:
        """Ends the server and its children."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        if kind is None and not self.failed:
            self.log.unlink(missing_ok=True)
            with suppress(OSError):  # other logs are there
                self.log.parent.rmdir()

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
                    raise self._error(
                        f"{self.name} did not answer on port {self.port} within {seconds:g} s. "
                        "Raise launch_timeout, or see"
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
            said = f"{self.name} ended with exit code {code}; finished answers are kept. See"
            raise self._error(said)

    def _error(self, said: str) -> EngineError:
        self.failed = True
        tail = " ".join(self.log.read_text("utf-8", errors="replace")[-LOG_TAIL:].split())
        return EngineError(f"{said} its log {self.log}: {tail or 'it is empty'}")

    def _answers(self) -> bool:
        # llama.cpp lists its model while it is still loading; only /health says so
        health = self._status("/health")
        return health == 200 or (health not in (None, 503) and self._status("/v1/models") == 200)

    def _status(self, path: str) -> int | None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        with closing(connection), suppress(OSError, HTTPException):
            connection.request("GET", path)
            return connection.getresponse().status
        return None
