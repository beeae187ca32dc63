"""Which of a writer's answers is taken, when it is asked again, and what is counted."""

from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.records import Message, Query
from selfsteer.engines.base import PROMPT_TOO_LONG, Request
from selfsteer.methods import recipe_of
from selfsteer.principles import writer
from selfsteer.run.folder import StageResult
from selfsteer.stages import principles as stage
from tests.fakes import FakeEngine

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
    **settings: Any,
) -> tuple[StageResult, dict[str, Any], FakeEngine]:
    engine = scripted(script)
    monkeypatch.setattr(stage, "_engines", lambda *args: (None, engine))
    values = {
        "name": "n",
        "policy": {"model": "m"},
        "queries": {"path": "q"},
        "principles": {"features": "random", **settings},
    }
    recipe = recipe_of(values, "recipe")
    queries = [Query(name, (Message("user", name),)) for name in script]
    result = stage.write_principles(queries, recipe, "m", tmp_path, "iteration-1/principles")
    lines = {t["id"]: t for _, t in stage_lines(tmp_path)}
    return result, lines, engine


def stage_lines(folder: Path) -> Any:
    from selfsteer.data.jsonl import read_jsonl

    return read_jsonl(folder / "principles.jsonl")


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
    draft = stage.Draft(Query("q", (Message("user", "q"),)), ("Accuracy",), 1)
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
        ({"mode": "fixed"}, "needs principles.good and principles.bad, or .path"),
        ({"mode": "fixed", "good": "Be kind."}, "come together"),
        ({"mode": "fixed", "good": "Be kind.", "bad": "Be kind."}, "same text"),
        ({"mode": "fixed", "path": "p", "writer": "m"}, "principles.writer has no effect"),
        ({"mode": "fixed", "path": "p", "concision": 0.1}, "principles.concision has no effect"),
        ({"good": "Be kind.", "bad": "Be rude."}, "principles.good has no effect"),
        ({"mode": "picked", "examples": 1}, "principles.examples has no effect"),
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
    values = {"name": "n", "policy": {"model": "m"}, "queries": {"path": "q"}}
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        recipe_of({**values, "principles": settings}, "recipe")
