"""Checkpoint selection through the command line: data enough to hold a tenth of it out."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import TINY, Here, finished, process

#: Principles without a model; a few pairs fall to hygiene, and 16 are held out of over 160.
ARGS = (
    *TINY,
    "queries.limit=168",
    "principles={mode: picked, features: random}",
    "sampling.shard_size=84",
    "generator.batch_size=16",
    "generator.selection.points=1",
    "training.batch_size=16",
    "evaluation=null",
    "baseline=null",
)


def figures(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    for candidate in report["candidates"]:
        assert candidate.pop("seconds") > 0
    return report


@pytest.mark.slow
def test_a_policy_killed_between_candidates_is_chosen_alike(tmp_path: Path, here: Here) -> None:
    pbaa = [a for a in ARGS if not a.startswith("generator")]
    args = ("run", "smoke", f"runs_dir={tmp_path}", "method=pbaa", "generator=null", *pbaa)
    assert here(*args, "name=a", "--until", "preferences").code == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    ended = here(*args, "name=a", "--until", "policy")
    assert ended.code == 0, ended.err
    with process(*args, "name=b", "--until", "policy") as running:
        work = tmp_path / "b" / "iteration-1" / "policy.partial"
        for _ in range(2400):
            if list(work.glob("kept-*")):
                break
            time.sleep(0.05)
        else:
            pytest.fail("no candidate was measured")
        running.kill()
    assert "iteration-1/policy" not in finished(tmp_path / "b")
    assert here(*args, "name=b", "--until", "policy").code == 0
    first, second = (tmp_path / n / "iteration-1" for n in "ab")
    report = figures(first / "policy.selection.json")
    assert figures(second / "policy.selection.json") == report
    weights = "policy/model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    assert report["wins"] == "win rate"
    assert [len(c["wins"]) for c in report["candidates"]] == [0, 16, 16, 16, 16]
    assert f"step {report['chosen']} of 10 kept (win rate" in ended.err
    # the judge decides, so another one would make another policy
    more = ("name=a", "judge=null", "--until", "policy", "--dry-run", "--json")
    states = json.loads(here(*args, *more).out)
    assert states["iteration-1/policy"] == "conflict"
    assert states["iteration-1/preferences"] == "done"


@pytest.mark.slow
def test_a_generator_is_chosen_and_the_choice_is_shown(tmp_path: Path, here: Here) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=g", *ARGS, "--until", "generator")
    assert here(*args).code == 0
    report = figures(tmp_path / "g" / "iteration-1" / "generator.selection.json")
    assert [c["step"] for c in report["candidates"]] == [0, 10]
    assert report["wins"] == "accuracy"
    assert report["chosen"] == 10
    assert len(report["held_out"]) == 16
    entry = finished(tmp_path / "g")["iteration-1/generator"]
    assert entry["dropped"]["held_out"] == 16
    assert entry["notes"]["selection"]["chosen"] == 10
    assert 0 < entry["notes"]["selection"]["share"] < 1
    shown = here("show", tmp_path / "g").out
    assert "iteration-1/generator: step 10 of 10 kept (accuracy" in shown


def test_too_few_queries_are_trained_on_whole_and_it_is_said(smoke: Path, here: Here) -> None:
    entry = finished(smoke)["iteration-1/policy"]
    assert "held_out" not in entry["dropped"]
    assert "selection" not in entry["notes"]
    assert not (smoke / "iteration-1" / "policy.selection.json").exists()
