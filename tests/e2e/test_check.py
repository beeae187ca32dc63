"""`selfsteer check` on models and settings that each have one thing wrong."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from selfsteer.recipe.sections import resolve_path
from selfsteer.run.folder import RunFolder
from tests.e2e.support import TESTBED, Ended, Here, artefacts, ledger


def look(here: Here, tmp_path: Path, *more: Any, queries: int = 4) -> Ended:
    return here("check", "smoke", f"runs_dir={tmp_path / 'runs'}", "--queries", queries, *more)


def checks(ended: Ended) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(ended.out)["checks"]
    assert json.loads(ended.out)["exit_code"] == ended.code
    return found


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's architecture, tokenizer and template, with random weights."""
    folder, source = tmp_path_factory.mktemp("untrained"), resolve_path(TESTBED)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_the_tiny_world_steers(tmp_path: Path, here: Here) -> None:
    ended = look(here, tmp_path, "--json", queries=40)
    assert ended.code == 0
    found = checks(ended)
    assert {c["status"] for c in found.values()} <= {"ok", "warning"}
    assert list(found) == [
        *("recipe", "folder", "queries", "evaluation", "judge", "template", "model", "engine"),
        *("layout", "disk", "principles", "budgets", "sampling", "steering", "ranking", "time"),
    ]
    steering = found["steering"]["figures"]
    assert steering["steers"] is True
    for half in ("good", "bad"):
        assert 0.05 < steering["net_gap"][half][0] < 0.15
        assert steering["net_gap"][half][1] > 0.03
    assert steering["accuracy"][0] > 0.8
    ranking = found["ranking"]["figures"]
    assert ranking["decided"] <= ranking["pairs"] <= 40
    assert 0.005 < ranking["spread"] < 0.2
    assert ranking["agreement"][0] > 0.6
    assert sum(f["triples"] for f in steering["features"].values()) >= 2 * steering["triples"]
    assert found["queries"]["figures"] == {"queries": 64, "dropped": {"over_limit": 1262}}
    assert found["budgets"]["figures"]["context"] == 512
    assert found["layout"]["figures"]["layout"] == "tree"
    assert found["layout"]["figures"]["difference"] < 1e-4
    role = {"system_role": True, "end_of_turn": "<eos>"}
    own = {"default_system": "", "date": None}
    assert found["template"]["figures"] == {**role, **own, "refused": {}}
    assert set(found["time"]["figures"]["seconds"]) == {
        *("principles", "sampling", "scoring", "training", "judging")
    }
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_what_a_person_sees(tmp_path: Path, here: Here) -> None:
    ended = look(here, tmp_path, queries=24)
    lines = ended.out.splitlines()
    said = "method sso, baseline pbaa, 1 iteration, principles generated, seed 0"
    assert lines[0] == f"ok       recipe     {said}"
    assert lines[1] == f"ok       folder     {tmp_path}/runs/smoke: 14 stages to do"
    assert any(" steering   steers on " in line for line in lines)
    header = next(i for i, line in enumerate(lines) if line.startswith("feature "))
    gaps = []
    for line in lines[header + 1 :]:
        if not line[0].isupper():
            break
        gaps.append(sum(map(float, line.split()[2:4])))
    assert len(gaps) > 4
    assert gaps == sorted(gaps, reverse=True)
    assert lines[-1].startswith("ready: the policy steers on ")
    assert "selfsteer preview smoke " in ended.err.splitlines()[-1]


def test_random_weights_do_not_steer(tmp_path: Path, here: Here, untrained: Path) -> None:
    """Their gap is far from 0, as any model's is; the net gap and the judge are not fooled."""
    more = (f"policy.model={untrained}", "sampling.max_new_tokens=32", "principles.mode=picked",
            "sampling.keep_unfinished=true", "principles.max_new_tokens=16")  # fmt: skip
    ended = look(here, tmp_path, *more, "--json", queries=32)
    assert ended.code == 0
    found = checks(ended)
    steering = found["steering"]["figures"]
    assert steering["steers"] is False
    assert steering["gap"]["good"][1] > 0.03
    assert steering["net_gap"]["good"][1] < 0 < steering["net_gap"]["good"][2]
    assert "Answers react to the wording" in found["steering"]["todo"][0]
    assert found["sampling"]["status"] == "warning"
    assert found["sampling"]["figures"]["unfinished"]["bad"] > 0.9
    assert found["steering"]["found"].startswith("does not steer on 32 queries")


def test_a_template_without_system_role(
    tmp_path: Path, here: Here, checkpoints: dict[str, Path]
) -> None:
    ended = look(
        here, tmp_path, f"policy.model={checkpoints['gemma']}", "sampling.max_new_tokens=16",
        "sampling.keep_unfinished=true", "principles.max_new_tokens=16", "--json",
    )  # fmt: skip
    found = checks(ended)
    assert found["template"]["status"] == "warning"
    assert "no system role" in found["template"]["found"]
    assert "first user turn" in found["template"]["todo"][0]
    assert found["principles"]["status"] == "warning", "it cannot write principles either"


def picky(folder: Path) -> Path:
    """The tiny model, with a template that refuses conversations of more than three turns."""
    shutil.copytree(resolve_path(TESTBED), folder)
    template = folder / "chat_template.jinja"
    refusal = (
        "{%- if messages | length > 3 -%}{{- raise_exception('at most three') -}}{%- endif -%}"
    )
    template.write_text(refusal + template.read_text())
    return folder


def test_queries_that_the_template_refuses_are_named_and_dropped(
    tmp_path: Path, here: Here
) -> None:
    talk = [{"role": r, "content": f"What does the {r} eat?"} for r in ("user", "assistant") * 2]
    turns = [*talk, {"role": "user", "content": "Why?"}]
    for name in ("q", "e"):
        rows = [{"id": f"{name}{i}", "prompt": f"What does the {name}{i} eat?"} for i in range(4)]
        written = [*map(json.dumps, rows), json.dumps({"id": f"{name}-talk", "messages": turns})]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(written))
    more = (
        f"policy.model={picky(tmp_path / 'picky')}", f"queries.path={tmp_path / 'q.jsonl'}",
        f"evaluation.queries.path={tmp_path / 'e.jsonl'}", "judge=null", "queries.limit=null",
        "evaluation.queries.limit=null",
    )  # fmt: skip
    found = checks(look(here, tmp_path, *more, "--json"))
    template = found["template"]
    assert template["figures"]["refused"] == {"queries": 1, "evaluation": 1}
    assert template["status"] == "warning"
    assert [("q-talk" in t, "e-talk" in t) for t in template["todo"]] == [
        (True, False),
        (False, True),
    ]
    assert all("at most three" in t for t in template["todo"])
    assert found["budgets"]["status"] != "FAILED"
    ended = here("run", "smoke", f"runs_dir={tmp_path / 'runs'}", *more)
    assert ended.code == 0, ended.err
    assert "q-talk and others like it get no answer" in ended.err
    dropped = {e["stage"]: e.get("dropped", {}) for e in ledger(tmp_path / "runs" / "smoke")}
    for stage in ("iteration-1/triples", "evaluation"):
        assert dropped[stage]["request_failed:template"] == 1
    lost = (tmp_path / "runs/smoke/evaluation.dropped.jsonl").read_text()
    assert "e-talk" in lost


def test_no_query_that_the_template_takes_is_an_error(tmp_path: Path, here: Here) -> None:
    turns = [{"role": r, "content": f"What does the {r} eat?"} for r in ("user", "assistant") * 2]
    query = {"id": "q", "messages": [*turns, {"role": "user", "content": "Why?"}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(query) + "\n")
    ended = look(
        here, tmp_path, f"policy.model={picky(tmp_path / 'picky')}", "judge=null",
        f"queries.path={tmp_path / 'q.jsonl'}", "evaluation=null", "queries.limit=null",
    )  # fmt: skip
    assert ended.code == 2
    assert "No query is left" in ended.out
    assert "at most three" in ended.out


def test_a_context_that_is_too_small(tmp_path: Path, here: Here) -> None:
    ended = look(here, tmp_path, "sampling.max_new_tokens=480")
    assert ended.code == 2
    assert "FAILED   budgets    No query fits" in ended.out
    assert "skipped  sampling, steering" in ended.out
    path = tmp_path / "q.jsonl"
    prompts = ["What does the bee eat?", "What does the cat eat?", "Well, " * 160 + "why?"]
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    more = (f"queries.path={path}", "judge=null", "evaluation=null", "sampling.max_new_tokens=200")
    found = checks(look(here, tmp_path, *more, "--json"))
    assert found["budgets"]["figures"]["prompt_too_long"] == 1
    assert found["budgets"]["todo"][0].startswith("1 of 3 queries would be dropped")
    assert found["sampling"]["figures"]["dropped"]["prompt_too_long"] == 1


def test_an_answer_budget_that_is_too_small(tmp_path: Path, here: Here) -> None:
    ended = look(here, tmp_path, "sampling.max_new_tokens=4")
    assert ended.code == 3
    assert "FAILED   sampling   0 of 4 triples left (4 unfinished)" in ended.out
    assert ended.out.splitlines()[-1] == "not ready: fix sampling, then check again"


def test_one_query_tells_nothing_of_steering(tmp_path: Path, here: Here) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "What does the bee eat?"}\n')
    more = (f"queries.path={tmp_path / 'one.jsonl'}", "queries.limit=null", "judge=null")
    ended = look(here, tmp_path, *more, "evaluation=null")
    assert ended.code == 3
    assert "1 of 1 triples left, and steering cannot be measured on fewer than 2" in ended.out


def test_a_length_that_training_would_cut(tmp_path: Path, here: Here) -> None:
    found = checks(look(here, tmp_path, "generator.max_length=100", "--json"))
    assert found["budgets"]["figures"]["cut_by"]["generator.max_length"] == 64
    assert found["budgets"]["figures"]["cut_by"]["training.max_length"] == 0
    assert "generator.max_length is 100" in found["budgets"]["todo"][0]


def test_an_engine_that_ignores_temperature(tmp_path: Path, here: Here) -> None:
    more = ("sampling.top_p=1e-9", "evaluation=null")
    found = checks(look(here, tmp_path, *more, "--json"))
    assert found["engine"]["status"] == "warning"
    assert "ignores temperature 0.7" in found["engine"]["todo"][0]


def test_one_look_shows_all_that_failed(tmp_path: Path, here: Here) -> None:
    ended = look(here, tmp_path, "policy.model=./nowhere", "queries.path=none.jsonl")
    assert ended.code == 2
    assert re.search(r"FAILED   queries .*none\.jsonl", ended.out)
    assert re.search(r"FAILED   template   There is no model folder '.*/nowhere'", ended.out)
    assert "skipped  disk, principles, budgets, sampling, steering, ranking, time" in ended.out
    assert "needs queries and a model that answers" in ended.out
    assert look(here, tmp_path, "policy.model=./nowhere").code == 3
    assert look(here, tmp_path, "training.bta=1").code == 2


def test_queries_that_the_judge_does_not_know(tmp_path: Path, here: Here) -> None:
    path = tmp_path / "q.jsonl"
    prompts = ("What is love?", "Why is love?")
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    ended = look(here, tmp_path, f"queries.path={path}")
    assert ended.code == 2
    assert "FAILED   judge" in ended.out
    assert "no verdict yet on 2 queries; no judge" in ended.out
    assert "Not counted: judge." in ended.out
    assert ended.out.splitlines()[-1] == "not ready: fix judge, then check again"


def test_a_judge_without_verdicts_is_not_called_no_judge(tmp_path: Path, here: Here) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"id": "q", "first": "A.", "second": "B.", "verdict": "first"}\n')
    found = checks(look(here, tmp_path, f"judge=human:{labels}", "--json"))["steering"]
    count = found["figures"]["triples"]
    assert found["figures"]["verdicts"]["unparseable"] == count
    assert "no verdict" in found["found"]
    assert f"{count} of {count} pairs are unparseable" in " ".join(found["todo"])


def test_evaluation_queries_that_are_not_held_out(tmp_path: Path, here: Here) -> None:
    same = "evaluation.queries.path=package:selfsteer.testbed/queries/align.jsonl"
    found = checks(look(here, tmp_path, same, "--json"))
    assert found["evaluation"]["figures"]["overlap"] == 32
    assert found["evaluation"]["status"] == "warning"


def test_a_disk_that_is_too_small(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three models of 1.06M parameters and two checkpoints need 38 MB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000_000))
    ended = look(here, tmp_path)
    assert ended.code == 3
    assert "FAILED   disk" in ended.out
    assert "the models alone need about 38" in ended.out
    assert "no verdict yet on 4 queries" in ended.out, "the rest is looked at all the same"


def test_a_run_folder_that_cannot_be_used(tmp_path: Path, here: Here) -> None:
    with RunFolder(tmp_path / "runs" / "smoke").locked():
        ended = look(here, tmp_path)
    assert ended.code == 3
    assert "FAILED   folder" in ended.out
    assert "is in use by process" in ended.out
    (tmp_path / "file").write_text("")
    ended = look(here, tmp_path, f"runs_dir={tmp_path / 'file'}")
    assert ended.code == 3
    assert "cannot be written" in ended.out


def test_a_finished_run(smoke: Path, here: Here) -> None:
    before, lines = artefacts(smoke), len(ledger(smoke))
    ended = here("check", smoke, "--queries", 4)
    assert ended.code == 0
    assert "14 of 14 stages done" in ended.out
    assert "about 0 s for 0 stages" in ended.out
    changed = here("check", smoke, "--queries", 4, "training.beta=0.3")
    assert changed.code == 2
    assert "FAILED   folder" in changed.out
    assert "--redo" in changed.out
    assert artefacts(smoke) == before
    assert len(ledger(smoke)) == lines
