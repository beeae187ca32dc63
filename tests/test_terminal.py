"""Bars, what they say, and what a run's folder says of the process that works in it."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.markup import escape
from rich.table import Table

from selfsteer import terminal
from selfsteer.engines.base import Completion
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.run.folder import RunFolder
from selfsteer.run.progress import Reporter, progress_of, reported
from selfsteer.terminal import Bar, progress_bar, watched
from selfsteer.verbs.chat import print_answers


def test_data_cannot_steer_the_terminal() -> None:
    file = io.StringIO()
    screen = terminal.Screen(file=file, force_terminal=True, highlight=False)
    table = Table()
    table.add_column("answer")
    table.add_row("a\x1b]52;c;c2VjcmV0\x07b")
    screen.print(table)
    screen.print("a \u202eb\u2066 c\u2028d")
    assert r"a \u202eb\u2066 c\u2028d" in file.getvalue()
    screen.print(escape("drop \x1b[2J\r\x9b1;1H [bold]all[/bold]\tand\nthis"), style="red")
    said = file.getvalue()
    assert r"a\x1b]52;c;c2VjcmV0\x07b" in said
    assert r"drop \x1b[2J\x0d\x9b1;1H [bold]all[/bold]" in said
    assert "\x1b[31m" in said, "what we colour stays coloured"
    assert not {"\x07", "\r", "\x9b"} & set(said)
    assert "\x1b]" not in said
    assert "\x1b[2J" not in said


def test_what_rounds_to_zero_has_no_minus() -> None:
    assert terminal.interval([-1e-5, -0.5, -0.0001]) == "+0.000 [-0.500, +0.000]"
    assert terminal.interval(-1e-5, ".3f") == "0.000"
    assert terminal.interval([0.123, None, None], "+.0%") == "+12%"


def test_an_answer_in_a_chat_cannot_either(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Completion("a", "so \x1b]52;c;c2VjcmV0\x07", "stop", 1, 1, "hm \x9b2J")
    print_answers({"base": {"plain": answer}})
    said = capsys.readouterr().out
    assert r"\x1b]52" in said
    assert not {"\x1b", "\x07", "\x9b"} & set(said)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_bar_bounds_what_is_left_before_an_item_is_finished(clock: list[float]) -> None:
    bar = Bar("samples", 100, None, most=90)
    clock[0] += 10
    bar.advance(0, 3000)
    assert (bar.seconds_left, bar.facts()) == (None, "300 tok/s, at most 20 s left")


def test_a_bar_knows_its_rate_and_what_is_left(clock: list[float]) -> None:
    bar = Bar("triples", 100, None)
    clock[0] += 10
    bar.advance(20, 3000)
    assert bar.rates == (2.0, 300.0)
    assert bar.seconds_left == 40
    assert bar.facts() == "300 tok/s, about 40 s left"


def test_work_found_finished_says_nothing_about_the_rate(clock: list[float]) -> None:
    bar = Bar("triples", 100, None)
    bar.skip(50)
    clock[0] += 10
    bar.advance(5)
    assert bar.done == 55
    assert bar.seconds_left == pytest.approx(90)
    assert bar.facts() == "2.0 s each, about 90 s left"


def test_the_rate_is_of_the_last_minute(clock: list[float]) -> None:
    bar = Bar("steps", None, None)
    for _ in range(100):
        clock[0] += 1
        bar.advance(10)
    for _ in range(60):
        clock[0] += 1
        bar.advance(1)
    assert bar.rates[0] == pytest.approx(1, rel=0.2)
    assert bar.seconds_left is None


def test_piped_a_bar_is_a_line_per_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("triples", 1000) as bar:
        for _ in range(70):
            clock[0] += 1
            bar.advance(10)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "  triples: 300/1,000 10.0/s, about 70 s left",
        "  triples: 600/1,000 10.0/s, about 40 s left",
    ]


def test_a_watcher_sees_a_bar_begin_and_then_once_a_second(clock: list[float]) -> None:
    seen = []
    with watched(lambda bar: seen.append(bar.done)), progress_bar("x", 10) as bar:
        for _ in range(6):
            clock[0] += 0.5
            bar.advance(1)
    assert seen == [0, 2, 4, 6]
    with progress_bar("x", 10) as bar:
        clock[0] += 5
        bar.advance(1)
    assert seen == [0, 2, 4, 6]


def test_a_folder_says_what_works_in_it(tmp_path: Path) -> None:
    assert progress_of(tmp_path) is None
    with reported(RunFolder(tmp_path), ["queries", "triples"]) as reporter:
        reporter.stage("triples")
        with progress_bar("triples", 8):
            found: Any = progress_of(tmp_path)
        assert (found["state"], found["stage"], found["pid"]) == ("working", "triples", os.getpid())
        assert found["todo"] == ["queries", "triples"]
        assert (found["bar"]["done"], found["bar"]["total"]) == (0, 8)
    assert (progress_of(tmp_path) or {})["state"] == "ended"


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (ConfigError("set it"), "failed", "set it"),
        (ZeroDivisionError("by 0"), "failed", "ZeroDivisionError: by 0"),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_a_folder_says_how_the_work_ended(
    tmp_path: Path, error: BaseException, state: str, said: str | None
) -> None:
    with pytest.raises(type(error)), reported(RunFolder(tmp_path), []):
        raise error
    found: Any = progress_of(tmp_path)
    assert (found["state"], found["error"]) == (state, said)


def test_a_process_that_is_gone_without_a_word_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from selfsteer.run.progress import Reporter; from selfsteer.run.folder import RunFolder\n"
        "Reporter(RunFolder(Path(sys.argv[1])), ['queries']); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (progress_of(tmp_path) or {})["state"] == "killed"


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_process_with_the_same_number_is_not_taken_for_it(tmp_path: Path) -> None:
    Reporter(RunFolder(tmp_path), [])
    rewrite(tmp_path, process_began=1.0)
    assert (progress_of(tmp_path) or {})["state"] == "killed"


def test_of_another_machine_only_silence_is_known(tmp_path: Path) -> None:
    Reporter(RunFolder(tmp_path), [])
    rewrite(tmp_path, host=f"not-{socket.gethostname()}", pid=1)
    assert (progress_of(tmp_path) or {})["state"] == "working"
    rewrite(tmp_path, time=0)
    assert (progress_of(tmp_path) or {})["state"] == "silent"


def test_a_disk_that_refuses_the_report_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise ArtifactError("The disk is full.")

    monkeypatch.setattr("selfsteer.run.progress.write_atomic", full)
    with reported(RunFolder(tmp_path), ["queries"]) as reporter:
        reporter.stage("queries")
    assert progress_of(tmp_path) is None
