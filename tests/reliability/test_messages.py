"""Errors say what was found and what helps: no pipe is read, no long value echoed."""

import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfsteer.engines.base import PROMPT_TOO_LONG, Completion, SamplingParams
from selfsteer.errors import DataError, clip, listed, short, some
from selfsteer.principles.contexts import CONTEXTS
from selfsteer.terminal import out
from selfsteer.verbs import chat
from tests.e2e.support import TESTBED, Here, fails
from tests.fakes import FakeEngine
from tests.make import entry, recipe, write_jsonl

LONG = "x" * 5000


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


def plan(*more: str) -> Sequence[str]:
    return ("plan", "pbaa", f"policy.model={TESTBED}", "queries.path=q.jsonl", *more)


def test_a_value_in_a_message_is_short() -> None:
    assert short("abc") == "'abc'"
    assert len(short(LONG)) == 80
    assert len(short({"a": LONG}, 200)) == 200
    assert clip("a\nb\x1b") == r"a\nb\x1b"
    assert listed(range(20)).endswith("10, 11 …")
    assert listed(()) == "(none)"
    assert some(map(str, range(20))).endswith("10; 11; and more")


@pytest.mark.parametrize(
    "setting",
    [
        f"method={LONG}",
        f"{LONG}=1",
        LONG,
        f"training.{LONG}=1",
        f"sampling=[{LONG}]",
        f"judge={LONG}",
        f"name={LONG}",
        f"training.beta={LONG}",
        f"queries.path=package:{LONG}",
        f"runs_dir.{LONG}=1",
        f"principles={{append: {{{LONG}: 1}}}}",
        f"queries.scripts=[{LONG}]",
    ],
)
def test_a_long_value_is_not_echoed(here: Here, setting: str) -> None:
    ended = here(*plan(setting))
    assert ended.code == 2
    assert len(ended.err) < 1000, ended.err


def test_long_names_of_files_say_so(here: Here, tmp_path: Path) -> None:
    fails(here(*plan("name=" + "n" * 300)), 2, "name has 300 characters", "about 240")
    for args in (("show", LONG), ("queries", LONG, "--to", "to.jsonl"), ("plan", LONG)):
        fails(here(*args), 2, "too long for the file system. Choose a shorter one")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(here: Here, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    given = str(path) if kind == "pipe" else "/dev/zero"
    to = str(tmp_path / "to")
    for args in (
        ("plan", given),
        ("queries", given, "--to", f"{to}.jsonl"),
        ("import", given, "--to", to),
        ("principles", "lint", given),
        ("judge", given, "--judge", "oracle"),
        ("train", TESTBED, given, f"output={to}"),
        ("run", "pbaa", f"policy.model={given}", "queries.path=q.jsonl", f"runs_dir={tmp_path}"),
    ):
        fails(here(*args), 2, "is a pipe or a device")


@pytest.mark.parametrize("name", ["resolved.json", "ledger.jsonl", "metrics.jsonl", "lock", "day"])
def test_a_pipe_in_a_run_folder_is_not_read(here: Here, tmp_path: Path, name: str) -> None:
    (tmp_path / "resolved.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    fails(here("show", tmp_path), 3, name, "is a pipe or a device")


def test_a_folder_in_place_of_the_ledger_is_no_ledger(here: Here, tmp_path: Path) -> None:
    (tmp_path / "resolved.json").write_text(recipe().model_dump_json())
    (tmp_path / "ledger.jsonl").mkdir()
    fails(here("show", tmp_path), 3, "ledger.jsonl is no file")


def test_a_log_with_a_number_that_no_float_holds_is_drawn_without_it(
    here: Here, tmp_path: Path
) -> None:
    (tmp_path / "resolved.json").write_text(recipe().model_dump_json())
    write_jsonl(tmp_path / "ledger.jsonl", entry("begin", "iteration-1/policy", "Train"))
    logged = [{"stage": "iteration-1/policy", "step": n, "loss": 10**n} for n in (1, 2, 400)]
    write_jsonl(tmp_path / "metrics.jsonl", *logged)
    for command in ("show", "report"):
        assert here(command, tmp_path).code == 0


def test_a_packed_text_is_called_what_it_is(here: Here, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml.gz"
    path.write_bytes(gzip.compress(b"method: pbaa\n"))
    fails(here("plan", path), 2, "is packed by gzip. Unpack it")
    fails(here("principles", "lint", path), 2, "is packed by gzip. Unpack it")


def asked(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> dict[str, dict[str, Completion]]:
    """What `chat` gets of an engine that answers the three contexts like this."""
    said = iter(answers)
    talk = chat.Chat.__new__(chat.Chat)
    principles = SimpleNamespace(good="g", bad="b", system="")
    vars(talk).update(principles=principles, seed=0, contrast=None, params=SamplingParams())
    talk.contexts = CONTEXTS
    vars(talk).update(engines={"base": FakeEngine(lambda request: next(said))})
    return talk.answers("Hi")


def test_a_question_that_is_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Completion("", "", PROMPT_TOO_LONG, 600, 0)
    with pytest.raises(DataError, match="The question is too long: it has 600 tokens"):
        asked(monkeypatch, none, none, none)
    shown = io.StringIO()
    monkeypatch.setattr(out, "_file", shown)  # "file" would keep this test's stdout for good
    chat.print_answers(asked(monkeypatch, "Hello.", none, none))
    assert shown.getvalue().count(f"({PROMPT_TOO_LONG})") == 2


def test_an_answer_without_an_end_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, whole, thought = (
        Completion("", "Nectar", "length", 9, 80),
        Completion("", "Nectar.", "stop", 9, 4),
        Completion("", "", "length", 9, 80, "Hm"),
    )
    assert chat.lacks(cut)[0] == " … (cut off after 80 tokens)"
    assert chat.lacks(whole)[0] == ""
    assert chat.lacks(thought)[0] == f"({thought.missing})"
    shown = io.StringIO()
    monkeypatch.setattr(out, "_file", shown)
    chat.print_answers({"base": {"plain": cut}})
    assert "cut off after 80 tokens" in shown.getvalue()
