"""The program: what ``selfsteer`` and ``python -m selfsteer`` start, a rank's launcher included."""

import os
import signal
import sys
from importlib.util import find_spec


def main() -> None:
    """The command line, unless this system cannot run it."""
    if find_spec("fcntl") is None:
        print(
            "selfsteer: selfsteer runs on Linux and macOS (it locks run folders with fcntl, which "
            f"Python on {sys.platform} lacks). On Windows, install it inside WSL 2.",
            file=sys.stderr,
        )
        raise SystemExit(3)
    if "SELFSTEER_LAUNCHER" in os.environ and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # a rank ends at once while it has begun nothing
    from selfsteer.cli import main

    main()


if __name__ == "__main__":
    main()
