"""Files as they come: packed, in other encodings, damaged, with odd rows; none of them is lost."""

import gzip
import json
import os
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsteer.data import files
from selfsteer.data.files import HubName, read_rows
from selfsteer.data.queries import load_queries, queries_digest
from selfsteer.data.reading import import_records
from selfsteer.data.records import Preference
from selfsteer.errors import ConfigError, DataError
from selfsteer.recipe.sections import Queries
from tests.reliability.fuzz import within

GOOD = [{"prompt": f"Good question {i} about bees?"} for i in range(3)]
USER, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


def texts(path: Path, **more: Any) -> list[str]:
    return sorted(q.text for q in load_queries(Queries(path=str(path), **more)).queries)


# -- one bad row among good ones -----------------------------------------------------------------

ODD: dict[str, tuple[bytes, str]] = {
    "broken": (b'{"prompt": ', "malformed"),
    "list": (b"[1]", "malformed"),
    "number": (b"7", "malformed"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', "not_utf8"),
    "deep": (b'{"prompt": "x", "d": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "malformed"),
    "rather deep": (b'{"prompt": "x", "d": ' + b"[" * 150 + b"]" * 150 + b"}", "malformed"),
    "digits": (b'{"prompt": "x", "n": ' + b"9" * 5_000 + b"}", "malformed"),
    "NaN": (b'{"prompt": "x", "score": NaN}', "not_storable"),
    "half a pair": (rb'{"prompt": "half \ud83d"}', "malformed"),
    "half a pair elsewhere": (rb'{"prompt": "x", "n": "\ud83d"}', "not_storable"),
    "no text": (b'{"messages": [{"role": "user", "content": null}]}', "malformed"),
    "no keys": (b'{"text": "Hi."}', "unknown_shape"),
    "context": (b'{"question": "Who?", "context": "He came."}', "needs_context"),
    "empty": (b'{"prompt": " "}', "empty_query"),
    "answer alone": (b'{"messages": [{"role": "assistant", "content": "Hi."}]}', "no_user_turn"),
    "tools": (b'{"prompt": "x", "tools": [{"type": "function"}]}', "has_tools"),
    "tool turn": (lines({"messages": [USER, {"role": "tool", "content": "x"}, USER]}), "has_tools"),
    "tool call": (
        lines({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}]}),
        "has_tools",
    ),
    "picture": (
        lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        "not_text",
    ),
    "batch": (lines({"custom_id": "b", "body": {"messages": [USER], "tools": [1]}}), "has_tools"),
    "repeated": (b'{"id": "0", "prompt": "Hi."}\n{"id": "0", "prompt": "Ha."}', "repeated_id"),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_row_is_counted_and_named(tmp_path: Path, odd: str) -> None:
    row, reason = ODD[odd]
    path = tmp_path / "q.jsonl"
    path.write_bytes(lines(*GOOD) + row.strip() + b"\n" + lines({"prompt": "And then?"}))
    found = load_queries(Queries(path=str(path)))
    assert found.dropped == {reason: 1}
    assert len(found.queries) == 4 + (odd == "repeated")
    line = 5 if odd == "repeated" else 4
    (said,) = found.examples
    assert said.startswith(f"{path}, line {line}: ")
    (left,) = found.left_out
    assert (left.id, left.reason) == (f"{path}, line {line}", reason)
    if odd != "repeated":
        imported = import_records(path)
        assert (imported.n_in, len(imported.records)) == (5, 4)
        path.write_bytes(row.strip())
        with pytest.raises(DataError, match=f"1 {reason}"):
            load_queries(Queries(path=str(path)))


def test_the_first_lines_of_a_reason_are_named_and_most_of_a_file_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(lines(*GOOD, *[{"text": "?"}] * 3))
    load_queries(Queries(path=str(path)))
    assert "cannot be used" not in capsys.readouterr().err
    path.write_bytes(lines(*GOOD, *[{"text": "?"}] * 4))
    (said,) = load_queries(Queries(path=str(path))).examples
    assert said.startswith(f"{path}, line 4: no known shape")
    assert said.endswith("; also line 5; also line 6")
    import_records(path)
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("4 of the 7 rows of") == 2
    assert "4 unknown_shape" in err


KEPT: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "no system": (
        {"messages": [{"role": "system", "content": None}, USER], "system": None},
        [("user", "Hi.")],
    ),
    "empty system": ({"prompt": "Hi.", "system": ""}, [("user", "Hi.")]),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
        [("system", "Be brief."), ("user", "Hi.")],
    ),
    "parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Hi."}, {"type": "text", "text": "You!"}],
                }
            ]
        },
        [("user", "Hi.\nYou!")],
    ),
    "no tools": ({"prompt": "Hi.", "tools": []}, [("user", "Hi.")]),
    "turns with roles": ({"turns": [USER, ANSWER]}, [("user", "Hi.")]),
    "turns as objects": ({"turns": [{"content": "Hi."}]}, [("user", "Hi.")]),
}


@pytest.mark.parametrize("name", KEPT)
def test_rows_that_say_the_same_in_another_way(tmp_path: Path, name: str) -> None:
    row, messages = KEPT[name]
    path = tmp_path / "q.jsonl"
    path.write_bytes(lines(row))
    (query,) = load_queries(Queries(path=str(path))).queries
    assert [tuple(m) for m in query.messages] == messages


def test_a_line_of_a_batch_has_its_id(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    body = {"model": "m", "messages": [USER], "max_tokens": 9}
    row = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    path.write_bytes(lines(row))
    (query,) = load_queries(Queries(path=str(path))).queries
    assert (query.id, query.text, query.extra["model"]) == ("r1", "Hi.", "m")


def test_each_instance_is_a_query(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    instances = [{"input": x, "output": x.upper()} for x in ("a", "b")]
    path.write_bytes(lines({"id": "t", "instruction": "Shout.", "instances": instances}))
    found = load_queries(Queries(path=str(path)))
    assert [(q.id, q.text) for q in found.queries] == [("t", "Shout.\na"), ("t-2", "Shout.\nb")]
    found = load_queries(Queries(path=str(path), limit=1))
    assert found.dropped == {"over_limit": 1}, "what is left of a row counts too"


def test_people_rank_replies_anywhere_in_a_tree(tmp_path: Path) -> None:
    def said(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
        return {"message_id": text, "role": role, "text": text, "replies": replies, **more}

    again = said("prompter", "And?", said("assistant", "c", rank=1), said("assistant", "d", rank=0))
    root = said(
        "prompter", "Why?", said("assistant", "a", again, rank=0), said("assistant", "b", rank=2),
        said("assistant", "e", rank=9, deleted=True), said("assistant", "f"),
    )  # fmt: skip
    path = tmp_path / "t.jsonl"
    alone = {"prompt": said("prompter", "Who?", said("assistant", "x", rank=0))}
    path.write_bytes(lines({"message_tree_id": "t", "prompt": root}, alone))
    found = import_records(path)
    pairs = [(r.to_dict()["prompt"], r.chosen, r.rejected) for r in found.records]  # type: ignore[union-attr]
    assert [([t["content"] for t in p], c, r) for p, c, r in pairs] == [
        (["Why?"], "a", "b"),
        (["Why?", "a", "And?"], "d", "c"),
    ]
    assert (found.n_in, found.dropped) == (3, {"no_ranked_replies": 1})
    assert texts(path) == ["Who?", "Why?"]


def test_a_pair_whose_answer_follows_an_answer_is_none(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    text = "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nAssistant: "
    one = {"chosen": "\n\nHuman: Hi.\n\nAssistant: A", "rejected": "\n\nHuman: Hi.\n\nAssistant: B"}
    path.write_bytes(lines(one, {"chosen": f"{text}A", "rejected": f"{text}B"}))
    assert import_records(path).dropped == {"turns_do_not_alternate": 1}


# -- kinds of file -------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.txt", "q"])
def test_packed_files_are_read_as_they_are(tmp_path: Path, name: str, pack: Any) -> None:
    data = {
        "q.json": json.dumps(GOOD).encode(),
        "q.csv": ("prompt\n" + "\n".join(r["prompt"] for r in GOOD)).encode(),
        "q.txt": "\n".join(r["prompt"] for r in GOOD).encode(),
    }.get(name, lines(*GOOD))
    path = tmp_path / f"{name}.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(pack(data))
    assert texts(path) == [r["prompt"] for r in GOOD]
    # parts one after the other are one file, and a torn one is none
    if name == "q.jsonl":
        path.write_bytes(pack(lines(*GOOD[:1])) + pack(lines(*GOOD[1:])))
        assert len(texts(path)) == 3
        more = ({"prompt": f"{i} {os.urandom(9).hex()}"} for i in range(99))
        path.write_bytes(pack(lines(*GOOD, *more))[:-20])
        with pytest.raises(DataError, match=r"is a damaged (gzip|zstd) file"):
            load_queries(Queries(path=str(path)))


def test_a_folder_of_packed_shards_is_one_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*GOOD[:1])))
    (tmp_path / "b.jsonl").write_bytes(lines(*GOOD[1:]))
    assert len(texts(tmp_path)) == 3


def test_a_text_file_holds_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_bytes("\ufeffWhy? \r\n\r\nOne\u2028line.\n".encode() + b"caf\xe9\n")
    found = load_queries(Queries(path=str(path)))
    assert sorted(q.text for q in found.queries) == ["One\u2028line.", "Why? "]
    assert found.dropped == {"not_utf8": 1}
    path.write_bytes(lines(*GOOD))
    with pytest.raises(DataError, match=r"looks like a JSON object; .* must end in \.jsonl"):
        load_queries(Queries(path=str(path)))


def test_prompts_are_not_run_together_where_lines_end_in_cr(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_bytes(b"Why?\rWho?\rWhen?\r")
    with pytest.raises(DataError, match=r"line 1: a carriage return .*tr '\\r' '\\n'"):
        load_queries(Queries(path=str(path)))
    path.write_bytes(b"Why?\rWho?\nWhen?\r\nWhere?\r")
    found = load_queries(Queries(path=str(path)))
    assert sorted(q.text for q in found.queries) == ["When?", "Where?"]
    assert found.dropped == {"malformed": 1}


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": "a\u2028b\u0085c"}, {"prompt": "d"}]
    text = "\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    path.write_bytes(text.encode())
    assert texts(path) == ["a\u2028b\u0085c", "d"]


@pytest.mark.parametrize(
    ("begins", "said"),
    [
        ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16 text. Convert it"),
        ('{"prompt": "a"}'.encode("utf-16-le"), "begins with NUL bytes.* UTF-16LE"),
        ("Why?\n".encode("utf-16-be"), "begins with NUL bytes"),
        (b"PK\x03\x04....", "is a zip archive. Unpack it"),
        (b"BZh9....", "packed by bzip2"),
        (b"PAR1....", "is a Parquet file. Give it a name that ends in .parquet"),
    ],
)
def test_what_is_no_text_is_called_what_it_is(tmp_path: Path, begins: bytes, said: str) -> None:
    for name in ("q.jsonl", "q.csv", "q.json", "q.txt"):
        (tmp_path / name).write_bytes(begins)
        with pytest.raises(DataError, match=said):
            load_queries(Queries(path=str(tmp_path / name)))


def test_a_damaged_table_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"prompt": ["Why?"] * 999}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(DataError, match=r"q\.parquet cannot be read: \w+.* failed\.$"):
        load_queries(Queries(path=str(path)))


@pytest.mark.parametrize("text", ["[" * 5_000 + "]" * 5_000, f'[{{"prompt": {"9" * 5_000}}}]'])
def test_a_list_with_limits_exceeded_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(DataError, match="cannot be read as JSON: "):
        load_queries(Queries(path=str(path)))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.txt.gz", "x.csv.gz"])
@pytest.mark.parametrize("text", [b"\0", b" ", b'["', b'{"prompt": "', b"[\n[", b"{\n"])
def test_a_packed_line_without_an_end_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: bytes
) -> None:
    monkeypatch.setattr(files, "LONGEST", 1000)
    monkeypatch.setattr(files, "PIECE", 100)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text + b"a" * 5000))
    with pytest.raises(DataError, match=r"longer than 1,000 characters|field larger than"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "begin"), [("x.csv", b'prompt\n"'), ("x.csv", b"prompt\n"), ("x.json", b'["Why?"]')]
)
def test_a_small_packed_file_is_not_unpacked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: bytes
) -> None:
    monkeypatch.setattr(files, "LONGEST", 50_000)
    monkeypatch.setattr(files, "PIECE", 1000)
    path = tmp_path / f"{name}.gz"
    end = {"x.csv": b"a,\n" if b'"' in begin else b"a", "x.json": b" "}[name] * 2_000_000
    path.write_bytes(gzip.compress(begin + end))
    tracemalloc.start()
    try:
        with nullcontext() if name == "x.json" else pytest.raises(DataError, match="longer than"):
            list(read_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_table_is_unpacked_a_few_rows_at_a_time(tmp_path: Path) -> None:
    rows, long = 1000, "a" * 1_000_000
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([long]))
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "x.parquet", compression="zstd")
    tracemalloc.start()
    try:
        assert sum(row == {"prompt": long} for _, row in read_rows(tmp_path / "x.parquet")) == rows
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_pipes_and_devices_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero")):
        settings = Queries(path=str(path))
        for read in (load_queries, queries_digest, lambda s: import_records(s.path)):
            with pytest.raises(DataError, match="is a pipe or a device, not a file"):
                read(settings)


def test_a_dialogue_with_many_blank_lines_is_read_in_time(tmp_path: Path) -> None:
    blank = "\n" * 100_000
    row = {side: f"Human: Hi.{blank}x\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    (tmp_path / "hh.jsonl").write_bytes(lines(row))
    with within(30):
        (found,) = import_records(tmp_path / "hh.jsonl").records
    assert isinstance(found, Preference)
    assert found.prompt[0].content == f"Hi.{blank}x"
    assert (found.chosen, found.rejected) == ("chosen", "rejected")


# -- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv", "q.parquet"])
def test_columns_are_renamed_before_rows_are_recognised(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"ask": "Why?", "sys": "Be brief.", "note": "n"}, {"ask": "Who?", "note": "m"}]
    if name == "q.jsonl":
        path.write_bytes(lines(*reversed(rows)))
    elif name == "q.csv":
        path.write_text("ask,sys,note\nWhy?,Be brief.,n\nWho?,,m\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = {"ask": "prompt", "sys": "system"}
    found = load_queries(Queries(path=str(path), columns=columns)).queries
    assert sorted((q.text, len(q.messages)) for q in found) == [("Who?", 1), ("Why?", 2)]
    imported = import_records(path, rename=columns)
    assert [r.extra["note"] for r in imported.records] in (["n", "m"], ["m", "n"])
    with pytest.raises(ConfigError, match=r"no column 'aks' to rename in .*'ask'"):
        texts(path, columns={"aks": "prompt"})
    with pytest.raises(ConfigError, match="has a column 'note' already, so 'ask' cannot"):
        texts(path, columns={"ask": "note"})
    with pytest.raises(ConfigError, match=r"More than one column of .* called 'prompt'"):
        texts(path, columns={"ask": "prompt", "note": "prompt"})
    assert texts(path, columns={"ask": "note", "note": "prompt"}) == ["m", "n"]


# -- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/set", ("org/set", None, "train", None)),
        ("org/set:en", ("org/set", "en", "train", None)),
        ("org/set:en:test@v1.0", ("org/set", "en", "test", "v1.0")),
        ("org/set::test", ("org/set", None, "test", None)),
        ("org/set[test]", ("org/set", None, "test", None)),
        ("org/set@refs/convert/parquet", ("org/set", None, "train", "refs/convert/parquet")),
        ("set-2.5", ("set-2.5", None, "train", None)),
    ],
)
def test_names_on_the_hub(text: str, parts: tuple[str | None, ...]) -> None:
    name = HubName.read(text)
    assert (name.repo, name.config, name.split, name.revision) == parts
    assert HubName.read(str(name)) == name


@pytest.mark.parametrize("text", ["q.jsonl", "./q", "a/b/c", "q.jsonl.gz", "org/set:a:b:c"])
def test_what_looks_like_a_file_is_one_that_is_not_there(text: str) -> None:
    with pytest.raises(DataError, match=f"There is no file {text}"):
        next(read_rows(text))
