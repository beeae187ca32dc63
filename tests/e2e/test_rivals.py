"""The rivals of docs/methods.md as whole runs, tiny."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.records import Query
from selfsteer.judges.base import Judgement, Pair
from selfsteer.judges.oracle import OracleJudge
from selfsteer.recipe.sections import JudgeConfig, resolve_path
from selfsteer.stages import oppose, rank
from tests.e2e.support import TINY, Here, fails, finished
from tests.fakes import say, serving

WISE = "The bee eats nectar, and it is never in a hurry about it."

PLAIN = ("baseline=null", "principles=null", "generator=null", "training.selection.points=0")
SMALL = tuple(s for s in TINY if not s.startswith(("principles.", "generator.")))


def run(here: Here, folder: Path, name: str, *more: str) -> Any:
    return here("run", "smoke", f"runs_dir={folder}", f"name={name}", *SMALL, *PLAIN, *more)


def quality(folder: Path) -> Any:
    return json.loads((folder / "iteration-1" / "quality.json").read_text())["preferences"]


def test_best_of_n_trains_on_what_the_judge_ranked(here: Here, tmp_path: Path) -> None:
    ended = run(here, tmp_path, "b", "method=best-of-n", "ranking.samples=3")
    assert ended.code == 0, ended.err
    folder = tmp_path / "b"
    assert list(finished(folder)) == [
        "queries",
        *(f"iteration-1/{s}" for s in ("ranked", "preferences", "quality", "policy")),
        "evaluation",
    ]
    found = quality(folder)
    # the oracle that measures is the oracle that ranked
    assert found["accuracy"] == 1.0
    assert found["steering_gap"] is None
    assert "best-of-n/iteration-1" in (folder / "evaluation.json").read_text()
    again = run(here, tmp_path, "b", "method=best-of-n", "ranking.samples=3")
    assert "nothing to do" in again.err
    fails(run(here, tmp_path, "b", "method=best-of-n", "ranking.samples=2"), 2, "ranked", "--redo")
    checked = here("check", folder)
    assert checked.code == 0
    assert "principles none" in checked.out
    exported = here("export", folder, "--format", "parquet", "--to", tmp_path / "set")
    assert exported.code == 0, exported.err
    assert "a judge ranked" in (tmp_path / "set" / "README.md").read_text()


class Comparing:
    """The oracle as the policy's own opinion, in pairs alone."""

    name = "the policy"

    def check(self, queries: Sequence[Query]) -> None: ...

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        return OracleJudge().compare_all(pairs)


def test_self_rewarding_asks_the_policy_of_each_iteration(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[JudgeConfig] = []

    def load(settings: JudgeConfig, folder: Path) -> Comparing:
        asked.append(settings)
        return Comparing()

    monkeypatch.setattr(rank, "load_judge", load)
    given = ("method=self-rewarding", "ranking.samples=3", "iterations=2", "evaluation=null")
    ended = run(here, tmp_path, "s", *given)
    assert ended.code == 0, ended.err
    assert [(j.kind, j.model) for j in asked] == [
        ("chat", resolve_path("package:selfsteer.testbed/checkpoint")),
        ("chat", str(tmp_path / "s" / "iteration-1" / "policy")),
    ]
    assert quality(tmp_path / "s")["accuracy"] == 1.0


def test_a_policy_that_cannot_judge_leaves_nothing_and_says_so(here: Here, tmp_path: Path) -> None:
    """The tiny model knows the tiny world, not what a verdict is."""
    given = ("method=self-rewarding", "ranking.samples=2", "queries.limit=4")
    fails(run(here, tmp_path, "s", *given), 3, "iteration-1/ranked has nothing left", "no_score")


def test_what_must_fail_does_so_before_anything_is_sampled(here: Here, tmp_path: Path) -> None:
    nobody = f"ranking.judge=reward:{tmp_path}/not/there"
    fails(run(here, tmp_path, "b", "method=best-of-n", nobody), 3, "no model folder")
    assert not (tmp_path / "b" / "ledger.jsonl").exists()
    fails(run(here, tmp_path, "s", "method=spin"), 2, "queries but no answers")
    assert not (tmp_path / "s" / "iteration-1").exists()
    fails(run(here, tmp_path, "s", "method=spin", "queries.augment.to=99"), 2, "augment", "remove")


def test_spin_sets_given_answers_against_the_policys_own(here: Here, tmp_path: Path) -> None:
    source = Path(resolve_path("package:selfsteer.testbed/queries/align.jsonl"))
    rows = [json.loads(line) for line in source.read_text().splitlines()[:16]]
    turns = [{"role": "user"}, {"role": "assistant", "content": "That is a fine question."}]
    lines = [{"messages": [{**turns[0], "content": row["prompt"]}, turns[1]]} for row in rows]
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = run(here, tmp_path, "s", "method=spin", f"queries.path={path}", "queries.limit=null")
    assert ended.code == 0, ended.err
    (shard, *_) = sorted((tmp_path / "s/iteration-1/preferences").glob("shard-*.jsonl"))
    record = json.loads(shard.read_text().splitlines()[0])
    assert record["chosen"][0]["content"] == "That is a fine question."
    assert record["rejected"][0]["content"] != record["chosen"][0]["content"]


def test_sgpo_asks_an_improver_for_a_better_answer(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-needed")
    unchanged: set[str] = set()
    with serving() as server:

        def revised(body: dict[str, Any]) -> str:
            if len(body["messages"]) == 1:  # the probe before anything is sampled
                return say(body)
            assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
            question, answer, request = (m["content"] for m in body["messages"])
            assert request == oppose.IMPROVE
            if len(question) % 4 == 0:
                unchanged.add(question)
                return str(answer)
            return f"Sure! Here's my improved answer:\n\n{WISE}"

        server.answer = revised
        improver = f"improver={{kind: openai, base_url: '{server.url}', model: canned}}"
        ended = run(here, tmp_path, "i", "method=sgpo", improver, "sampling.batch_size=8")
        assert ended.code == 0, ended.err
        again = run(here, tmp_path, "i", "method=sgpo", improver, "sampling.batch_size=8")
        assert "nothing to do" in again.err
    folder = tmp_path / "i"
    stages = finished(folder)
    assert list(stages)[1:4] == [f"iteration-1/{s}" for s in ("samples", "improved", "preferences")]
    dropped = stages["iteration-1/preferences"]["dropped"]
    pairs = [
        json.loads(line)
        for shard in sorted((folder / "iteration-1/preferences").glob("shard-*.jsonl"))
        for line in shard.read_text().splitlines()
    ]
    assert len(pairs) + dropped["good_equals_bad"] == stages["iteration-1/improved"]["n_out"]
    assert dropped["good_equals_bad"] == len(unchanged) > 0
    assert {p["chosen"][-1]["content"] for p in pairs} == {WISE}
    plain = {
        row["id"]: row["responses"]["plain"]
        for shard in (folder / "iteration-1/samples").glob("shard-*.jsonl")
        for row in map(json.loads, shard.read_text().splitlines())
    }
    assert all(p["rejected"][-1]["content"] == plain[p["id"]] for p in pairs)
    card = here("export", folder, "--format", "parquet", "--to", tmp_path / "set")
    assert card.code == 0, card.err
    assert "asked to write it again" in (tmp_path / "set" / "README.md").read_text()
    fails(run(here, tmp_path, "x", "method=spin", improver), 2, "a setting of sgpo")
    nobody = "improver={kind: openai, base_url: 'http://127.0.0.1:9/v1', model: canned}"
    fails(run(here, tmp_path, "n", "method=sgpo", nobody), 3, "127.0.0.1:9")
    assert not (tmp_path / "n" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_sgpo_without_an_improver_asks_the_policy_of_each_iteration(
    here: Here, tmp_path: Path
) -> None:
    given = ("method=sgpo", "iterations=2", "evaluation=null", "--until", "iteration-2/improved")
    ended = run(here, tmp_path, "p", *given)
    assert ended.code == 0, ended.err
    first, second = (finished(tmp_path / "p")[f"iteration-{k}/improved"] for k in (1, 2))
    assert first["n_in"] == 16
    assert first["n_out"] > 0
    assert second["fingerprint"] != first["fingerprint"]


def test_wpo_weighs_each_pair(here: Here, tmp_path: Path) -> None:
    given = (
        f"runs_dir={tmp_path}",
        "name=w",
        "method=pbaa",
        "baseline=null",
        "generator=null",
        "evaluation=null",
        *(s for s in TINY if not s.startswith(("generator.", "evaluation."))),
    )
    ended = here("run", "smoke", *given, "training.weighting=wpo")
    assert ended.code == 0, ended.err
    rows = [
        json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    ]
    weights = [row["weight/query"] for row in rows]
    assert all(0 < w < 2 for w in weights)
    assert len({round(w, 4) for w in weights}) > 1
