"""Requests to stop: remembered where Python drops the exception, deferred where work is kept."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from selfsteer import stopping

pytestmark = pytest.mark.usefixtures("listening")


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


@pytest.mark.parametrize(
    "text", ["1e400s", "99999999999h", "9" * 400 + "s", "8785h", "२h", "", "h"]
)
def test_a_time_that_no_limit_has_is_none(text: str) -> None:
    assert stopping.seconds_of(text) is None
    assert stopping.seconds_of("8784h") == 366 * 86400


def deferring(work: Callable[[], None]) -> None:
    """Work in a deferred block that is stopped by a signal, or after it."""
    with pytest.raises(KeyboardInterrupt), stopping.deferred():
        work()


def test_a_deferred_block_ends_its_step_and_raises_at_its_end() -> None:
    done = []

    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        stopping.if_asked()
        done.append(stopping.asked())

    deferring(work)
    assert done == [True]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert stopping.exit_code() == 143


def test_a_second_signal_stops_at_once() -> None:
    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        stopping.if_asked()  # raises also where Python dropped the one above
        pytest.fail("it went on")

    deferring(work)


def test_a_step_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE_S", 0.05)

    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)
        pytest.fail("it was not stopped")

    deferring(work)


def test_what_can_begin_again_is_stopped_at_once_and_leaves_time_for_the_rest() -> None:
    def work() -> None:
        with pytest.raises(KeyboardInterrupt), stopping.interruptible():
            signal.raise_signal(signal.SIGTERM)
        stopping.if_asked()
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= stopping.GRACE_S

    deferring(work)


def test_time_that_is_up_has_its_own_exit_code() -> None:
    stopping.after(0.05)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(30)
    assert stopping.exit_code() == 75


def test_early_notice_has_no_limit_and_a_kill_after_it_has() -> None:
    def work() -> None:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)  # the scheduler's, after our own
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        stopping.if_asked()

    deferring(work)
    assert stopping.exit_code() == 143


def test_an_interrupt_in_a_text_that_is_executed_ends_with_the_code(tmp_path: Path) -> None:
    """As of dataclasses, which are made that way; `python -m` then ended by SIGINT instead."""
    (tmp_path / "interrupted.py").write_text(
        "from selfsteer import cli\n"
        "def app():\n"
        "    exec('import os, signal; os.kill(os.getpid(), signal.SIGTERM)')\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 143
    assert ran.stderr == (
        "selfsteer: interrupted; finished work is kept, and the same command resumes\n"
    )
