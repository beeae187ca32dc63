"""Runs a command until standard input ends, then ends it with all its children.

``python -m selfsteer.engines.keeper COMMAND …`` stands between a run and the server that it
started: when the run goes, even by kill -9, the pipe between them closes and the server goes too.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

#: Seconds that a server has to end by itself.
GRACE_S = 10.0


def keep(command: list[str]) -> int:
    """Returns the command's exit code."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        # a session of its own: its process id is that of a group with all its children
        start_new_session=True,
        preexec_fn=_end_with_keeper if sys.platform == "linux" else None,
    )

    def end() -> None:
        with suppress(OSError):
            os.read(sys.stdin.fileno(), 1)  # nobody writes: it returns when the pipe is closed
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    code = child.wait()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # children that outlived it
    return code


def _end_with_keeper() -> None:
    """Has Linux end this process when its parent does, as by kill -9 of the keeper alone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
