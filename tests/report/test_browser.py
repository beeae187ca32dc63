"""The rows of the data browser: what an index says of hand-made triples."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import dump_lines
from selfsteer.data.records import Query, Triple, Verdict
from selfsteer.errors import ArtifactError
from selfsteer.judges.base import Pair
from selfsteer.judges.chat import ChatJudge, stored_judgement
from selfsteer.judges.store import AnswerStore
from selfsteer.methods import load_recipe
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.report.browser import (
    Fates,
    Index,
    Wanted,
    build,
    disagreement,
    embedded,
    index_file,
)
from selfsteer.report.server import Pages
from selfsteer.run.folder import RunFolder
from selfsteer.view import RunView, Sampled
from tests.fakes import FakeEngine
from tests.make import entry

SET, FILTER = "iteration-1/triples", "iteration-1/filter"


def triple(identity: str, query: str, **responses: str) -> dict[str, Any]:
    texts = {"plain": "It rains.", "good": "It rains in May.", "bad": "Frogs rain."} | responses
    principles = {"good": "Be exact.", "bad": "Be absurd.", "features": ["Accuracy"]}
    messages = [{"role": "user", "content": query}]
    return {"id": identity, "messages": messages, "principles": principles, "responses": texts}


TRIPLES = [
    triple("a", "When does it rain?"),
    triple("b", "Does it snow?", good="No.", bad="It snows soup, day and night."),
    triple("c", "Is it windy?", good="It rains."),
    triple("d", "Is it warm?", good="Helpful response: Quite warm.", bad="Cold as <b>glass</b>."),
]


def make(folder: Path, triples: list[dict[str, Any]]) -> Path:
    """A run that has sampled these triples."""
    labels, run = folder / "labels.jsonl", folder / "made"
    shards = run / SET
    shards.mkdir(parents=True)
    given = ["name=made", "policy.model=nobody/nothing", "queries.path=prompts.jsonl"]
    recipe = load_recipe("sso", [*given, f"judge=human:{labels}"])
    (run / "resolved.json").write_text(recipe.model_dump_json())
    RunFolder(run).append("ledger.jsonl", entry("begin", SET, "Sample"))
    half = len(triples) // 2
    (shards / "shard-00000.jsonl").write_text(dump_lines(triples[:half]))
    (shards / "shard-00001.jsonl").write_text(dump_lines(triples[half:]) + '{"id": "torn", "mes')
    human = [
        {"id": "a", "first": "It rains in May.", "second": "Frogs rain.", "verdict": "first"},
        {"id": "b", "first": "It snows soup, day and night.", "second": "No.", "verdict": "first"},
    ]
    labels.write_text(dump_lines(human))
    return run


def finish_filter(run: Path, kept: list[dict[str, Any]], dropped: dict[str, int]) -> None:
    (run / "iteration-1" / "filtered.jsonl").write_text(dump_lines(kept))
    made = {"outputs": ["iteration-1/filtered.jsonl"], "n_out": len(kept), "dropped": dropped}
    line = entry("finish", FILTER, "FilterTriples", **made)
    RunFolder(run).append("ledger.jsonl", line)


def sampled(run: Path) -> Sampled:
    (found,) = RunView.open(run).sampled
    return found


CLEANED = {**TRIPLES[3], "responses": {**TRIPLES[3]["responses"], "good": "Quite warm."}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has filtered its triples, and kept what it dropped."""
    made = make(tmp_path, TRIPLES)
    finish_filter(made, [TRIPLES[0], TRIPLES[1], CLEANED], {"equals_plain": 1})
    line = {"id": "c", "reason": "equals_plain", "record": TRIPLES[2]}
    (made / f"{FILTER}.dropped.jsonl").write_text(json.dumps(line) + "\n")
    return made


@pytest.fixture
def index(run: Path) -> Index:
    return Index(build(sampled(run)))


def ids(index: Index, **wanted: Any) -> list[str]:
    return [row["id"] for row in index.page(Wanted(**wanted), 0, 100)]


def test_every_triple_has_its_fate_and_a_torn_line_is_counted(index: Index) -> None:
    fates = {row["id"]: row["fate"] for row in index.page(Wanted(), 0, 9)}
    assert fates == {"a": "kept", "b": "kept", "c": "equals_plain", "d": "kept"}
    assert index.about["unreadable"] == 1
    assert index.counts("fate") == {"kept": 3, "equals_plain": 1}


def test_before_the_filter_nothing_is_decided(tmp_path: Path) -> None:
    index = Index(build(sampled(make(tmp_path, TRIPLES))))
    assert index.counts("fate") == {"pending": 4}


def test_a_drop_without_a_record_says_so(run: Path) -> None:
    (run / f"{FILTER}.dropped.jsonl").unlink()
    index = Index(build(sampled(run)))
    assert index.counts("fate") == {"kept": 3, "no record kept": 1}
    assert ids(index, fate="dropped") == ["c"]


def test_what_was_dropped_is_shown_as_the_stage_saw_it(run: Path) -> None:
    cut = {**TRIPLES[2], "responses": {**TRIPLES[2]["responses"], "good": "Cut."}}
    line = {"id": "c", "reason": "too_short", "record": cut}
    (run / f"{FILTER}.dropped.jsonl").write_text(json.dumps(line) + "\n")
    index = Index(build(sampled(run)))
    (record,) = index.records([3])
    assert (record["fate"], record["trained_on"]) == ("too_short", {"good": "Cut."})


def test_filters_join_and_search_looks_into_every_text(index: Index) -> None:
    assert ids(index, q="SOUP") == ["b"]
    assert ids(index, q="does it") == ["a", "b"]
    assert ids(index, q="does it", verdict="second") == ["b"]
    assert ids(index, fate="dropped") == ["c"]
    assert ids(index, feature="Accuracy", fate="kept") == ["a", "b", "d"]
    assert ids(index, feature="Safety") == []
    assert ids(index, q="be absurd.") == ["a", "b", "c", "d"]
    assert ids(index, q="[x](") == []


def test_order_by_length_and_by_disagreement_puts_the_unknown_last(index: Index) -> None:
    # good minus bad, in characters: a 5, b -26, c -2, d -9 without its lead-in
    assert ids(index, sort="length_difference") == ["a", "c", "d", "b"]
    assert ids(index, sort="length_difference", ascending=True) == ["b", "d", "c", "a"]
    assert ids(index, sort="disagreement") == ["b", "a", "c", "d"]


def test_pages_are_slices_of_the_order(index: Index) -> None:
    whole = index.page(Wanted(sort="length_difference"), 0, 9)
    assert [index.page(Wanted(sort="length_difference"), n, 1) for n in range(4)] == [
        [row] for row in whole
    ]


def test_a_record_shows_what_is_trained_on_beside_what_was_sampled(index: Index) -> None:
    number = index.number("d")
    assert number is not None
    (record,) = index.records([number])
    assert record["triple"] == TRIPLES[3]
    assert record["trained_on"] == {"good": "Quite warm."}
    assert record["judgement"]["verdict"] == "unparseable"  # nobody has labelled it
    assert record["tokens"] == {}
    assert index.about["why_no_colour"]


def test_what_is_trained_on_brings_its_own_ends(tmp_path: Path) -> None:
    """A judge has changed the answers' places; the plain one stays as it was sampled."""
    given = triple("a", "Does it rain?", good="No.", bad="Yes", plain="Per")
    given["finish_reasons"] = {"good": "stop", "bad": "length", "plain": "length"}
    made = make(tmp_path, [given])
    kept = {**given, "responses": {"good": "Yes", "bad": "No."}}
    finish_filter(made, [{**kept, "finish_reasons": {"good": "length"}}], {})
    fate, found = Fates(sampled(made)).of(Triple.from_dict(given))
    assert fate == "kept"
    assert {name: found.finished(name) for name in found.responses} == {
        **{"good": False, "bad": True, "plain": False}
    }


def test_an_export_is_read_back_as_the_same_triples(index: Index) -> None:
    lines = list(index.export(Wanted(fate="kept", sort="length_difference")))
    back = [Triple.from_dict(json.loads(line)) for line in lines]
    assert [t.id for t in back] == ["a", "b", "d"]
    assert back[0].responses == TRIPLES[0]["responses"]
    assert back[1].extra == {
        "fate": "kept",
        "verdict": "second",
        "disagreement": 1.0,
        "length_difference": -26,
    }


def test_an_index_is_made_once_and_again_when_the_stage_has_changed(run: Path) -> None:
    first = build(sampled(run))
    before = first.stat().st_mtime_ns
    assert build(sampled(run)) == first
    assert first.stat().st_mtime_ns == before
    (run / SET / "shard-00002.jsonl").write_text(dump_lines([triple("e", "Is it late?")]))
    second = build(sampled(run))
    assert second != first
    assert not first.exists()
    assert Index(second).number("e") == 5


def test_an_index_that_goes_while_it_is_looked_at_is_waited_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, pages = sampled(run), Pages(run)
    path = index_file(found)
    earlier = build(found).rename(path.with_suffix(".earlier"))
    at_work = {"done": 1, "total": 4}
    monkeypatch.setattr(pages.jobs, "ask", lambda *_: at_work)
    index, building = pages.index(found)
    assert index is not None
    assert (index.about["of"], building) == (4, at_work)
    earlier.unlink()
    earlier.symlink_to("gone")  # listed, and nothing there when it is opened
    assert pages.index(found) == (None, at_work)
    pages.close()


def test_a_link_out_of_the_run_is_not_followed(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.jsonl"
    outside.write_text(dump_lines([triple("secret", "What is the key?")]))
    (run / SET / "shard-00003.jsonl").symlink_to(outside)
    assert Index(build(sampled(run))).number("secret") is None
    for shard in (run / SET).glob("shard-0000[01].jsonl"):
        shard.unlink()
    assert RunView.open(run).sampled == []


def test_an_index_is_the_users_own_and_none_comes_with_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    path = build(sampled(run))
    assert path.is_relative_to(tmp_path / "cache/view")
    planted = run / ".view" / path.name
    planted.parent.mkdir()
    os.mkfifo(planted)  # what would be read here would never end
    assert build(sampled(run)) == path
    assert Index(path).about["of"] == 4


@pytest.mark.parametrize("left", [b"", b"SQLite format 3\0", b"x" * 9000])
def test_a_damaged_index_is_made_again(run: Path, left: bytes) -> None:
    found = sampled(run)
    path = build(found)
    path.write_bytes(left)
    with pytest.raises(ArtifactError, match="is damaged"):
        Index(path)
    assert Index(build(found)).about["of"] == 4
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_index_without_room_says_so_and_leaves_nothing(run: Path) -> None:
    found, before = sampled(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ArtifactError, match=r"cannot be written.*SELFSTEER_CACHE"):
            build(found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(index_file(found).parent.iterdir()) == []
    assert Index(build(found)).about["of"] == 4


def test_where_the_cache_cannot_be_written_an_index_is_temporary(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("in the way")  # as root may write anywhere
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    path = build(sampled(run))
    assert not path.is_relative_to(run)
    assert Index(path).about["of"] == 4


def test_indices_that_nobody_looks_at_are_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    old, new = tmp_path / "cache/view/old", tmp_path / "cache/view/new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    build(sampled(run))
    assert new.exists()
    assert not old.exists()


def test_disagreement_is_the_bad_responses_lead() -> None:
    assert disagreement(None) is None
    assert disagreement({"verdict": "unparseable"}) is None
    assert disagreement({"verdict": "inconsistent"}) == 0.5
    assert disagreement({"verdict": "first", "scores": [0.75, 0.25]}) == -0.5


def test_what_a_chat_judge_said_is_found_again_in_both_orders(tmp_path: Path) -> None:
    pair = Pair(Query.from_dict({"id": "q", "prompt": "Is it cold?"}), "No.", "Yes, soup.")
    engine = FakeEngine(lambda request: "It is fine.\nVerdict: A")  # whatever is shown first
    judge = ChatJudge(JudgeConfig(kind="chat", model="x", device="cpu"), tmp_path, engine)
    assert stored_judgement(pair, AnswerStore(None).known) is None
    (said,) = judge.compare_all([pair])
    found = stored_judgement(pair, AnswerStore(next(tmp_path.iterdir())).known)
    assert found is not None
    judgement, texts = found
    assert judgement == said
    assert judgement.verdict is Verdict.INCONSISTENT
    assert judgement.shown == (Verdict.FIRST, Verdict.FIRST)
    assert texts == ["It is fine.\nVerdict: A"] * 2


def test_a_page_without_a_server_holds_a_part_and_says_so(run: Path) -> None:
    whole = embedded(RunView.open(run))
    assert whole is not None
    assert [r["id"] for r in whole["start"]["rows"]] == ["a", "b", "c", "d"]
    assert whole["start"]["about"]["iteration-1/triples"]["cap"] == ""
    part = embedded(RunView.open(run), cap=2)
    assert part is not None
    assert [r["id"] for r in part["start"]["rows"]] == ["a", "c"]
    assert "2 of 4" in part["start"]["about"]["iteration-1/triples"]["cap"]
    small = embedded(RunView.open(run), most_bytes=1)
    assert small is not None
    assert len(small["start"]["rows"]) == 1


def test_a_run_without_triples_has_no_browser(run: Path) -> None:
    (run / "ledger.jsonl").unlink()
    assert embedded(RunView.open(run)) is None


def made_of(tmp_path: Path, *stages: tuple[str, str, list[dict[str, Any]]]) -> Index:
    """The index of the triples after these stages: title, kind and what each of them wrote."""
    run = make(tmp_path, TRIPLES)
    for title, kind, rows in stages:
        file = f"iteration-1/{title}.jsonl"
        (run / file).write_text(dump_lines(rows))
        line = entry("finish", f"iteration-1/{title}", kind, outputs=[file], n_out=len(rows))
        RunFolder(run).append("ledger.jsonl", line)
    return Index(build(sampled(run)))


def pair_of(row: dict[str, Any], rejected: str) -> dict[str, Any]:
    said = {"chosen": row["responses"]["good"], "rejected": rejected}
    turns = {k: [{"role": "assistant", "content": text}] for k, text in said.items()}
    return {"id": row["id"], "prompt": row["messages"], **turns}


def test_the_pair_is_the_one_that_the_last_stage_made(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    kept = [TRIPLES[0], TRIPLES[3]]
    pairs = [pair_of(TRIPLES[0], "It rains."), pair_of(CLEANED, "Cold as <b>glass</b>.")]
    index = made_of(
        tmp_path / "all",
        ("contrasting", "KeepContrasting", kept),
        ("preferences", "WritePairs", pairs),
        ("figures", "FigurePairs", [{"id": p["id"], "margins": 1.0} for p in pairs]),
    )
    fates = {r["id"]: (r["fate"], r["trained_on"]) for r in index.records(range(1, 5))}
    lost: tuple[str, dict[str, str]] = ("no record kept", {})
    plain, cut = {"bad": "It rains."}, {"good": "Quite warm."}
    assert fates == {"a": ("kept", plain), "b": lost, "c": lost, "d": ("kept", cut)}
    (row,) = index.records([1])
    # the label of the pair with the bad response is not that of this one
    assert (row["verdict"], row["length_difference"]) == ("unparseable", len(" in May"))
    assert json.loads(next(index.export(Wanted())))["verdict"] == "unparseable"


def test_a_pair_whose_rejected_answer_is_plain_has_its_verdict(tmp_path: Path) -> None:
    said = {"plain": "Frogs rain.", "good": "It rains in May."}
    rows = [{**TRIPLES[0], "responses": said}]
    run = make(tmp_path, rows)
    RunFolder(run).append("ledger.jsonl", entry("finish", SET, "Sample"))
    file = "iteration-1/preferences.jsonl"
    (run / file).write_text(dump_lines([pair_of(rows[0], "Frogs rain.")]))
    line = entry("finish", "iteration-1/preferences", "WritePairs", outputs=[file])
    RunFolder(run).append("ledger.jsonl", line)
    (row,) = Index(build(sampled(run))).records([1])
    assert (row["verdict"], row["disagreement"], row["length_difference"]) == ("first", 0.0, 5)
