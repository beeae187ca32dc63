"""Runs a command until standard input ends, then ends it with all its children.

The first line of that input is a list, in JSON, of texts that are not to be in what the command
prints: secrets, which are in no argument and no environment that the command could show.

``python -m selfsteer.engines.keeper COMMAND …`` stands between a run and the server that it
started: when the run goes, even by kill -9, the pipe between them closes and the server goes too.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

#: Seconds that a server has to end by itself.
GRACE_S = 10.0


def keep(command: list[str], hidden: list[bytes]) -> int:
    """Returns the command's exit code; prints what it prints, without the hidden texts."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # a session of its own: its process id is that of a group with all its children
        start_new_session=True,
        preexec_fn=_end_with_keeper if sys.platform == "linux" else None,
    )

    def end() -> None:
        with suppress(OSError):
            os.read(sys.stdin.fileno(), 1)  # nothing follows: it returns when the pipe is closed
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def show() -> None:
        assert child.stdout is not None
        for part in cleaned(iter(partial(os.read, child.stdout.fileno(), 1 << 16), b""), hidden):
            with suppress(OSError):  # a full disk is no reason to stop reading: it would wait
                os.write(sys.stdout.fileno(), part)

    threading.Thread(target=end, daemon=True).start()
    shown = threading.Thread(target=show, daemon=True)
    shown.start()
    code = child.wait()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # children that outlived it
    shown.join(GRACE_S)  # one in a session of its own could still hold the pipe
    return code


def cleaned(parts: Iterable[bytes], hidden: list[bytes]) -> Iterator[bytes]:
    """The parts with ``[key]`` for each hidden text, also where one lies across two parts.

    >>> list(cleaned([b"a se", b"cret, a se"], [b"secret"]))
    [b'a ', b'[key], a ', b'se']
    """
    held = b""
    for part in parts:
        held += part
        for text in hidden:
            held = held.replace(text, b"[key]")
        # what may be the beginning of one waits for the rest
        longest = min(max(map(len, hidden), default=1) - 1, len(held))
        ends = (n for n in range(longest, 0, -1) if any(t.startswith(held[-n:]) for t in hidden))
        kept = next(ends, 0)
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


def _end_with_keeper() -> None:
    """Has Linux end this process when its parent does, as by kill -9 of the keeper alone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    given = json.loads(sys.stdin.readline() or "[]")
    sys.exit(keep(sys.argv[1:], [text.encode("utf-8", "surrogateescape") for text in given]))
