"""The store of judges' answers against files that are not its own, or damaged."""

from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import dump_lines, write_atomic
from selfsteer.judges.store import AnswerStore


def row(key: Any, answer: Any) -> dict[str, Any]:
    return {"key": key, "answer": answer, "sum": digest([key, answer])}


def test_only_its_own_files_are_read(tmp_path: Path) -> None:
    for name in ("old", "00000 (1)", "00001-copy", "٠٠٠٠٠"):
        write_atomic(tmp_path / f"answers-{name}.jsonl", dump_lines([row("k", {"text": name})]))
    write_atomic(tmp_path / "answers-00007.jsonl", dump_lines([row("mine", {"text": "A"})]))
    store = AnswerStore(tmp_path)
    assert (store.known("mine"), store.known("k")) == ({"text": "A"}, None)
    store.fetch({"new": 0}, lambda keys, questions, advance: [{"text": "B"}], "judge")
    again = AnswerStore(tmp_path).known("new")
    assert again
    assert again["text"] == "B"
    assert (tmp_path / "answers-00008.jsonl").exists()


@pytest.mark.parametrize("odd", [row(["k"], {"text": "A"}), row("k", "A"), {"key": "k"}])
def test_a_row_of_another_kind_is_asked_again(tmp_path: Path, odd: dict[str, Any]) -> None:
    write_atomic(tmp_path / "answers-00000.jsonl", dump_lines([odd]))
    store = AnswerStore(tmp_path)
    assert store.known("k") is None
    found = store.fetch({"k": 0}, lambda keys, questions, advance: [{"text": "B"}], "judge")
    assert found["k"]["text"] == "B"


def test_two_commands_with_one_store_keep_what_each_was_answered(tmp_path: Path) -> None:
    one, other = AnswerStore(tmp_path), AnswerStore(tmp_path)
    for number in range(3):
        for name, store in (("one", one), ("other", other)):
            key = f"{name} {number}"
            store.fetch({key: 0}, lambda keys, questions, advance: [{"text": "A"}], "judge")
    both = AnswerStore(tmp_path)
    assert all(both.known(f"{name} {n}") for name in ("one", "other") for n in range(3))
