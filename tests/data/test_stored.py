"""Stages hold one shard of their records, not all of them."""

import gc
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import (
    Spool,
    Stored,
    at,
    batched,
    dump_line,
    dump_lines,
    write_atomic,
)
from selfsteer.data.queries import load_queries
from selfsteer.data.reading import import_records
from selfsteer.data.records import Preference, Query, Triple
from selfsteer.engines.base import Completion, SamplingParams
from selfsteer.errors import DataError
from selfsteer.formats import FORMATS, export
from selfsteer.recipe.read import load_recipe
from selfsteer.recipe.sections import Queries, Recipe, resolve_path
from selfsteer.run.folder import StageResult
from selfsteer.stages.filter import filter_triples, to_preferences
from selfsteer.stages.plan import stored_preferences, stored_triples, subset
from selfsteer.stages.principles import write_principles
from selfsteer.stages.sample import sample

RECORDS = 150
SHARD = 10


def line(number: int) -> dict[str, Any]:
    return {
        "id": f"q{number:04d}",
        "messages": [{"role": "user", "content": f"What is the colour of number {number}?"}],
        "principles": {"good": "Be true.", "bad": "Be false.", "features": ["Accuracy"]},
        "responses": {
            "plain": f"It may be {number}.",
            "good": f"It is green, as number {number} should be.",
            "bad": f"It is a smell of {number}.",
        },
    }


@pytest.fixture
def triples(tmp_path: Path) -> Path:
    """A folder of shards."""
    rows = [line(i) for i in range(RECORDS)]
    for number, part in enumerate(batched(rows, 64)):
        write_atomic(tmp_path / "triples" / f"shard-{number:05d}.jsonl", dump_lines(part))
    return tmp_path / "triples"


def recipe(tmp_path: Path, *more: str) -> Recipe:
    fixed = "principles={mode: fixed, good: Be true., bad: Be false., shard_size: 10}"
    given = (f"runs_dir={tmp_path}", fixed, f"sampling.shard_size={SHARD}", *more)
    return load_recipe("smoke", given)


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


class Census:
    """How many of the records that were made are still there, at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.alive = self.most = 0
        for kind in (Query, Triple, Preference):
            monkeypatch.setattr(kind, "__post_init__", self._counting(kind.__post_init__))

    def _counting(self, check: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(record: Any) -> None:
            check(record)
            self.made += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(record, self._gone)

        return counted

    def _gone(self) -> None:
        self.alive -= 1


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    gc.collect()
    gc.disable()
    yield Census(monkeypatch)
    gc.enable()


class Echo:
    """An engine that answers at once."""

    def generate(
        self,
        conversations: Sequence[Any],
        sampling: SamplingParams,
        seed: int,
        advance: Callable[[int, int], None] = lambda items, tokens: None,
    ) -> list[Completion]:
        return [Completion(f"{seed} {i}", "stop", 1, 1) for i in range(len(conversations))]


def run_sample(tmp_path: Path, triples: Path) -> StageResult:
    models = dict.fromkeys(("plain", "good", "bad"), "m")
    found, echo = stored_triples(triples), Echo()
    return sample(found, recipe(tmp_path), models, tmp_path / "s", "s", lambda source: echo)


def run_filter(tmp_path: Path, triples: Path) -> StageResult:
    r = recipe(tmp_path, "hygiene.max_length_ratio=9", "hygiene.match_lengths=true")
    policy = resolve_path(r.policy.model)
    return filter_triples(stored_triples(triples), r, policy, tmp_path, tmp_path / "scores")


def run_preferences(tmp_path: Path, triples: Path) -> StageResult:
    found = stored_triples(triples)
    return to_preferences(found, recipe(tmp_path), tmp_path / "p", cleaned=False)


def run_principles(tmp_path: Path, triples: Path) -> StageResult:
    (tmp_path / "q.jsonl").write_text(
        "".join(dump_line({"id": f"q{i:04d}", "prompt": f"Number {i}?"}) for i in range(RECORDS))
    )
    found = Stored(tmp_path / "q.jsonl", Query.from_dict)
    return write_principles(found, recipe(tmp_path), "", tmp_path, "principles")


@pytest.mark.parametrize("stage", [run_sample, run_filter, run_preferences, run_principles])
def test_a_stage_holds_a_shard_of_its_records(
    tmp_path: Path, triples: Path, census: Census, stage: Callable[[Path, Path], StageResult]
) -> None:
    monkey = "selfsteer.stages.filter.TOGETHER"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monkey, SHARD)
        result = stage(tmp_path, triples)
    assert result.n_out == RECORDS
    assert census.made >= RECORDS
    assert census.most <= 4 * SHARD + 4, "a shard in, a shard out, and what is being read"


@pytest.mark.parametrize("fmt", FORMATS)
def test_export_and_import_hold_a_few_records(
    tmp_path: Path, triples: Path, census: Census, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_preferences(tmp_path, triples)
    census.most = census.alive
    found, folder = stored_preferences(tmp_path / "p"), tmp_path / fmt
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
    with pytest.raises(DataError, match=f"line {line} is not JSON"):
        import_records(tmp_path / "l.json")
