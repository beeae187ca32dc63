"""Ctrl-C, SIGTERM, time that is up: a process that was asked to stop does, and loses no work.

The signal raises `KeyboardInterrupt` at once, but in a `deferred` block, which finishes the step
that it is in. A second signal, or `GRACE_S` without an end of that step, raises it there as well;
SIGUSR1, which schedulers send early, sets no such limit, and a signal after it counts as the first.
Python drops an exception that is raised inside a finalizer or a callback from C, so the request is
remembered, and `if_asked` raises it again.
"""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

#: How long a deferred block may take to end by itself: many schedulers kill 30 s after SIGTERM.
GRACE_S = 28.0

#: The longest time after which a process can be asked to stop: a year.
LONGEST_S = 366 * 86400.0

#: What a process exits with that stopped because its time is up: EX_TEMPFAIL, "try again".
OUT_OF_TIME = 75

#: Signals that ask to stop; schedulers send the last one some time before their limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

#: The command that goes on with what this process was doing, once there is something to go on with.
way_on: str | None = None

#: Whether what this process has finished is there for the next one.
keeps = True

_asked: signal.Signals | None = None
_deferred = 0  # blocks inside each other
_at_once = False  # also in deferred blocks


def listen() -> None:
    """Takes both signals from now on; one that the parent process ignores stays ignored.

    What was asked of an earlier command in the same process is forgotten.
    """
    global _asked, _at_once, way_on, keeps
    _asked, _at_once, way_on, keeps = None, False, None, True
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    before = _asked
    if before not in (None, signal.SIGUSR1):
        _late(number, frame)
    _asked = signal.Signals(number)
    if not _deferred:
        raise KeyboardInterrupt
    _limit()
    if _asked is not before:
        # not print(): the handler may have interrupted one
        os.write(2, b"\nstopping after this step; Ctrl-C or SIGTERM now stops sooner\n")


def _limit() -> None:
    """Bounds what is left of a deferred block, but where time is up: then there is some left."""
    if _asked is not signal.SIGUSR1:
        signal.signal(signal.SIGALRM, _late)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)


def _late(number: int, frame: FrameType | None) -> None:
    global _at_once
    _at_once = True
    raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[None]:
    """A block that looks at `asked` after each of its steps, and ends soon once it is true.

    Raises:
        KeyboardInterrupt: at its end, if the process was asked to stop.
    """
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
        if not _deferred and _asked is not None:  # else the timer is not ours
            signal.setitimer(signal.ITIMER_REAL, 0)
    if_asked()


@contextmanager
def interruptible() -> Iterator[None]:
    """A part of a deferred block that can be begun again: there a signal raises at once."""
    global _deferred
    before, _deferred = _deferred, 0
    try:
        yield
    finally:
        _deferred = before
        if before and _asked is not None:
            _limit()


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _asked is not None


def if_asked() -> None:
    """Raises `KeyboardInterrupt` if this process was asked to stop and should have, but works."""
    if _asked is not None and (_at_once or not _deferred):
        raise KeyboardInterrupt


def end(number: int) -> NoReturn:
    """Ends this process as it ends at a signal, one that somebody else has taken.

    Raises:
        KeyboardInterrupt: always.
    """
    global _asked
    _asked = signal.Signals(number)
    raise KeyboardInterrupt


def exit_code() -> int:
    """What a process that was asked to stop exits with.

    130 after Ctrl-C, 143 after SIGTERM, 75 where the time is up.
    """
    return OUT_OF_TIME if _asked is signal.SIGUSR1 else 128 + (_asked or signal.SIGINT)


def after(seconds: float) -> None:
    """Asks this process to stop when so many seconds have passed."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.daemon = True
    timer.start()


def seconds_of(text: str) -> float | None:
    """The seconds that a person means; None where that is not clear, or more than a year.

    >>> seconds_of("2h"), seconds_of("1h30m"), seconds_of("45s"), seconds_of("2 hours")
    (7200.0, 5400.0, 45.0, None)
    """
    found = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text, re.ASCII)
    if not text or not found:
        return None
    hours, minutes, seconds = (float(n or 0) for n in found.groups())
    sum_ = 3600 * hours + 60 * minutes + seconds
    return sum_ if sum_ <= LONGEST_S else None
