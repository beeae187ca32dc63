"""Every reader of rows sees the same query and the same answers in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.queries import load_queries
from selfsteer.data.reading import Drops, read
from selfsteer.data.records import Preference, Triple
from selfsteer.data.shapes import Unusable, asked, record
from selfsteer.recipe.sections import Queries
from selfsteer.stages.oppose import given_answers

ASKED, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
LATER = [{"role": "user", "content": "Name a fish."}, {"role": "assistant", "content": "The cod."}]

ANSWERED: dict[str, dict[str, Any]] = {
    "chat": {"messages": [ASKED, ANSWER]},
    "UltraChat": {"prompt": "Hi.", "prompt_id": "p", "messages": [ASKED, ANSWER, *LATER]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    },
    "Alpaca": {"instruction": "Hi.", "input": "", "output": "Hello."},
    "preference": {"prompt": "Hi.", "chosen": "Hello.", "rejected": "No."},
    "two conversations": {
        "prompt": "Hi.",
        "chosen": [ASKED, ANSWER],
        "rejected": [ASKED, {"role": "assistant", "content": "No."}],
    },
}


@pytest.mark.parametrize("name", ANSWERED)
def test_the_given_answer_is_that_to_the_query(tmp_path: Path, name: str) -> None:
    row = ANSWERED[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (query,) = load_queries(Queries(path=str(path))).queries
    assert [tuple(m) for m in query.messages] == [("user", "Hi.")]
    assert given_answers(str(path)) == {query.messages: "Hello."}
    made = record(row).record
    triple = made.to_triple() if isinstance(made, Preference) else made
    assert isinstance(triple, Triple)
    assert (triple.id, triple.messages) == (query.id, query.messages)
    assert triple.responses["good"] == "Hello."


def test_a_prompt_beside_another_conversation_has_no_answer() -> None:
    row = {"prompt": "Who?", "prompt_id": "p", "messages": [ASKED, ANSWER]}
    assert (asked(row).query.text, asked(row).answer) == ("Who?", None)
    assert record(row).title == "query"


def test_drops_keep_what_can_be_stored() -> None:
    rows: list[tuple[str, dict[str, Any]]] = [
        ("f, line 1", {"conversations": [{"from": "gpt", "value": "Hello."}]}),
        ("f, line 2", {"prompt": "half \ud83d"}),
        ("f, line 3", {"prompt": "Hi."}),
    ]
    drops = Drops()
    assert [where for where, _ in read(iter(rows), asked, drops)] == ["f, line 3"]
    first, second = drops.records
    assert (first.id, first.reason, first.record) == ("f, line 1", "no_user_turn", rows[0][1])
    assert second == ("f, line 2", "malformed", None)
    assert list(drops.counts) == ["no_user_turn", "malformed"]
    assert drops.examples[0] == "f, line 1: the conversation has no user turn"


def test_a_reason_of_its_own_is_told_from_a_malformed_row() -> None:
    with pytest.raises(Unusable) as caught:
        asked({"text": "Hi."})
    assert caught.value.reason == "unknown_shape"
