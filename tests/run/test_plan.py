"""What the stages of a plan hand over and count, without a model at work."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.records import Query
from selfsteer.errors import ConfigError
from selfsteer.methods import load_recipe
from selfsteer.run import execute as pipeline
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.stages import measure


def test_what_is_dropped_of_the_evaluation_queries_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": p} for p in ("Why is it so?", "Why is it so?", "Who?", "Where is it then?")]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = (f"runs_dir={tmp_path}", f"evaluation.queries.path={tmp_path / 'e.jsonl'}")
    recipe = load_recipe("smoke", [*settings, "evaluation.queries.min_chars=5"])
    asked: list[str] = []

    def evaluate(queries: Sequence[Query], *others: Any) -> StageResult:
        asked.extend(q.text for q in queries)
        return StageResult(len(queries), len(queries))

    monkeypatch.setattr(measure, "evaluate", evaluate)
    run = RunFolder(recipe.folder)
    *_, stage = recipe.plan()
    run.path.mkdir()
    (run / "queries.jsonl").write_text('{"id": "a", "prompt": "What?"}\n')
    result = run.execute(stage)
    assert sorted(asked) == ["Where is it then?", "Why is it so?"]
    assert (result.n_in, result.n_out) == (4, 2)
    assert result.dropped == {"duplicate": 1, "too_short": 1}


def test_a_budget_is_held_against_the_context_of_the_model_that_has_it(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    """A writer answers with principles alone, and nobody where they are fixed."""
    writer = tmp_path / "writer"
    shutil.copytree(checkpoints["llama"], writer)
    config = json.loads((writer / "config.json").read_text())
    (writer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}))
    given = (f"principles.writer={writer}", "principles.max_new_tokens=64")
    pipeline.check_models(load_recipe("smoke", [*given, "sampling.max_new_tokens=128"]))
    with pytest.raises(ConfigError, match=r"principles\.max_new_tokens 96 .*writer has a context"):
        pipeline.check_models(load_recipe("smoke", [*given, "principles.max_new_tokens=96"]))
    fixed = "principles={mode: fixed, good: Be kind., bad: Be rude.}"
    recipe = load_recipe("smoke", [fixed, f"policy.model={writer}", "sampling.max_new_tokens=48"])
    pipeline.check_models(recipe)  # the default of 256 tokens for principles does not matter


def test_evaluation_queries_are_known_by_their_content(tmp_path: Path) -> None:
    def fingerprint(name: str, *more: str) -> str:
        (tmp_path / name).write_text('{"prompt": "Why is it so?"}\n')
        given = f"evaluation.queries.path={tmp_path / name}"
        recipe = load_recipe("smoke", [f"runs_dir={tmp_path}", given, *more])
        return recipe.plan()[-1].fingerprint

    here = fingerprint("a.jsonl")
    assert fingerprint("b.jsonl") == here
    assert fingerprint("a.jsonl", "evaluation.queries.min_chars=5") != here


def test_a_judge_of_other_settings_does_not_grow_the_queries_again(tmp_path: Path) -> None:
    def fingerprint(judge: str) -> str:
        grown = "queries.augment={to: 100}"
        recipe = load_recipe("smoke", [f"runs_dir={tmp_path}", grown, f"judge={judge}"])
        stages = {s.name: s for s in recipe.plan()}
        return stages["augment"].fingerprint

    chat = "{kind: chat, model: 'package:selfsteer.testbed/checkpoint', batch_size: 4}"
    assert fingerprint(chat) == fingerprint(chat.replace("4", "8"))
    assert fingerprint(chat) != fingerprint("oracle")
