import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from selfsteer import Preference, Query, Triple
from selfsteer.data.jsonl import dump_line, dump_lines, read_jsonl
from selfsteer.data.records import Message, Principles, Verdict, content_id, parse_messages
from selfsteer.errors import DataError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Yes?"}
SYSTEM = {"role": "system", "content": "Be kind."}

TRIPLE: dict[str, Any] = {
    "id": "q1",
    "messages": [SYSTEM, {"role": "user", "content": "Was frißt die Biene? 蜂"}],
    "principles": {"good": "Be right.", "bad": "Be wrong.", "features": ["Accuracy"]},
    "responses": {"plain": "Okay.", "good": "Nectar.\nYes.", "bad": "\u2028Bricks \x00."},
    "finish_reasons": {"plain": "stop", "good": "stop", "bad": "length"},
    "source": {"set": "bees", "rank": 1.5},
}


@pytest.mark.parametrize(
    "turns",
    [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER]],
)
def test_conversations_that_end_in_a_user_turn_are_read(turns: list[dict[str, str]]) -> None:
    assert [m.to_dict() for m in parse_messages(turns)] == turns
    assert parse_messages(parse_messages(turns)) == parse_messages(turns)


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        (None, "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["Hi"], "a turn must have"),
        ([{"role": "user"}], "text content"),
        ([{"role": "user", "content": 3}], "text content"),
        ([{"role": "user", "content": None}], "text content"),
        ([{"content": "Hi"}], "role must be one of system, user, assistant"),
        ([{"role": "tool", "content": "Hi"}], "found 'tool'"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([SYSTEM], "ends in a turn of the system"),
        ([USER, ASSISTANT], "ends in a turn of the assistant"),
        ([USER, USER], "turn 2 is user"),
        ([ASSISTANT, USER], "turn 1 is assistant"),
        ([USER, SYSTEM, USER], "turn 2 is system"),
        ([SYSTEM, SYSTEM, USER], "turn 1 is system"),
        ([{"role": "user", "content": " \n"}], "empty"),
    ],
)
def test_malformed_conversations_are_refused(turns: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        parse_messages(turns)


def test_query_from_prompt_messages_and_system_are_the_same() -> None:
    messages = (Message("system", "Be kind."), Message("user", "Hi"))
    found = [
        Query.from_dict({"prompt": "Hi", "system": "Be kind."}),
        Query.from_dict({"messages": [SYSTEM, USER]}),
        Query.from_dict({"prompt": [SYSTEM, USER], "messages": None}),
        Query.from_dict({"messages": [USER], "system": "Be kind.", "id": None}),
    ]
    assert {q.messages for q in found} == {messages}
    assert {q.id for q in found} == {content_id(messages)}
    assert found[0].text == "Hi"
    assert len(found[0].id) == 16
    assert int(found[0].id, 16) >= 0


def test_content_id_tells_texts_and_roles_apart() -> None:
    queries = [
        Query.from_dict({"prompt": "Hi"}),
        Query.from_dict({"prompt": "Hi "}),
        Query.from_dict({"prompt": "Hi", "system": "Hi"}),
    ]
    assert len({q.id for q in queries}) == 3
    # SHA-256 of [["user", "Hi"]], first 16 digits: ids must not change between versions
    assert queries[0].id == "d7760b4ba3077c46"


def test_a_number_as_id_becomes_text_and_other_keys_are_kept() -> None:
    query = Query.from_dict({"id": 7, "prompt": "Hi", "source": "bees", "rank": None})
    assert query.to_dict() == {"id": "7", "messages": [USER], "source": "bees", "rank": None}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({}, "exactly one of 'prompt' and 'messages'"),
        ({"question": "Hi"}, "found the keys question"),
        ({"prompt": "Hi", "messages": [USER]}, "exactly one"),
        ({"prompt": ""}, "empty"),
        ({"prompt": 3}, "non-empty list"),
        ({"prompt": "Hi", "id": ""}, "id must be a non-empty string"),
        ({"prompt": "Hi", "system": 3}, "system must be a string"),
        ({"messages": [SYSTEM, USER], "system": "Be rude."}, "both a 'system' field"),
    ],
)
def test_malformed_queries_are_refused(line: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Query.from_dict(line)


def test_triple_survives_its_line() -> None:
    triple = Triple.from_dict(TRIPLE)
    line = dump_line(triple)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert json.loads(line) == TRIPLE
    assert Triple.from_dict(json.loads(line)) == triple
    assert "蜂" in line  # readable, not escaped
    assert dump_line(Triple.from_dict(json.loads(line))) == line


def test_triple_knows_which_response_was_cut_off() -> None:
    triple = Triple.from_dict(TRIPLE)
    assert [triple.finished(r) for r in ("plain", "good", "bad")] == [True, True, False]
    assert Triple.from_dict({"prompt": "Hi", "responses": {"good": "x"}}).finished("good")


def test_triple_may_lack_principles_and_responses() -> None:
    triple = Triple.from_dict({"id": "q", "prompt": "Hi", "responses": {"good": "x", "bad": None}})
    assert triple.principles is None
    assert dict(triple.responses) == {"good": "x"}
    assert triple.to_dict() == {"id": "q", "messages": [USER], "responses": {"good": "x"}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"principles": {"good": "x"}}, "'good' and 'bad'"),
        ({"principles": "Be right."}, "'good' and 'bad'"),
        ({"principles": {"good": " ", "bad": "x"}}, "the good principle"),
        ({"principles": {"good": "x", "bad": None}}, "the bad principle"),
        ({"responses": ["x"]}, "responses must be an object"),
        ({"responses": {"chosen": "x"}}, "found 'chosen'"),
        ({"responses": {"good": 3}}, "responses/good must be a"),
        ({"finish_reasons": {"good": 3}}, "finish_reasons.*good"),
        ({"finish_reasons": {"best": "stop"}}, "found 'best'"),
        ({"reasoning": "So."}, "reasoning must be an object"),
        ({"reasoning": {"best": "So."}}, "found 'best'"),
        ({"reasoning": {"good": 3}}, "found 'good': 3"),
        ({"messages": []}, "non-empty list"),
    ],
)
def test_malformed_triples_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Triple.from_dict({**TRIPLE, **change})


def test_preference_is_trls_conversational_record() -> None:
    preference = Preference("p", (Message("user", "Hi"),), "Hello!", "Go.", {"rejected": "length"})
    expected = {
        "id": "p",
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "Go."}],
        "finish_reasons": {"rejected": "length"},
    }
    assert json.loads(dump_line(preference)) == expected
    assert Preference.from_dict(expected) == preference


def test_preference_as_triple_swaps_nothing() -> None:
    triple = Preference.from_dict(
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "finish_reasons": {"rejected": "length"}}
    ).to_triple()
    assert dict(triple.responses) == {"good": "A", "bad": "B"}
    assert triple.finished("good")
    assert not triple.finished("bad")


@pytest.mark.parametrize("chosen", [None, [], [USER], [ASSISTANT, ASSISTANT], [USER, ASSISTANT]])
def test_a_preferences_answer_is_one_assistant_turn(chosen: Any) -> None:
    with pytest.raises(DataError, match="chosen must be one text or one assistant turn"):
        Preference.from_dict({"prompt": "Hi", "chosen": chosen, "rejected": "B"})


def test_records_are_frozen() -> None:
    query = Query.from_dict({"prompt": "Hi"})
    with pytest.raises(FrozenInstanceError):
        query.id = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Principles("a", "b").good = "c"  # type: ignore[misc]


def test_verdicts_are_their_names() -> None:
    assert [str(v) for v in Verdict] == ["first", "second", "tie", "inconsistent", "unparseable"]
    assert json.loads(json.dumps({"verdict": Verdict.TIE})) == {"verdict": "tie"}


def test_read_jsonl_numbers_lines_and_skips_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    text = '{"a": 1}\n\n  \n{"a": "x\u2028y"}\r\n{"a": 3}'
    file.write_bytes("\ufeff".encode() + text.encode())
    assert list(read_jsonl(file)) == [(1, {"a": 1}), (4, {"a": "x\u2028y"}), (5, {"a": 3})]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: not a JSON object"),
        (b'{"a": "\xff"}\n', "not UTF-8"),
    ],
)
def test_read_jsonl_names_the_file_and_the_line(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "bees.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"bees.jsonl.*{says}"):
        list(read_jsonl(file))


def test_read_jsonl_of_nothing_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_dumped_lines_are_read_back(tmp_path: Path) -> None:
    records = [Triple.from_dict({**TRIPLE, "id": str(i)}) for i in range(3)]
    file = tmp_path / "a.jsonl"
    file.write_text(dump_lines(records), encoding="utf-8", newline="")
    assert [Triple.from_dict(v) for _, v in read_jsonl(file)] == records


def test_numbers_that_are_not_json_are_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_line({"loss": float("nan")})
