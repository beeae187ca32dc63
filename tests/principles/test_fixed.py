"""Principles of the user's own, read from what a run wrote."""

from pathlib import Path

from selfsteer.data.records import Message, Principles, Triple
from selfsteer.principles.fixed import read_fixed
from tests.make import write_jsonl


def test_the_principles_of_a_run_can_be_read_whatever_its_chat_template_writes(
    tmp_path: Path,
) -> None:
    made = Principles("Be brief.", "Be long.", ("Brevity",), "You are a helpful assistant.")
    line = Triple("q", (Message("user", "Hi"),), made).to_dict()
    assert line["principles"]["system"] == made.system
    found = read_fixed(str(write_jsonl(tmp_path / "principles.jsonl", line)))
    assert found == {"q": Principles("Be brief.", "Be long.", ("Brevity",))}
