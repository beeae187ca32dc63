import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsteer.config import Queries
from selfsteer.errors import DataError
from selfsteer.principles.queries import load_queries, queries_digest
from selfsteer.records import content_id, parse_messages

CHAT = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a fish."},
]
ROWS: list[dict[str, Any]] = [
    {"id": "b", "prompt": "Why is the sky blue?"},
    {"id": "a", "prompt": CHAT},
    {"id": "c", "messages": [{"role": "user", "content": "x"}], "system": "Be a cook."},
]


def load(path: Path, **more: Any) -> Any:
    return load_queries(Queries(path=str(path), **more))


@pytest.fixture(params=["jsonl", "json", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"q.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + "\n")
    elif request.param == "json":
        path.write_text(json.dumps(ROWS))
    else:
        rows = [
            {
                "id": r["id"],
                "messages": r["prompt"]
                if isinstance(r.get("prompt"), list)
                else r.get("messages") or [{"role": "user", "content": r["prompt"]}],
                "system": r.get("system"),
                "other": 1,
            }
            for r in ROWS
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_every_file_kind_gives_the_same_queries_in_id_order(file: Path) -> None:
    queries, dropped = load(file)
    assert [q.id for q in queries] == ["a", "b", "c"]
    assert [len(q.messages) for q in queries] == [3, 1, 2]
    assert queries[1].text == "Why is the sky blue?"
    assert queries[2].messages[0].role == "system"
    assert not dropped


def test_ids_are_content_hashes_when_missing(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n')
    queries, dropped = load(path)
    messages = parse_messages([{"role": "user", "content": "a"}])
    assert content_id(messages) in {q.id for q in queries}
    assert dropped == {"duplicate": 1}
    # pinned: ids must not change between versions, runs are joined by them
    assert content_id(messages) == "050d8ef56e888db0"


def test_a_limit_counts_what_it_leaves_out(file: Path) -> None:
    queries, dropped = load(file, limit=2)
    assert {q.id for q in queries} == {"a", "b"}
    assert dropped == {"over_limit": 1}


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a"}\n')
    first = queries_digest(Queries(path=str(path)))
    path.write_text('{"prompt": "b"}\n')
    assert queries_digest(Queries(path=str(path))) != first


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.json", "[1]", "entry 1 is not an object"),
        ("q.json", "{", "not a JSON file"),
        ("q.parquet", "no parquet", "not a Parquet file"),
        ("q.jsonl", '{"prompt": "a", "messages": []}', "exactly one of"),
        ("q.jsonl", '{"prompt": "  "}', "line 1: the last user turn is empty"),
        ("q.jsonl", '{"prompt": "a", "system": 3}', "system must be a string"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        load(path)
    assert name in str(caught.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")  # datasets and its http client warn in many ways when offline
def test_a_datasets_name_that_cannot_be_had_says_so() -> None:
    with pytest.raises(DataError, match="as a datasets name it cannot be loaded"):
        load(Path("no-such-owner/no-such-set"))
