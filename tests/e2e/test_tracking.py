"""What trackers are told: the curves of each training and the figures of each stage."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfsteer.run.folder import RunFolder
from selfsteer.run.tracking import Tracker, flat, stage_figures
from tests.e2e.support import TINY, Here, fails, finished

PBAA = ("method=pbaa", "baseline=null", "generator=null")
#: TINY without what PBAA has no use for.
SMALL = tuple(x for x in TINY if not x.startswith("generator"))


def test_tensorboard_gets_curves_and_stages_of_one_run(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    ended = here(
        *("run", "smoke", f"runs_dir={tmp_path}", "name=told", "tracking=[tensorboard]"),
        *PBAA,
        *SMALL,
    )
    assert ended.code == 0, ended.err
    run = tmp_path / "told"
    (folder,) = {p.parent for p in run.rglob("events.out.*")}
    assert folder == run / "tracking"
    told = EventAccumulator(str(folder)).Reload()
    logged = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    curve = told.Scalars("train/iteration-1/policy/loss")
    assert [(e.step, pytest.approx(e.value)) for e in curve] == [
        (v["step"], v["loss"]) for v in logged
    ]
    quality = json.loads((run / "iteration-1/quality.json").read_text())
    (accuracy,) = told.Scalars("train/iteration-1/quality/preferences/accuracy")
    assert accuracy.value == pytest.approx(quality["preferences"]["accuracy"])
    (out,) = told.Scalars("train/iteration-1/samples/n_out")
    assert out.value == finished(run)["iteration-1/samples"]["n_out"]
    (rate,) = told.Scalars("train/evaluation/models/pbaa/iteration-1/win_rate")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert rate.value == pytest.approx(evaluation["models"]["pbaa/iteration-1"]["win_rate"][0])


def test_the_settings_that_trackers_show_are_the_recipes(tmp_path: Path) -> None:
    recipe = {"seed": 3, "training": {"learning_rate": 2e-4, "lora": None}, "tracking": ["x"]}
    (tmp_path / "resolved.json").write_text(json.dumps(recipe))
    with closing(Tracker(("tensorboard",), tmp_path)) as tracker:
        assert tracker._args.to_dict() == {
            "seed": 3,
            "training.learning_rate": 2e-4,
            "training.lora": None,
            "tracking": '["x"]',
        }


def test_a_tracker_that_is_not_there_is_named_before_anything_runs(
    tmp_path: Path, here: Here
) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=n", "tracking=[mlflow]")
    fails(here(*args), 2, "mlflow", "pip install")
    assert not (tmp_path / "n/ledger.jsonl").exists()
    fails(here("run", "smoke", f"runs_dir={tmp_path}", "tracking=[wandbx]"), 2, "wandb")


def test_a_tracker_of_the_first_rank_does_not_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)

    def joined(*args: Any, **more: Any) -> None:
        raise AssertionError("it made a process group")

    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    Tracker(("tensorboard",), tmp_path).close()
    assert {name: os.environ[name] for name in world} == world


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.integrations import TensorBoardCallback

    told: list[dict[str, float]] = []

    def unreachable(self: Any, args: Any, state: Any, control: Any, logs: Any) -> None:
        told.append(logs)
        raise ConnectionError("nobody answers")

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(TensorBoardCallback, "on_log", unreachable)
    run = RunFolder(tmp_path)
    with closing(Tracker(("tensorboard",), run.path)) as tracker:
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == f"{tmp_path}/tracking"
        run.watch = tracker.note
        for step in (1, 2):
            run.append("metrics.jsonl", {"stage": "s", "step": step, "loss": 0.5})
    assert told == [{"s/loss": 0.5}]
    assert "TensorBoard gets no more figures" in capsys.readouterr().err
    # the next run of this process has a folder of its own
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_benchmarks_and_reward_models_are_told_by_what_their_stages_wrote(tmp_path: Path) -> None:
    report = {"limit": None, "benchmarks": [{"name": "quiz", "models": {"sso": {"score": 0.75}}}]}
    (tmp_path / "benchmarks.json").write_text(json.dumps(report))
    (tmp_path / "reward.json").write_text('{"held_out": {"accuracy": 0.5}}')
    counts = {"n_in": 1, "n_out": 1, "dropped": {}, "seconds": 2.0, "notes": {}}
    told: dict[str, float] = {}
    for stage, outputs in (
        ("benchmarks", ["benchmarks.json", "benchmarks.md"]),
        ("train_reward", ["reward", "reward.json"]),
    ):
        entry = {**counts, "stage": stage, "outputs": outputs}
        told |= dict(flat(stage_figures(tmp_path, entry)))
    assert told["benchmarks/quiz/models/sso/score"] == 0.75
    assert told["held_out/accuracy"] == 0.5
