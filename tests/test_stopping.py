"""Requests to stop: remembered even where Python drops the exception."""

import os
import signal
from collections.abc import Iterator

import pytest

from selfsteer import stopping


@pytest.fixture(autouse=True)
def _listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(stopping, "_asked", None)
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Finalizer:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_request_that_a_finalizer_swallows_is_raised_again() -> None:
    stopping.if_asked()
    made = Finalizer()
    del made  # Python prints "Exception ignored in" and goes on
    with pytest.raises(KeyboardInterrupt):
        stopping.if_asked()
    assert stopping.exit_code() == 130


def test_sigterm_has_its_own_exit_code() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.exit_code() == 143
