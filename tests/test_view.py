"""A run's typed view: unfinished, torn, superseded, and what is no run."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.digests import digest
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.methods import load_recipe
from selfsteer.recipe.read import load_values, merge, recipe_names
from selfsteer.view import RunView
from tests.make import entry, write_jsonl

FIGURES = {
    "of": 4,
    "pairs": 4,
    "accuracy": 0.75,
    "verdicts": {"first": 3, "second": 1},
    "on_policyness": {"both": 0.5, "chosen": 0.6, "rejected": 0.4},
    "logps": {"chosen": -3.0, "rejected": -4.0},
    "steering_gap": None,
    "tokens": {"chosen": 5.0, "rejected": 6.0},
}

#: What of the recipe sso a run must be given.
GIVEN = ("policy.model=nobody/nothing", "queries.path=prompts.jsonl", "name=made")

KINDS = {"queries": "ReadQueries", "triples": "Sample", "policy": "Train", "evaluation": "Evaluate"}


def line(event: str, stage: str, **more: Any) -> str:
    return json.dumps(entry(event, stage, KINDS[stage.rpartition("/")[2]], **more)) + "\n"


def finish(stage: str, **more: Any) -> str:
    return line("finish", stage, **more)


def make(folder: Path, ledger: str, *settings: str) -> Path:
    recipe = load_recipe("sso", [*GIVEN, *settings])
    (folder / "iteration-1").mkdir()
    (folder / "resolved.json").write_text(recipe.model_dump_json())
    (folder / "ledger.jsonl").write_text(ledger)
    return folder


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_is_the_recipe(tmp_path: Path, name: str) -> None:
    """Also where a default would be refused if somebody had set it."""
    data = {"reward": ["reward.data=y.jsonl"]}.get(name, ["queries.path=x.jsonl", "judge=oracle"])
    data += ["ranking.judge=oracle"] if name == "best-of-n" else []
    recipe = load_recipe(name, ["policy.model=a/b", "name=n", *data])
    (tmp_path / "resolved.json").write_text(recipe.model_dump_json())
    assert RunView.open(str(tmp_path)).recipe == recipe


def test_the_newest_entry_of_a_stage_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    ledger = line("begin", "queries", time=1.0, versions={"torch": "2"})
    ledger += finish("queries", time=2.0)
    ledger += line("begin", "iteration-1/triples", time=3.0)
    run = RunView.open(make(tmp_path, ledger + '{"event": "finish", "stage": "iter'))
    queries, triples = run.stages
    assert (queries.done, queries.began, queries.time, queries.n_in) == (True, 1.0, 2.0, 4)
    assert queries.versions == {"torch": "2"}
    assert (triples.done, triples.n_in, triples.method, triples.round) == (False, 0, "sso", 1)
    assert run.rounds[0].stages == (triples,)
    assert run.seconds_of("sso") is None
    assert not run.finished
    assert run.state == "stopped"


def test_what_was_superseded_is_gone_until_it_is_made_again(tmp_path: Path) -> None:
    ledger = finish("queries") + finish("iteration-1/policy") + line("superseded", "queries")
    run = RunView.open(make(tmp_path, ledger))
    assert [s.name for s in run.stages] == ["iteration-1/policy"]
    (tmp_path / "ledger.jsonl").write_text(ledger + finish("queries", n_in=9))
    again = RunView.open(tmp_path)
    assert {s.name: s.n_in for s in again.stages} == {"iteration-1/policy": 4, "queries": 9}


def test_a_run_is_finished_when_all_that_was_asked_for_is(tmp_path: Path) -> None:
    run = make(tmp_path, "", "evaluation.queries.path=held-out.jsonl")
    *names, last = [stage.name for stage in RunView.open(run).recipe.plan()]
    assert last == "evaluation"
    ledger = "".join(json.dumps(entry("finish", name, "Sample")) + "\n" for name in names)
    (run / "ledger.jsonl").write_text(ledger)
    assert not RunView.open(run).finished
    (run / "ledger.jsonl").write_text(ledger + finish("evaluation", seconds=100.0))
    assert RunView.open(run).finished
    # the evaluation is not the method's
    assert RunView.open(run).seconds_of("sso") == 2.0 * len(names)


def test_a_training_whose_log_was_removed_is_shown_without_a_curve(tmp_path: Path) -> None:
    """Also after the next one has begun a new log; other lines of its own are damage."""
    policies = [f"iteration-{k}/policy" for k in (1, 2)]
    logs = [[{"stage": name, "step": 1, "loss": 0.5}] for name in policies]
    ledger = "".join(
        finish(name, time=float(k), notes={"logged": digest(logs[k])})
        for k, name in enumerate(policies)
    )
    run, path = make(tmp_path, ledger), tmp_path / "metrics.jsonl"
    write_jsonl(path, *logs[1])
    assert RunView.open(run).curves == {policies[1]: logs[1]}
    write_jsonl(path, *logs[0])
    with pytest.raises(ArtifactError, match="iteration-2/policy logged other lines"):
        _ = RunView.open(run).curves
    path.write_text("null")
    with pytest.raises(ArtifactError, match="iteration-1/policy logged other lines"):
        _ = RunView.open(run).curves
    write_jsonl(path, {**logs[0][0], "loss": 0.25}, *logs[1])
    with pytest.raises(ArtifactError, match="iteration-1/policy logged other lines"):
        _ = RunView.open(run).curves


def test_a_deleted_file_is_named_unless_all_of_its_stage_was_deleted(tmp_path: Path) -> None:
    sums = {"evaluation.json": [2, ""], "evaluation/answers-base.jsonl": [1, ""]}
    outputs = ["evaluation.json", "evaluation", "evaluation.dropped.jsonl"]
    run = make(tmp_path, finish("evaluation", outputs=outputs, sums=sums))
    write_jsonl(run / "evaluation.dropped.jsonl")
    assert RunView.open(run).evaluation is None
    answers = write_jsonl(run / "evaluation" / "answers-base.jsonl")
    answers.write_text("\n")
    with pytest.raises(ArtifactError, match=r"evaluation\.json is missing.*--redo"):
        _ = RunView.open(run).evaluation
    answers.unlink()
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"answers-base\.jsonl is missing"):
        RunView.open(run).answers("base")


def test_of_a_recipe_of_another_version_the_changed_defaults_are_named(tmp_path: Path) -> None:
    """Not the settings that they would stand in the way of: nobody has set those."""
    make(tmp_path, "", "judge=oracle", "training.beta=0.3")
    given = merge(load_values("sso"), [*GIVEN, "judge=oracle", "training.beta=0.3"])
    (tmp_path / "recipe.yaml").write_text(json.dumps(given))
    resolved = tmp_path / "resolved.json"
    values = json.loads(resolved.read_text())
    for key, was, said in (
        ("launch_timeout", 600.0, "is 600.0 there, 900.0 here"),
        ("gone", 1, "is 1 there, and unknown here"),
    ):
        engine = {**values["judge"]["engine"], key: was}
        resolved.write_text(json.dumps({**values, "judge": {**values["judge"], "engine": engine}}))
        with pytest.raises(ArtifactError) as refused:
            RunView.open(tmp_path)
        assert f"of this one: judge.engine.{key} {said}. Read" in str(refused.value)
    resolved.write_text(json.dumps({**values, "iterations": "many"}))
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(ArtifactError, match=r"iterations: .*damaged, or another version"):
        RunView.open(tmp_path)


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    run = make(tmp_path, '{"event": "begin", "stage": "queries", "fingerprint": "f"}\n')
    with pytest.raises(ArtifactError, match="another version"):
        RunView.open(run)


def test_figures_under_another_runs_policy_are_not_taken_for_a_rounds(tmp_path: Path) -> None:
    base = "/elsewhere/runs/old/iteration-1/policy"
    make(tmp_path, finish("queries"), "iterations=2", f"policy.model={base}")
    (tmp_path / "iteration-2").mkdir()
    models = {"b": base, "a": f"{tmp_path}/iteration-1/policy"}
    for name, model in models.items():
        write_jsonl(tmp_path / "scores" / name / "model.json", {"model": model})
    first, second = RunView.open(tmp_path).rounds
    found = [r.scores and r.scores.name for r in (first, second)]
    assert found == ["b", "a"]
    # of a run that was moved, the place of its own models has changed
    moved = {"model": "runs/made/iteration-1/policy"}
    write_jsonl(tmp_path / "scores" / "a" / "model.json", moved)
    assert [r.scores and r.scores.name for r in (first, second)] == ["b", "a"]


def test_quality_is_of_its_round(tmp_path: Path) -> None:
    run = RunView.open(make(tmp_path, "", "iterations=2"))
    (tmp_path / "iteration-2").mkdir()
    (tmp_path / "iteration-2/quality.json").write_text(
        json.dumps({"judge": "oracle", "preferences": FIGURES, "scored_under": "x"})
    )
    first, second = run.rounds
    assert first.quality is None
    assert second.quality is not None
    assert second.quality.preferences.tokens == {"chosen": 5.0, "rejected": 6.0}
    assert [(r.k, kind) for r, kind, _ in run.measured] == [(2, "preferences")]
    (tmp_path / "iteration-1/quality.json").write_text('{"judge": 1}')
    with pytest.raises(ArtifactError, match=r"quality\.json is damaged"):
        _ = RunView.open(tmp_path).rounds[0].quality


def test_a_round_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = RunView.open(make(tmp_path, ""))
    assert run.round().k == 1
    with pytest.raises(ArtifactError, match="iteration-3 is not there"):
        run.round(3)
    with pytest.raises(ConfigError, match="no baseline"):
        run.round(baseline=True)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a run folder"):
        RunView.open(tmp_path)
    (tmp_path / "resolved.json").write_text('{"method"')
    with pytest.raises(ArtifactError, match=r"resolved\.json is damaged"):
        RunView.open(tmp_path)


def test_what_a_judge_asked_of_a_server_counts_as_well(tmp_path: Path) -> None:
    run = make(tmp_path, finish("queries"))
    for place, cost in (("usage", 1.5), ("judgements/abc/usage", 0.25)):
        path = run / place / "x.json"
        path.parent.mkdir(parents=True)
        counts = {"requests": 2, "retried": 0, "prompt_tokens": 9, "completion_tokens": 3}
        path.write_text(json.dumps({**counts, "failed": {}, "cost": cost}))
    view = RunView.open(run)
    assert (view.usage["requests"], view.cost) == (4, 1.75)
