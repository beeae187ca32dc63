"""Curating and growing query sets through the real command line."""

import json
from pathlib import Path

import pytest

from selfsteer.data.jsonl import dump_lines
from tests.e2e.support import Here, fails, finished

FLOOD = "Describe how a village by the river gets ready for the yearly flood in spring"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_queries_cleans_a_file_and_shows_what_it_did(tmp_path: Path, here: Here) -> None:
    source = write(
        tmp_path / "mixed.jsonl",
        {"prompt": f"{FLOOD}."},
        {"prompt": f"{FLOOD} again"},
        {"instruction": "Name a fish", "input": "that lives [in] a lake", "output": "Pike."},
        {"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Yes?"}]},
        {"conversations": [{"from": "gpt", "value": "Yes?"}]},
        {"prompt": "Почему небо голубое?"},
        *({"prompt": f"Tell me about the number {i}."} for i in range(40)),
    )
    evaluation = write(
        tmp_path / "bench.jsonl", {"id": "[e1]", "prompt": "Name a fish that lives in a lake."}
    )
    out = tmp_path / "out.jsonl"
    args = ("queries", source, "--to", out, "--script", "Latin", "--near-duplicates", 0.8,
            "--against", evaluation, "--holdout", 0.2, "--ngram", 8)  # fmt: skip
    ended = here(*args)
    assert ended.code == 0, ended.err
    for words in ("46 read", "-1 contaminated", "-1 near duplicate", "-1 other script",
                  "-1 no user turn", "end of kept queries: 1",
                  "[e1]", "name a fish that lives in a lake", "all of them in"):  # fmt: skip
        assert words in ended.out, words
    kept, held = (
        [json.loads(line) for line in p.read_text().splitlines()]
        for p in (out, tmp_path / "out.holdout.jsonl")
    )
    assert len(kept) + len(held) == 42
    assert f"{len(kept)} {out}" in ended.out
    found = json.loads(here(*args, "--json").out)
    assert found["dropped"] == {
        "near_duplicate": 1, "contaminated": 1, "no_user_turn": 1, "other_script": 1,
    }  # fmt: skip
    assert (found["queries"], found["holdout"]) == (len(kept), len(held))
    (pair,) = found["contaminated"]
    assert (tmp_path / "out.contaminated.jsonl").read_text() == json.dumps(pair) + "\n"
    assert (pair["against"], pair["evaluation_id"]) == (str(evaluation), "[e1]")


def test_queries_refuses_what_it_cannot_do(tmp_path: Path, here: Here) -> None:
    source = write(tmp_path / "q.jsonl", {"text": "Who?"})
    to = ("--to", tmp_path / "out.jsonl")
    fails(here("queries", source, *to), 2, "q.jsonl, line 1: no known shape", "keys are text")
    fails(here("queries", source, *to, "--column", "test=prompt"), 2, "no column 'test'", "'text'")
    fails(here("queries", source, *to, "--column", "text"), 2, "--column takes OLD=NEW")
    twice = ("--column", "text=prompt", "--column", "text=system")
    fails(here("queries", source, *to, *twice), 2, "one column two names")
    fails(here("queries", source, *to, "--script", "Latn"), 2, "did you mean Latin")
    fails(here("queries", source, *to, "--ngram", 5), 2, "ngram has no effect")
    fails(here("queries", source, "--to", source), 2, "choose another --to")
    fails(here("queries", tmp_path / "no.jsonl", *to), 2, "There is no file")
    fails(here("queries", source, *to, "--against", tmp_path / "e.jsonl"), 2, "e.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    ended = here("queries", source, *to, "--column", "text=prompt")
    assert ended.code == 0, ended.err
    write(source, {"prompt": "Why?"}, {"text": "Who?"}, {"text": "Who?"})
    ended = here("queries", source, *to)
    assert "line 2: no known shape" in " ".join(ended.err.split())
    assert "also line 3" in ended.err


def test_a_hold_out_that_stays_is_not_held_in(tmp_path: Path, here: Here) -> None:
    source = write(tmp_path / "q.jsonl", *({"prompt": f"Who is number {i}?"} for i in range(20)))
    args = ("queries", source, "--to", tmp_path / "out.jsonl")
    assert here(*args, "--holdout", 0.3).code == 0
    before = (tmp_path / "out.jsonl").read_text()
    fails(here(*args), 2, "out.holdout.jsonl is there", "Give the same --holdout")
    assert (tmp_path / "out.jsonl").read_text() == before
    assert here(*args, "--holdout", 0.4).code == 0


def test_a_run_curates_grows_and_goes_on(tmp_path: Path, here: Here) -> None:
    world = Path(__file__).parents[2] / "src/selfsteer/testbed/queries"
    lines = (world / "align.jsonl").read_text().splitlines()[:24]
    held_out = (world / "tune.jsonl").read_text().splitlines()[:4]
    source = tmp_path / "q.jsonl"
    source.write_text("\n".join(lines + held_out + lines[:2]) + "\n")
    (tmp_path / "e.jsonl").write_text("\n".join(held_out) + "\n")
    args = (
        "run", "smoke", f"runs_dir={tmp_path}", "name=g", "policy.threads=1",
        f"queries.path={source}", "queries.limit=null", "queries.near_duplicates=0.8",
        f"queries.against=[{tmp_path / 'e.jsonl'}]", "queries.ngram=30",
        "queries.augment={to: 32, attempts: 2, max_new_tokens: 24}", "sampling.shard_size=6",
    )  # fmt: skip
    ended = here(*args, "--until", "augment")
    assert ended.code == 0, ended.err
    run = tmp_path / "g"
    stages = finished(run)
    assert stages["queries"]["n_out"] == 24
    assert stages["queries"]["dropped"] == {"contaminated": 4, "duplicate": 2}
    pairs = [json.loads(x) for x in (run / "contaminated.jsonl").read_text().splitlines()]
    assert sorted(p["evaluation_id"] for p in pairs) == sorted(
        json.loads(x)["id"] for x in held_out
    )
    grown = stages["augment"]
    # the tiny model never learnt to write queries: what it says is refused, and counted
    assert grown["n_in"] == grown["n_out"] + sum(grown["dropped"].values())
    assert grown["notes"]["rounds"] == 2
    assert sum(grown["notes"]["replies"].values()) == grown["n_in"] - 24 >= 8
    assert set(grown["notes"]["diversity"]) == {"before", "after"}
    assert "2 rounds of augmentation came to" in ended.err
    assert here(*args, "--until", "augment").err.startswith("nothing to do")
    # other settings of the queries are other queries
    fails(here(*args, "queries.near_duplicates=0.9"), 2, "made with other settings")
    # what grew is what principles are written for
    picked = ("principles.mode=picked", "principles.features=random",
              "principles.max_new_tokens=null", "principles.batch_size=null")  # fmt: skip
    ended = here(*args, *picked, "--until", "principles")
    assert ended.code == 0, ended.err
    assert finished(run)["iteration-1/principles"]["n_in"] == grown["n_out"]
    assert "diversity of the queries after augmentation" in here("show", run).out


def test_a_run_from_elsewhere_says_which_file_it_does_not_find(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"What is {n} and {n}?"} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text(dump_lines(rows))
    monkeypatch.chdir(tmp_path)
    args = ("run", "smoke", "name=m", "queries.path=mine.jsonl", "judge=null", "evaluation=null")
    assert here(*args, "--until", "queries").code == 0
    run = tmp_path / "runs" / "m"
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for more in ((), ("--redo",)):
        fails(here("run", run, *more), 2, "mine.jsonl is not there", "where the run was begun")
        assert sorted(p.relative_to(run) for p in run.rglob("*")) == before
    monkeypatch.chdir(tmp_path)
    assert here("run", run, "--until", "queries").err.startswith("nothing to do")
