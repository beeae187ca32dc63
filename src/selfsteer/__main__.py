"""The program: what ``selfsteer`` and ``python -m selfsteer`` start, a rank's launcher included."""

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
    from selfsteer.cli import main

    main()


if __name__ == "__main__":
    main()
