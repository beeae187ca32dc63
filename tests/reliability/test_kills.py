"""Runs that are killed and resumed, anywhere and again and again, end like undisturbed ones."""

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"

METHODS = (
    *("sso", "pbaa", "sso-online", "contrast", "distil", "good-over-plain", "bad-to-plain", "dlma"),
    *("rlcd", "best-of-n", "best-of-n-principles", "pbaa-best-of-n", "sgpo", "spin"),
    *("spin-judged", "irft", "reward"),
)

VERBS = ("sweep", "train", "export", "export --model", "merge", "judge", "queries", "report")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("reliability", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reliability"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    module.load()
    yield module
    del sys.modules["reliability"]


def end_alike(bench: Any, method: str, folder: Path, kills: list[Any]) -> Any:
    """The outcome of a run that is killed at one of these points after the other."""
    calm, _ = bench.undisturbed(method, folder)
    outcome = bench.Outcome()
    bench.killed(method, folder, calm, kills, outcome)
    assert not outcome.failed, outcome.failed[0]
    assert not outcome.lost
    return outcome


def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(
    bench: Any, tmp_path: Path
) -> None:
    points = [("torn", 12), ("stop", 40), ("change", 60), ("torn", 3), ("change", 30)]
    outcome = end_alike(bench, "pbaa", tmp_path, [bench.Kill(*p) for p in points])
    assert sum(outcome.kills.values()) == len(points)


def test_a_command_that_is_killed_and_given_again_writes_what_an_undisturbed_one_does(
    bench: Any, tmp_path: Path
) -> None:
    points = [("torn", 2), ("change", 3), ("change", 5), ("torn", 7)]
    outcome = end_alike(bench, "queries", tmp_path, [bench.Kill(*p) for p in points])
    assert sum(outcome.kills.values()) == len(points)


def test_a_difference_and_a_failure_are_seen(bench: Any, tmp_path: Path) -> None:
    """The suite itself: it would tell a lost record, a step too many and a run that breaks."""
    run = tmp_path / "run"
    (run / "iteration-1").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"stage": "a", "step": 1, "seconds": 2.0}\n')
    (run / "iteration-1" / "a.jsonl").write_text("{}\n")
    calm = bench.state(run)
    (run / "metrics.jsonl").write_text('{"stage": "a", "step": 1, "seconds": 3.0}\n')
    assert not bench.differences(bench.state(run), calm)
    (run / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n' * 2)
    (run / "iteration-1" / "a.jsonl").write_text("{}\n{}\n")
    (run / "iteration-1" / "b.partial").write_text("")
    assert bench.differences(bench.state(run), calm) == [
        "iteration-1/a.jsonl",
        "iteration-1/b.partial",
        "metrics.jsonl",
    ]
    ended = bench.attempt(["run", "nothing-of-that-name"], tmp_path)
    assert ended.code == 2
    assert "nothing-of-that-name" in ended.said


def test_points_that_no_run_met_are_not_drawn_again(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def killed(method: str, folder: Path, calm: Any, kills: Any, outcome: Any) -> None:
        drawn.append(kills)
        outcome.runs += 1
        outcome.kills["time"] += len(drawn) - 1

    calm = bench.Ended(0, "", {"change": 99, "torn": 99})
    monkeypatch.setattr(bench, "undisturbed", lambda method, folder: ({}, calm))
    monkeypatch.setattr(bench, "killed", killed)
    assert len(list(bench.part_kills({}, ["pbaa"], 1, 3))) == 2
    assert drawn[0] != drawn[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_survives_kills(bench: Any, tmp_path: Path, method: str) -> None:
    calm, ended = bench.undisturbed(method, tmp_path)
    kills = bench.chain(random.Random(method), ended.counts, 3.0, 6)
    outcome = bench.Outcome()
    bench.killed(method, tmp_path, calm, kills, outcome)
    assert not outcome.failed, outcome.failed[0]
    assert not outcome.lost
    assert sum(outcome.kills.values()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_other_command_survives_kills(bench: Any, tmp_path: Path, verb: str) -> None:
    calm, ended = bench.undisturbed(verb, tmp_path)
    counts, kills = ended.counts, list[Any]()
    for share in (0.2, 0.5, 0.9):
        kills.append(bench.Kill("change", 1 + int(share * counts["change"])))
        if counts.get("torn"):
            kills.append(bench.Kill("torn", 1 + int(share * counts["torn"])))
    outcome = bench.Outcome()
    for kill in kills:
        bench.killed(verb, tmp_path, calm, [kill], outcome)
    assert not outcome.failed, outcome.failed[0]
    assert not outcome.lost
    assert sum(outcome.kills.values()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ranks", "server"])
def test_several_processes_survive_kills(bench: Any, tmp_path: Path, recipe: str) -> None:
    """All processes of a run, its command alone and another one alone; none is left over."""
    points = [(5, 0.0, "all"), (1, 0.5, "command"), (1, 0.2, "another")]
    kills = [bench.Kill("logged", *point) for point in points]
    outcome = end_alike(bench, recipe, tmp_path, kills)
    assert outcome.kills == {"all": 1, "command": 1, "another": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["change", "torn"])
def test_a_run_survives_a_kill_at_every_point(bench: Any, tmp_path: Path, kind: str) -> None:
    """Each point of a run in turn, and the points that follow when it is resumed."""
    calm, ended = bench.undisturbed("pbaa", tmp_path)
    outcome = bench.Outcome()
    for at in range(1, ended.counts[kind] + 1, 3):
        kills = [bench.Kill(kind, at + more) for more in range(3)]
        bench.killed("pbaa", tmp_path, calm, kills, outcome)
    assert not outcome.failed, outcome.failed[0]
    assert not outcome.lost
    assert outcome.kills[kind] > ended.counts[kind] * 0.8
