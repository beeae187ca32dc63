"""Records that stay on disk: stored, spooled, exported, imported, curated."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from selfsteer.data import jsonl
from selfsteer.data.jsonl import (
    Spool,
    Stored,
    at,
    batched,
    disk_errors,
    dump_line,
    dump_lines,
    filling,
    replacing_folder,
    write_atomic,
)
from selfsteer.data.queries import load_queries
from selfsteer.data.reading import import_records
from selfsteer.data.records import Preference, Query
from selfsteer.errors import ArtifactError, ConfigError, DataError
from selfsteer.formats import FORMATS, export
from selfsteer.recipe.sections import Queries
from selfsteer.stages.inputs import stored_preferences, stored_triples, subset
from tests.census import RECORDS, SHARD, Census, census, write_shards

__all__ = ["census"]


@pytest.fixture
def triples(tmp_path: Path) -> Path:
    """A folder of shards."""
    return write_shards(tmp_path / "triples")


# -- sets on disk ----------------------------------------------------------------------------------


def test_a_stored_set_is_counted_read_again_and_narrowed(triples: Path) -> None:
    found = stored_triples(triples)
    assert len(found) == RECORDS
    assert [t.id for t in found] == [t.id for t in found] == [f"q{i:04d}" for i in range(RECORDS)]
    odd = found.take(range(1, RECORDS, 2))
    assert (len(odd), [t.id for t in odd][:2]) == (75, ["q0001", "q0003"])
    assert [t.id for t in odd.take([0, 74])] == ["q0001", "q0149"]
    assert list(odd.take([])) == []


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"\n{json.dumps({'prompt': 'One?'})}\n  \n{json.dumps({'prompt': 'Two?'})}")
    found = Stored(path, Query.from_dict)
    assert (len(found), [q.text for q in found]) == (2, ["One?", "Two?"])
    with pytest.raises(DataError, match="cannot be read"):
        len(Stored(tmp_path / "absent.jsonl", Query.from_dict))


@pytest.mark.parametrize("in_memory", [0, 50, 1 << 20])
def test_a_spool_gives_back_what_was_put_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr("selfsteer.data.jsonl.SPOOL_BYTES", in_memory or 1)
    spool: Spool[Query] = Spool(Query.from_dict, tmp_path / "new")
    queries = [Query.from_dict({"prompt": f"Number {i}?", "rank": i}) for i in range(20)]
    for i, query in enumerate(queries):
        spool.append(query)
        assert spool[i // 2] == queries[i // 2], "reading moves the place that is written to"
    assert list(spool) == queries
    assert (len(spool), spool[-1], spool[3:5]) == (20, queries[19], queries[3:5])
    assert list((tmp_path / "new").iterdir()) == [], "it has no name"


def test_positions_and_batches() -> None:
    assert list(at("abcdef", [0, 2, 5])) == ["a", "c", "f"]
    assert list(at("abc", [])) == []
    rest = iter("abcdef")
    assert list(at(rest, [1])) == ["b"]
    assert next(rest) == "c", "nothing behind the last is read"
    assert list(batched("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_subset_is_the_same_whatever_the_order_of_the_rest(tmp_path: Path, triples: Path) -> None:
    found = stored_triples(triples)
    chosen = [t.id for t in subset(found, 7, 3)]
    assert len(chosen) == 7
    assert chosen == sorted(chosen)
    assert chosen != [t.id for t in subset(found, 7, 4)]
    backwards = tmp_path / "b.jsonl"
    backwards.write_text(dump_lines(list(found)[::-1]))
    assert [t.id for t in subset(stored_triples(backwards), 7, 3)] == chosen[::-1]
    assert subset(found, RECORDS, 3) is found


# -- what is in memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_export_and_import_hold_a_few_records(
    tmp_path: Path, triples: Path, census: Census, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = (
        Preference(t.id, t.messages, t.responses["good"], t.responses["bad"])
        for t in stored_triples(triples)
    )
    write_atomic(tmp_path / "p.jsonl", map(dump_line, pairs))
    census.most = census.alive
    found, folder = stored_preferences(tmp_path / "p.jsonl"), tmp_path / fmt
    records = stored_triples(triples) if fmt == "authors" else found
    exported = export(records, fmt, folder, "data", rows_per_file=SHARD)
    assert exported.count == RECORDS * (2 if fmt == "trl-unpaired" else 1)
    assert census.most <= (2 * SHARD if fmt == "parquet" else 0) + 6
    source = folder if fmt == "parquet" else exported.paths[0]
    monkeypatch.setattr("selfsteer.data.files.PIECE", 4096)
    back = import_records(source, tmp_path)
    assert len(back.records) == RECORDS
    assert census.most <= 2 * SHARD + 6
    assert len(list(back.records)) == RECORDS


def test_reading_queries_holds_one_of_them(tmp_path: Path, census: Census) -> None:
    path = tmp_path / "q.jsonl"
    rows: list[Mapping[str, Any]] = [
        {"id": f"q{i * 7 % RECORDS:04d}", "prompt": f"Is it true of the number {i} alone?"}
        for i in range(RECORDS)
    ]
    path.write_text(dump_lines([*rows, {"prompt": "Is it true of the number 3 alone? "}]))
    for near in (None, 0.9):
        settings = Queries(path=str(path), near_duplicates=near)
        found = load_queries(settings, tmp_path)
        assert census.most <= 6
        assert [q.id for q in found.queries] == [f"q{i:04d}" for i in range(RECORDS)]
        assert found.dropped == {"duplicate_but_case": 1}
        (left_out,) = found.left_out
        assert (left_out.reason, left_out.record) == (
            "duplicate_but_case",
            {
                "id": left_out.id,
                "messages": [{"role": "user", "content": "Is it true of the number 3 alone? "}],
            },
        )


def test_a_list_in_pieces_is_read_like_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere: inside names, escapes and numbers, between entries."""
    rows = [{"prompt": f'Say "{i}" \\ é\n{"x" * i}?', "rank": i * 1001} for i in range(12)]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), f" [ {json.dumps(rows)[1:]}\n\n"):
        (tmp_path / "l.json").write_text(text)
        monkeypatch.undo()
        whole = list(import_records(tmp_path / "l.json").records)
        for piece in (8, 11, 64, 300):
            monkeypatch.setattr("selfsteer.data.files.PIECE", piece)
            assert list(import_records(tmp_path / "l.json").records) == whole
    assert len(whole) == 12


@pytest.mark.parametrize(
    "broken", ['[{"prompt": "A?"}{"prompt": "B?"}]', '[{"prompt": "A?"},]', '[{"prompt": "A?"}',
               '[{"prompt": "A?"}] more', '[{"prompt": "A?"},\n{"prompt": oops}]'],
)  # fmt: skip
def test_a_broken_list_in_pieces_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr("selfsteer.data.files.PIECE", 8)
    (tmp_path / "l.json").write_text(broken)
    line = 2 if "oops" in broken else 1
    with pytest.raises(DataError, match=f"line {line}: not JSON"):
        import_records(tmp_path / "l.json")


# -- two processes that write the same -------------------------------------------------------------


def test_two_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path, begun, go_on = tmp_path / "out.jsonl", Event(), Event()
    ended: list[str] = []

    def slow() -> Iterator[str]:
        yield "first\n"
        begun.set()
        go_on.wait(30)
        yield "first\n" * 5

    def write(name: str, lines: Iterator[str]) -> None:
        write_atomic(path, lines)
        ended.append(name)

    first = Thread(target=write, args=("first", slow()))
    second = Thread(target=write, args=("second", iter(["second\n"])))
    first.start()
    assert begun.wait(30)
    second.start()
    second.join(0.3)  # on a slow machine it has not begun yet, which is no fault
    go_on.set()
    first.join()
    second.join()
    assert ended == ["first", "second"]
    assert path.read_text() == "second\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_folder_is_filled_by_one_and_appears_whole(tmp_path: Path) -> None:
    folder, partial = tmp_path / "model", tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "left by a kill").touch()
    (partial / "and").mkdir()
    with replacing_folder(folder) as filled:
        assert not list(filled.iterdir())
        (filled / "weights").write_text("whole")
        with (
            pytest.raises(ArtifactError, match="Another process writes"),
            replacing_folder(folder),
        ):
            pass
        assert not folder.exists()
    assert [p.name for p in folder.iterdir()] == ["weights"]
    (folder / ".partial").mkdir()
    (folder / ".partial" / "mine").touch()
    with pytest.raises(ConfigError, match="is there already"), replacing_folder(folder):
        pass
    assert (folder / ".partial" / "mine").exists(), "nothing of a folder in use is removed"
    with pytest.raises(KeyError), replacing_folder(tmp_path / "other"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("empty", [False, True])
def test_one_that_begins_while_another_ends_takes_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool
) -> None:
    """The other one ends between the first look at the folder and the lock."""
    folder = tmp_path / "model"
    if empty:
        folder.mkdir()

    def meanwhile(path: Path, other: str) -> Any:
        monkeypatch.undo()
        with replacing_folder(path) as filled:
            (filled / "weights").write_text("whole")
        return disk_errors(path, other)

    monkeypatch.setattr(jsonl, "disk_errors", meanwhile)
    with pytest.raises(ConfigError, match="is there already"), replacing_folder(folder):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in folder.iterdir()] == ["weights"]


def test_a_folder_that_is_in_use_is_filled_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.json").touch()
    with filling(tmp_path) as place:
        assert place == tmp_path
    with pytest.raises(KeyError), filling(tmp_path):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]
    with pytest.raises(KeyError), filling(tmp_path / "new"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]
