"""Every reader of rows sees the same query and the same answers in them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsteer.data.queries import load_queries
from selfsteer.data.reading import Drops, import_records, read
from selfsteer.data.records import Preference, Triple
from selfsteer.data.shapes import Unusable, asked, record
from selfsteer.errors import DataError
from selfsteer.evaluation.questions import read_questions
from selfsteer.evaluation.rewardbench import read_items
from selfsteer.recipe.sections import JudgedSet, Queries
from selfsteer.stages.oppose import GivenAnswer, given_answers

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
    assert given_answers(str(path)) == {query.messages: GivenAnswer("Hello.")}
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


PARTIAL = {"role": "assistant", "content": "Partial "}
#: Rows with an answer that follows another answer.
FOLLOWING: dict[str, dict[str, Any]] = {
    "preference": {"prompt": [ASKED, PARTIAL], "chosen": [ANSWER], "rejected": "No."},
    "messages": {"messages": [ASKED, PARTIAL], "chosen": "Hello.", "rejected": "No."},
    "labelled": {"prompt": [ASKED, PARTIAL], "completion": [ANSWER], "label": True},
    "completed": {"prompt": [ASKED, PARTIAL], "completion": "Hello."},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Partial "}],
        "chosen": {"from": "gpt", "value": "Hello."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "two conversations": {
        "chosen": [ASKED, PARTIAL, ANSWER],
        "rejected": [ASKED, PARTIAL, {"role": "assistant", "content": "No."}],
    },
    "hh-rlhf": {
        "chosen": "Human: Hi.\n\nAssistant: Partial\n\nAssistant: Hello.",
        "rejected": "Human: Hi.\n\nAssistant: Partial\n\nAssistant: No.",
    },
    "chat": {"messages": [ASKED, PARTIAL, ANSWER]},
    "UltraChat": {"prompt": "Hi.", "prompt_id": "p", "messages": [ASKED, PARTIAL, ANSWER]},
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_an_answer_that_follows_an_answer_is_none_to_the_query(tmp_path: Path, name: str) -> None:
    row, reason = FOLLOWING[name], "turns_do_not_alternate"
    path, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    path.write_text(f"{json.dumps(row)}\n" + '{"prompt": "Who?"}\n')
    found = load_queries(Queries(path=str(path)))
    assert [q.text for q in found.queries] == ["Who?"]
    assert found.dropped == {reason: 1}
    with pytest.raises(DataError, match="queries but no answers"):
        given_answers(str(path))
    assert import_records(path).dropped == {reason: 1}
    with pytest.raises(DataError, match=f"none can be used .*1 {reason}"):
        import_records(path, trainable=True)
    pq.write_table(pa.Table.from_pylist([row]), table)
    with pytest.raises(DataError, match=f"1 {reason}"):
        load_queries(Queries(path=str(table)))
    with pytest.raises(DataError, match=r"line 1: .* (another|several) answer"):
        read_questions(JudgedSet(questions=str(path), style="arena-hard"))
    if "rejected" in row and name != "ShareGPT":  # which is no form of these sets
        items, dropped, _ = read_items(iter([("f, line 1", row)]), "all")
        assert (items, dropped) == ([], {reason: 1})


def test_an_answer_that_the_row_repeats_follows_none() -> None:
    made = record({"messages": [ASKED, ANSWER], "chosen": "Hello.", "rejected": "No."}).record
    assert isinstance(made, Preference)
    assert ([m.content for m in made.prompt], made.chosen) == (["Hi."], "Hello.")
    nothing: Any
    for nothing in ("", [], None):
        assert record({"messages": [ASKED, ANSWER], "rejected": nothing}).title == "answered query"


def test_the_answer_beside_a_prompt_and_its_pair_is_no_turn_before_it() -> None:
    row = {"prompt": "Hi.", "messages": [ASKED, ANSWER], "chosen": "Hello.", "rejected": "No."}
    made = record(row).record
    assert isinstance(made, Preference)
    assert [m.content for m in made.prompt] == ["Hi."]
    counted = {"messages": [ASKED, ANSWER], "completion": 12, "chosen": True}
    assert record(counted).title == "answered query"
