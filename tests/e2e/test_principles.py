"""`selfsteer principles` and the ways that principles come into a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsteer.principles.catalogue import BUILT_IN
from tests.e2e.support import TESTBED, TINY, Here, fails, finished, full_for

QUERIES = "package:selfsteer.testbed/queries/align.jsonl"
SMALL = ("principles.max_new_tokens=96", "principles.shard_size=8", "policy.threads=1")


def write(to: Path, *more: str, queries: object = QUERIES) -> tuple[object, ...]:
    args = ("principles", "write", queries, "--model", TESTBED, "--to", to)
    return (*args, *SMALL, "queries.limit=24", *more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def until_principles(tmp_path: Path, *more: str) -> tuple[object, ...]:
    return ("run", "smoke", f"runs_dir={tmp_path}", "name=p", "--until", "principles", *TINY, *more)


def test_principles_are_written_without_a_run(tmp_path: Path, here: Here) -> None:
    to = tmp_path / "out" / "p.jsonl"
    ended = here(*write(to))
    assert ended.code == 0, ended.err
    found = lines(to)
    assert len(found) == 24
    ok = sum(v["source"] == "generated" for v in found)
    assert f"{ok} generated" in ended.out
    assert found[2]["principles"]["bad"] in ended.out
    assert [p.name for p in to.parent.iterdir() if p.is_dir()] == []
    again = here(*write(to), "--json")
    assert "nothing to do" in again.err
    report = json.loads(again.out)
    assert (report["n_in"], report["n_out"], sum(report["first_try"].values())) == (24, 24, 24)
    fails(here(*write(to, "seed=3")), 2, "there already")
    fails(here(*write(tmp_path / "q", "training.beta=1")), 2, "training.beta=1", "no effect")
    fails(here(*write(tmp_path / "q", "principles.exmples=1")), 2, "principles.examples")


def test_an_interrupted_writing_ends_like_an_undisturbed_one(tmp_path: Path, here: Here) -> None:
    to, whole = tmp_path / "p.jsonl", tmp_path / "whole.jsonl"
    assert here(*write(whole)).code == 0
    shards = tmp_path / "p.jsonl.partial/principles"
    with full_for("shard-00001.jsonl"):
        fails(here(*write(to)), 3, "disk is full")
    first = (shards / "shard-00000.jsonl").stat()
    assert not to.exists()
    fails(here(*write(to, "seed=5")), 2, "begun with other settings")
    assert (shards / "shard-00000.jsonl").stat() == first
    assert here(*write(to)).code == 0
    assert to.read_bytes() == whole.read_bytes()


def test_what_write_is_told_twice_is_refused(tmp_path: Path, here: Here) -> None:
    to = tmp_path / "p.jsonl"
    for twice in ("policy.model=other", "queries.path=other.jsonl"):
        fails(here(*write(to, twice)), 2, twice, "leave it out")


def test_a_finished_writing_leaves_nothing_beside_it(tmp_path: Path, here: Here) -> None:
    to = tmp_path / "p.jsonl"
    assert here(*write(to)).code == 0
    (tmp_path / "p.jsonl.partial" / "principles").mkdir(parents=True)  # as after a kill
    assert "nothing to do" in here(*write(to)).err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.report.json"]


def test_what_is_written_can_be_given_to_a_run(tmp_path: Path, here: Here) -> None:
    to = tmp_path / "p.jsonl"
    assert here(*write(to)).code == 0
    given = f"principles={{mode: fixed, path: {to}, shard_size: 8}}"
    ended = here(*until_principles(tmp_path, "queries.limit=16", given))
    assert ended.code == 0, ended.err
    made = lines(tmp_path / "p/iteration-1/principles.jsonl")
    wanted = {v["id"]: v["principles"] for v in lines(to)}
    assert [v["principles"] for v in made] == [wanted[v["id"]] for v in made]
    notes = finished(tmp_path / "p")["iteration-1/principles"]["notes"]
    assert notes == {"sources": {"fixed": 16}, "unused_in_file": 8}
    to.write_text("".join(json.dumps(v) + "\n" for v in lines(to)[1:]))
    fails(here(*until_principles(tmp_path, given)), 2, "--redo")
    fails(here(*until_principles(tmp_path, given, "--redo")), 2, "no principles for 1 of 16")
    default = given.replace("}", ", good: Be kind., bad: Be rude.}")
    assert here(*until_principles(tmp_path, default, "--redo")).code == 0
    notes = finished(tmp_path / "p")["iteration-1/principles"]["notes"]
    assert notes["sources"] == {"fixed": 15, "fixed:default": 1}


IMPROVED = (
    *("sampling.max_new_tokens=64", "policy.threads=1", "queries.limit=24", "improve.steps=2"),
    *("improve.confirm=8", "improve.max_new_tokens=48", "improve.tries=2"),
)


def improving(to: Path, *more: object, judge: str = "oracle") -> tuple[object, ...]:
    asked = ("principles", "improve", QUERIES, "--model", TESTBED, "--judge", judge, "--to", to)
    return (*asked, "--good", "Your response should be accurate.", "--bad", "Lie.", *more)


def test_a_principle_is_improved_without_a_run(tmp_path: Path, here: Here) -> None:
    """The tiny model cannot rewrite: the search goes on, and never ends below its start."""
    to = tmp_path / "better.yaml"
    ended = here(*improving(to, *IMPROVED))
    assert ended.code == 0, ended.err
    assert "rewritten: " in ended.out
    report = json.loads((tmp_path / "better.yaml.report.json").read_text())
    assert report["compared"] == 8
    assert report["n_in"] == 2 * 4 + 8
    assert report["ratings"]["best"] >= report["ratings"]["start"] > 0.5
    assert sum(report["written"].values()) == 2
    made = yaml.safe_load(to.read_text())
    assert made == {"principles": {"mode": "fixed", "good": report["best"], "bad": "Lie."}}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["better.yaml", "better.yaml.report.json"]
    assert "nothing to do" in here(*improving(to, *IMPROVED)).err
    fails(here(*improving(to, *IMPROVED, "seed=3")), 2, "there already")
    given = f"principles={json.dumps(made['principles'])}"
    assert here(*until_principles(tmp_path, given)).code == 0
    other = tmp_path / "other.yaml"
    fails(here(*improving(other, *IMPROVED, "training.beta=1")), 2, "no effect", "improve")
    chat = f"{{kind: chat, model: '{TESTBED}', max_new_tokens: 24}}"
    fails(here(*improving(other, *IMPROVED, judge=chat)), 2, "rates none")
    fails(here(*improving(other, *IMPROVED, "--writer", tmp_path / "none")), 3, "no model folder")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": "a", "principles": {"good": "x"}}\n', "line 1: principles have 'good', 'bad'"),
        ('{"id": "a", "good": "x", "bad": "y"}\n', "line 1: it needs 'id' and 'principles'"),
        ('{"id": "a", "principles": {"good": "x", "bad": "x"}}\n', "line 1: both principles"),
        ('{"id": "a", "principles": {"good": "x", "bad": "y"}}\n' * 2, "line 2 is the second"),
    ],
)
def test_bad_files_of_principles_name_the_line(
    tmp_path: Path, here: Here, text: str, said: str
) -> None:
    path = tmp_path / "fixed.jsonl"
    path.write_text(text)
    given = f"principles={{mode: fixed, path: {path}}}"
    fails(here("run", "smoke", given, f"runs_dir={tmp_path}"), 2, "fixed.jsonl", said)


def test_one_pair_for_all_queries_needs_no_writer(tmp_path: Path, here: Here) -> None:
    given = "principles={mode: fixed, good: Be kind and brief., bad: Be rude and long.}"
    ended = here(*until_principles(tmp_path, given))
    assert ended.code == 0, ended.err
    made = lines(tmp_path / "p/iteration-1/principles.jsonl")
    assert {(v["principles"]["good"], v["principles"]["bad"]) for v in made} == {
        ("Be kind and brief.", "Be rude and long.")
    }
    assert here("chat", tmp_path / "p", "--question", "What does the bee eat?").code == 0


def test_a_run_with_a_catalogue_of_its_own(tmp_path: Path, here: Here) -> None:
    value = BUILT_IN.model_dump(mode="json")
    value["features"] = [f for f in value["features"] if f["name"] in ("Safety", "Accuracy")]
    value["features"][0].update(name="Care", good_adjective="careful", weight=2)
    value["appended"] = {}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    args = until_principles(
        tmp_path, f"principles.catalogue={path}", "principles.append.Accuracy=1.0",
        "principles.features_per_query=1",
    )  # fmt: skip
    ended = here(*args)
    assert ended.code == 0, ended.err
    made = lines(tmp_path / "p/iteration-1/principles.jsonl")
    assert {tuple(v["principles"]["features"]) for v in made} == {("Care", "Accuracy")}
    assert all("should be careful and accurate." in v["principles"]["good"] for v in made)
    notes = finished(tmp_path / "p")["iteration-1/principles"]["notes"]
    assert notes["features"] == {"Care": 16, "Accuracy": 16}
    assert notes["features_appended"] == 16
    path.write_text(path.read_text().replace("careful", "watchful"))
    fails(here(*args), 2, "--redo")
    path.write_text(path.read_text() + "colour: red\n")
    fails(here(*args), 2, "mine.yaml", "colour: is not a known key")


def test_a_writer_that_cannot_write_is_counted_try_by_try(
    tmp_path: Path, here: Here, checkpoints: dict[str, Path]
) -> None:
    more = (f"principles.writer={checkpoints['llama']}", "principles.candidates=2")
    ended = here(*until_principles(tmp_path, *more, "principles.max_new_tokens=8"))
    assert ended.code == 0, ended.err
    notes = finished(tmp_path / "p")["iteration-1/principles"]["notes"]
    assert sum(notes["first_try"].values()) == sum(notes["retry"].values()) == 32
    assert sum(n for s, n in notes["sources"].items() if s.startswith("fallback:")) == 16
    first = ", ".join(f"{n} {outcome}" for outcome, n in notes["first_try"].items())
    assert f"iteration-1/principles: first try {first}; retry" in here("show", tmp_path / "p").out


def test_sampling_settings_do_not_redo_principles(tmp_path: Path, here: Here) -> None:
    assert here(*until_principles(tmp_path)).code == 0
    same = here(*until_principles(tmp_path, "sampling.batch_size=3", "sampling.shard_size=4"))
    assert "nothing to do" in same.err
    fails(here(*until_principles(tmp_path, "principles.batch_size=3")), 2, "principles", "--redo")


def test_list_show_and_lint(tmp_path: Path, here: Here) -> None:
    listed = here("principles", "list")
    assert all(f.name in listed.out for f in BUILT_IN.features)
    assert "appended 0.2" in listed.out
    path = tmp_path / "mine.yaml"
    path.write_text(here("principles", "list", "--yaml").out)
    assert json.loads(here("principles", "list", path, "--json").out) == BUILT_IN.model_dump(
        mode="json"
    )
    clean = here("principles", "lint", path)
    assert (clean.code, "is clean" in clean.out) == (0, True)
    shown = json.loads(here("principles", "show", "Accuracy", "--catalogue", path, "--json").out)
    assert shown["good"] == (
        "Your response should be accurate. State only facts that are true. "
        "Do not reveal that you follow guidelines."
    )
    fails(here("principles", "show", "Acuracy"), 2, "Did you mean Accuracy?")
    path.write_text(path.read_text().replace("good: State only facts that are true.", "good: ''"))
    found = here("principles", "lint", path)
    fails(found, 2, "1 finding(s)")
    assert "Accuracy.good: is empty" in found.out
    (finding,) = json.loads(here("principles", "lint", path, "--json").out)
    assert path.read_text().splitlines()[finding["line"] - 1].strip() == "good: ''"
