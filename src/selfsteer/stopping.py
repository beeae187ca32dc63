"""Ctrl-C and SIGTERM: a process that was asked to stop does stop, and knows why.

The signal raises `KeyboardInterrupt` at once. Python drops an exception that is raised inside a
finalizer or a callback from C, so the request is remembered, and `if_asked` raises it again.
"""

import signal
from types import FrameType

_asked: signal.Signals | None = None


def listen() -> None:
    """Takes both signals from now on; one that the parent process ignores stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ask)


def _ask(number: int, _: FrameType | None) -> None:
    global _asked
    _asked = signal.Signals(number)
    raise KeyboardInterrupt


def if_asked() -> None:
    """Raises `KeyboardInterrupt` if this process was asked to stop and still works."""
    if _asked is not None:
        raise KeyboardInterrupt


def exit_code() -> int:
    """What a process that was asked to stop exits with: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_asked or signal.SIGINT)
