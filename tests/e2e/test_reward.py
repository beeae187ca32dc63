"""Reward models from preferences to a benchmark, through the real command line."""

import json
from pathlib import Path

import pytest

from selfsteer.data.digests import digest
from selfsteer.run.folder import logged
from tests.e2e.support import TESTBED, Here, accepted, fails, finished, spawn
from tests.make import tiny_pairs, write_pairs

#: Enough to learn the tiny world's faults, in seconds.
SETTINGS = (
    f"policy.model={TESTBED}",
    "policy.threads=1",
    "reward.learning_rate=3e-4",
    "reward.batch_size=16",
    "reward.holdout=0.2",
    "reward.max_length=512",
    "seed=3",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished reward run on a set of 300 pairs and half of another of 60, one line broken."""
    folder = tmp_path_factory.mktemp("reward")
    main = write_pairs(folder / "main.jsonl", tiny_pairs(300, 1))
    with open(main, "a") as file:
        file.write('{"prompt": "What?", "chosen": "Same.", "rejected": "Same."}\n')
    other = write_pairs(folder / "other.jsonl", tiny_pairs(60, 2, faults=1))
    data = f"[{main}, {{path: {other}, weight: 0.5, name: subtle}}]"
    ended = spawn("run", "reward", f"runs_dir={folder}", f"reward.data={data}", *SETTINGS)
    assert ended.returncode == 0, ended.stderr
    return folder / "reward"


def test_the_model_beats_chance_on_queries_it_has_not_seen(run: Path) -> None:
    report = json.loads((run / "reward.json").read_text())
    held_out = report["held_out"]
    assert held_out["pairs"] > 40
    assert held_out["accuracy"][1] > 0.5
    assert 0 <= held_out["calibration"]["ece"] <= 0.5
    assert sum(b["pairs"] for b in held_out["calibration"]["bins"]) == held_out["pairs"]
    assert sum(s["pairs"] for s in held_out["by_source"].values()) == held_out["pairs"]
    assert list(held_out["by_source"]) == ["main.jsonl", "subtle"]
    stage = finished(run)["train_reward"]
    assert stage["notes"]["logged"] == digest(logged(run / "metrics.jsonl")["train_reward"])
    assert stage["n_in"] == 361
    assert stage["dropped"]["equal"] == 1
    assert stage["dropped"]["held_out"] == held_out["pairs"]
    subtle = report["sources"]["subtle"]
    rest = 60 - subtle["dropped"]["held_out"]
    assert subtle["trained"] == round(rest / 2) == rest - subtle["dropped"]["left_by_weight"]
    assert stage["n_out"] == sum(s["trained"] for s in report["sources"].values())
    assert sorted(p.name for p in run.glob("reward*")) == ["reward", "reward.json"]


def test_the_run_is_finished_shown_and_guarded(run: Path, here: Here) -> None:
    again = here("run", run)
    assert again.code == 0
    assert "nothing to do" in again.err
    shown = here("show", run)
    assert "subtle" in shown.out
    assert "calibration error" in shown.out
    fails(here("run", run, "reward.epochs=2"), 2, "--redo")
    fails(here("check", run), 2, "method reward")
    fails(here("plan", run / "recipe.yaml"), 2, "method reward")
    as_json = json.loads(here("run", run, "--json").out)
    assert as_json["reward"] == json.loads((run / "reward.json").read_text())


def test_it_judges_and_ranks(run: Path, here: Here, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", tiny_pairs(40, 9))
    judged = here("judge", pairs, "--judge", f"reward:{run / 'reward'}", "--json")
    (judge,) = json.loads(judged.out)["judges"]
    assert judge["accuracy"] > 0.6


def test_rewardbench_reads_sections_and_writes_into_the_run(
    run: Path, here: Here, tmp_path: Path
) -> None:
    pairs = tiny_pairs(80, 9)
    file = tmp_path / "bench.jsonl"
    subsets = ("alpacaeval-easy", "ours")
    rows = [
        {
            "id": i,
            "subset": subsets[i % 2],
            "prompt": p.prompt[0].content,
            "chosen": p.chosen,
            "rejected": p.rejected,
        }
        for i, p in enumerate(pairs)
    ]
    rows.append({"prompt": "What?", "chosen": "A.", "rejected": None})
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ended = here("rewardbench", run / "reward", file, "--json")
    assert ended.code == 0, ended.err
    assert "dropped: " in ended.err
    report = json.loads(ended.out)
    assert report["rows_read"] == report["rows"] + sum(report["dropped"].values()) == 81
    assert report["accuracy"][1] > 0.5
    assert report["sections"]["Chat"]["score"] == report["score"]
    assert report["score"][0] == report["subsets"]["alpacaeval-easy"]["accuracy"][0]
    stored = run / "rewardbench" / "reward-bench.json"
    assert json.loads(stored.read_text()) == report
    assert "| ours |" in stored.with_suffix(".md").read_text()

    # the model that the reward model began as, taken as a policy
    out = tmp_path / "policy.json"
    ended = here("rewardbench", TESTBED, file, "--per-token", "--out", out)
    assert ended.code == 0, ended.err
    assert "RewardBench: package:" in ended.out
    # odd answers are rare in what it was trained on, so its likelihood alone knows them
    assert json.loads(out.read_text())["accuracy"][1] > 0.5
    same = here("rewardbench", TESTBED, file, "--ref", TESTBED, "--json")
    assert json.loads(same.out)["tied_scores"] == 80

    fails(here("rewardbench", run / "reward", file, "--ref", TESTBED), 2, "--ref has no effect")
    fails(here("rewardbench", TESTBED, file, "--beta", 0), 2, "above 0")
    fails(here("rewardbench", TESTBED, file, "--batch-size", 8), 2, "--batch-size has no effect")
    fails(here("rewardbench", TESTBED, file, "--out", tmp_path / "x.md"), 2, "ends in .json")
    fails(here("rewardbench", TESTBED, tmp_path / "none.jsonl"), 2, "none.jsonl")
    fails(here("rewardbench", "nowhere/at/all", file), 3, "no model folder")


def test_any_recipe_can_train_one_on_its_own_preferences(here: Here, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", tiny_pairs(8, 4))
    small = ("queries.limit=8", "training.batch_size=4", "training.selection.points=0")
    reward = ("reward.batch_size=4", "reward.forward_pairs=4", "reward.max_length=512")
    whole = ("method=pbaa", "generator=null", "baseline=null", "evaluation=null", *small, *reward)
    ended = here("run", "smoke", f"runs_dir={tmp_path}", f"reward.data={other}", *whole)
    assert ended.code == 0, ended.err
    run = tmp_path / "smoke"
    stages = finished(run)
    assert list(stages)[-1] == "train_reward"
    report = json.loads((run / "reward.json").read_text())
    assert report["sources"]["pbaa"]["read"] == stages["iteration-1/preferences"]["n_out"]
    assert report["sources"]["other.jsonl"]["read"] == 8
    assert (run / "reward" / "model.safetensors").exists()
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    mine = [x for x in lines if x["stage"] == "train_reward"]
    assert [x["step"] for x in mine] == list(range(1, len(mine) + 1))
    assert all(x.keys() >= {"loss", "accuracy", "margin", "grad_norm"} for x in mine)

    # a run folder is data for another reward model, and what it holds is part of its fingerprint
    second = ("run", "reward", f"runs_dir={tmp_path}", f"reward.data={run}", *SETTINGS)
    assert here(*second, "--dry-run").out.split() == ["to", "do", "train_reward"]
    assert here(*second, "reward.batch_size=8").code == 0
    shard = next((run / "iteration-1" / "preferences").glob("shard-*.jsonl"))
    shard.write_text(shard.read_text().splitlines(keepends=True)[0])
    accepted(run)
    fails(here(*second, "reward.batch_size=8"), 2, "train_reward", "--redo")


def test_a_reward_run_has_a_report(run: Path, tmp_path: Path, here: Here) -> None:
    ended = here("report", run, "--out", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    held_out = json.loads((run / "reward.json").read_text())["held_out"]
    mean, low, high = held_out["accuracy"]
    said = f"ranks {mean:.3f} [{low:.3f}, {high:.3f}] of {held_out['pairs']:,} held-out pairs right"
    html = (tmp_path / "page.html").read_text()
    assert said in html
    assert "This report shows what is there" not in html  # it is finished
