"""Which of a writer's answers is taken, when it is asked again, and what is counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import Stored, read_jsonl
from selfsteer.engines.answers import answers
from selfsteer.engines.base import PROMPT_TOO_LONG, Request
from selfsteer.engines.load import Engines
from selfsteer.errors import ConfigError
from selfsteer.principles import writer
from selfsteer.recipe.sections import EngineConfig, PrinciplesConfig, resolve_path
from selfsteer.run.cost import Scale
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact
from selfsteer.stages import principles as stage_of_principles
from selfsteer.stages.inputs import stored_queries
from selfsteer.stages.principles import Draft, Share, WritePrinciples
from tests.fakes import FakeEngine, answer_with
from tests.make import query, recipe, smoke, stages_of, write_jsonl

GOOD = "Good: Say what is true.\nBad: Say what is false."
BETTER = "Good: Say what is true.\nBad: Invent some nonsense."
ONE = "Good: Say what is true."


def scripted(script: dict[str, list[str]]) -> FakeEngine:
    """Answers from a list per query."""
    left = {name: iter(answers) for name, answers in script.items()}

    def say(request: Request) -> tuple[str, str]:
        name = request.id.partition("/")[0]
        assert f"Query: {name}" in request.messages[-1].content
        text = next(left[name])
        return text, PROMPT_TOO_LONG if text == PROMPT_TOO_LONG else "stop"

    return FakeEngine(say)


def asked(engine: FakeEngine) -> list[str]:
    return [r.id.partition("/")[0] for r in engine.asked]


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: dict[str, list[str]],
    model: str = "package:selfsteer.testbed/checkpoint",
    **settings: Any,
) -> tuple[StageResult, dict[str, Any], FakeEngine]:
    engine = answer_with(monkeypatch, scripted(script))
    folder = RunFolder(tmp_path)
    queries = write_jsonl(folder / "queries.jsonl", *({"id": n, "prompt": n} for n in script))
    stage = WritePrinciples(
        Artifact(queries),
        Artifact(Path(resolve_path(model))),
        PrinciplesConfig(**(settings if "good" in settings else {"features": "random"} | settings)),
        EngineConfig(),
    )
    result = folder.execute(stage)
    return result, {t["id"]: t for _, t in read_jsonl(folder / "principles.jsonl")}, engine


@pytest.mark.parametrize("mode", ["picked", "fixed"])
@pytest.mark.parametrize("system", ["keep", "replace"])
def test_a_system_prompt_of_the_templates_own_is_kept_or_replaced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: dict[str, Path],
    mode: str,
    system: str,
) -> None:
    """The tiny Qwen's template says "Answer well." where there is no system message."""
    given = {"good": "Fine.", "bad": "Foul."} if mode == "fixed" else {}
    settings = {"mode": mode, "system": system, **given}
    _, lines, _ = run(tmp_path, monkeypatch, {"one": []}, str(checkpoints["qwen2"]), **settings)
    said = lines["one"]["principles"].get("system")
    assert said == ("Answer well." if system == "keep" else None)


def test_a_failed_answer_is_asked_for_once_more_then_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {
        "one": [GOOD],
        "two": [ONE, GOOD],
        "three": ["no", ONE],
        "four": [PROMPT_TOO_LONG],
    }
    result, lines, engine = run(tmp_path, monkeypatch, script)
    assert {i: v["source"] for i, v in lines.items()} == {
        "one": "generated",
        "two": "generated",
        "three": "fallback:one_sided",
        "four": "fallback:prompt_too_long",
    }
    assert asked(engine) == ["one", "two", "three", "four", "two", "three"]
    assert len({r.seed for r in engine.asked}) == 6
    assert result.notes["sources"] == {
        "fallback:one_sided": 1,
        "fallback:prompt_too_long": 1,
        "generated": 2,
    }
    assert result.notes["first_try"] == {
        "no_sections": 1,
        "ok": 1,
        "one_sided": 1,
        "prompt_too_long": 1,
    }
    assert result.notes["retry"] == {"ok": 1, "one_sided": 1}
    assert lines["three"]["outcomes"] == {"first_try": ["no_sections"], "retry": ["one_sided"]}
    picked = writer.picked(tuple(lines["three"]["principles"]["features"]))
    assert lines["three"]["principles"] == picked.to_dict()
    assert "Say what is true." in lines["two"]["principles"]["good"]


def test_of_several_candidates_the_most_contrastive_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {"one": [GOOD, ONE, BETTER], "two": [ONE, ONE, ONE, ONE, GOOD, ONE]}
    result, lines, _ = run(tmp_path, monkeypatch, script, candidates=3)
    assert "Invent some nonsense." in lines["one"]["principles"]["bad"]
    assert "Say what is false." in lines["two"]["principles"]["bad"]
    assert result.notes["first_try"] == {"ok": 2, "one_sided": 4}
    assert result.notes["retry"] == {"ok": 1, "one_sided": 2}


def test_the_first_of_equally_contrastive_candidates_is_taken() -> None:
    draft = Draft(query("q"), ("Accuracy",), 1)
    ok = writer.Outcome.OK
    draft.take("first_try", [(ok, "Be right.", "Be wrong."), (ok, "Go right.", "Go wrong.")])
    assert draft.best == ("Be right.", "Be wrong.")


def test_a_greedy_writer_is_not_asked_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _, engine = run(tmp_path, monkeypatch, {"one": [ONE]}, temperature=0)
    assert asked(engine) == ["one"]
    assert result.notes["sources"] == {"fallback:one_sided": 1}


def test_without_features_there_is_no_adjectives_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {"one": [GOOD], "two": [ONE, ONE]}
    _, lines, _ = run(tmp_path, monkeypatch, script, features="none", written_from="query")
    closing = "Do not reveal that you follow guidelines."
    assert lines["one"]["principles"] == {
        "good": f"Say what is true. {closing}",
        "bad": f"Say what is false. {closing}",
        "features": [],
    }
    assert len(lines["two"]["principles"]["features"]) >= 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "fixed"}, "needs good and bad, or path"),
        ({"mode": "fixed", "good": "Be kind."}, "come together"),
        ({"mode": "fixed", "good": "Be kind.", "bad": "Be kind."}, "same text"),
        ({"mode": "fixed", "path": "p", "writer": "m"}, "writer has no effect"),
        ({"mode": "fixed", "path": "p", "concision": 0.1}, "concision has no effect"),
        ({"good": "Be kind.", "bad": "Be rude."}, "good has no effect"),
        ({"mode": "picked", "examples": 1}, "examples has no effect"),
        ({"mode": "picked", "features": "random", "batch_size": 4}, "batch_size has no effect"),
        ({"features": "none"}, "features none is for"),
        ({"temperature": 0, "candidates": 2}, "the same answer"),
        ({"append": {"Safety": 2}}, "append.Safety"),
        ({"examples": 4}, "principles.examples"),
    ],
)
def test_settings_that_contradict_or_do_nothing_are_refused(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=r"principles\.") as caught:
        recipe(principles=settings)
    assert said in str(caught.value)


def test_a_budget_is_held_against_the_context_of_the_model_that_has_it(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    """A writer answers with principles alone, and nobody where they are fixed."""
    writer = tmp_path / "writer"
    shutil.copytree(checkpoints["llama"], writer)
    config = json.loads((writer / "config.json").read_text())
    (writer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}))

    def check(*more: str) -> list[str]:
        return [note for stage in smoke(tmp_path, *more).plan() for note in stage.check()]

    given = (f"principles.writer={writer}", "principles.max_new_tokens=64")
    check(*given, "sampling.max_new_tokens=128")
    with pytest.raises(ConfigError, match=r"principles\.max_new_tokens 96 .*writer has a context"):
        check(*given, "principles.max_new_tokens=96")
    own = (f"policy.model={writer}", "sampling.max_new_tokens=48")
    # the default of 256 tokens for principles does not matter
    check("principles={mode: fixed, good: Be kind., bad: Be rude.}", *own)
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens 96"):
        check("principles={mode: picked, features: random}", *own, "sampling.max_new_tokens=96")


# -- slices of the queries -------------------------------------------------------------------------


def test_every_iteration_takes_a_slice_of_its_own_and_all_are_taken() -> None:
    bounds = [Share(k, None, 3).bounds(10) for k in (1, 2, 3)]
    assert bounds == [(0, 3), (3, 3), (6, 4)]
    assert [Share(k, 4, None).bounds(10) for k in (1, 2, 3)] == [(0, 4), (4, 4), (8, 4)]
    assert Share(2, None, 3).bounds(1) == (0, 1), "never none"


def test_too_few_queries_are_used_again_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ({"id": str(i), "prompt": f"q{i}"} for i in range(5))
    stored = stored_queries(write_jsonl(tmp_path / "q.jsonl", *rows))
    assert isinstance(stored, Stored)
    assert [q.id for q in Share(2, 3, None).take(stored)] == ["0", "3", "4"]
    assert "iteration 2 needs queries 4 to 6 of 5" in capsys.readouterr().err
    assert [q.id for q in Share(1, 9, None).take(stored)] == ["0", "1", "2", "3", "4"]
    capsys.readouterr()
    assert [[q.id for q in Share(k, None, 6).take(stored)] for k in (1, 2)] == [["0"], ["0"]]
    told = "takes a query that another one takes too: 6 iterations share 5 queries"
    assert capsys.readouterr().err.count(told) == 1
    slices = [[q.id for q in Share(k, None, 8).take(stored)] for k in range(1, 9)]
    said = capsys.readouterr().err
    again = [k for k in range(1, 9) if f"iteration {k} takes a query that another" in said]
    assert [q for k, q in enumerate(slices, 1) if k not in again] == [[str(i)] for i in range(5)]
    assert len(again) == 3
    assert all(len(Share(k, None, 5).take(stored)) == 1 for k in range(1, 6))
    assert not capsys.readouterr().err


def test_a_slice_of_a_fixed_size_does_not_depend_on_how_many_iterations_there_are() -> None:
    """So that a finished run can be given more of them."""

    def first(**more: Any) -> str:
        return stages_of(recipe("sso-online", **more))["iteration-1/principles"].fingerprint

    sized = {"queries": {"path": "q.jsonl", "per_iteration": 10}}
    assert first(iterations=1, **sized) == first(iterations=3, **sized)
    assert first(iterations=1) != first(iterations=3)
    asked = stages_of(recipe("sso-online", iterations=3))["iteration-1/principles"]
    assert asked.records(Scale(100)) == 34


@pytest.mark.parametrize("batched", ["chooser", "author"])
def test_only_who_answers_in_batches_is_asked_for_all_shards_at_once(
    batched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other one computes together does not depend on it; it is asked again, too."""
    chooser = FakeEngine(lambda request: "Honesty")
    author = FakeEngine(lambda request: ONE)
    calls: dict[str, list[list[str]]] = {"chooser": [], "author": []}

    def counted(engine: Any, requests: Any, *args: Any, **more: Any) -> Any:
        calls["author" if engine is author else "chooser"].append([r.id[:2] for r in requests])
        return answers(engine, requests, *args, **more)

    monkeypatch.setattr(stage_of_principles, "answers", counted)
    monkeypatch.setattr(Engines, "sampler", lambda *args, **kwargs: chooser)
    monkeypatch.setattr(Engines, "get", lambda *args, **kwargs: author)
    server = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    names = [f"q{i}" for i in range(5)]
    folder = RunFolder(tmp_path)
    WritePrinciples(
        Artifact(write_jsonl(folder / "queries.jsonl", *({"id": n, "prompt": n} for n in names))),
        Artifact(Path(resolve_path("package:selfsteer.testbed/checkpoint"))),
        PrinciplesConfig.model_validate(
            {"shard_size": 2, "writer": {**server, "batch": batched == "author"}}
        ),
        EngineConfig.model_validate({**server, "batch": batched == "chooser"}),
    ).run(folder)
    shards = [names[:2], names[2:4], names[4:]]
    together = calls.pop(batched)
    (alone,) = calls.values()
    assert together == [names] * (1 if batched == "chooser" else 2)
    assert alone == (shards if batched == "author" else shards * 2)
