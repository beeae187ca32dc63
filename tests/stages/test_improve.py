"""The search as a stage: what is asked, what is kept, and what a killed search asks again."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsteer.engines.base import Request
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.base import Judge
from selfsteer.principles.improve import Rated
from selfsteer.recipe.sections import Improvement, JudgeConfig, Sampling, WriterConfig
from selfsteer.run.folder import RunFolder
from selfsteer.run.stage import Artifact
from selfsteer.stages import improve
from selfsteer.stages.improve import ImprovePrinciple
from tests.fakes import FakeEngine, FakeJudge, Said, ScoringFake, answer_with, longer
from tests.make import write_jsonl


@pytest.fixture(autouse=True)
def _likes_length(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, ScoringFake())


def judged_by(monkeypatch: pytest.MonkeyPatch, judge: Judge) -> None:
    monkeypatch.setattr(improve, "load_judge", lambda *given: judge)
    monkeypatch.setattr(improve, "kept_system", lambda *given: "You are Bee.")


def stage(run: RunFolder, count: int = 20, **settings: Any) -> ImprovePrinciple:
    rows = ({"id": f"q{i}", "prompt": f"Query {i}?"} for i in range(count))
    queries = Artifact(write_jsonl(run / "queries.jsonl", *rows))
    small = {"good": "Go.", "steps": 3, "queries_per_step": 2, "confirm": 4, "tries": 2, **settings}
    return ImprovePrinciple(
        queries,
        Artifact(Path("policy")),
        Improvement(**small),
        Sampling(),
        JudgeConfig(kind="oracle"),
    )


def rewriting(request: Request) -> bool:
    return "improved instruction" in request.messages[-1].content


def told(helps: bool = True) -> Callable[[Request], Said]:
    """An answer of as many letters as there are in the principle; a new one is longer, or cut."""

    def say(request: Request) -> Said:
        if rewriting(request):
            last = request.messages[-1].content.partition("\n\nA query")[0].rpartition(": ")[2]
            return (f"{last} Go {request.seed % 97}.", "stop" if request.seed % 3 else "length")
        letters = len(request.messages[0].content)
        return "y" * (letters if helps else max(200 - letters, 1))

    return say


def test_the_best_principle_is_written_as_a_section_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, run = answer_with(monkeypatch, FakeEngine(told())), RunFolder(tmp_path)
    result = run.execute(stage(run, bad="Stop."))
    notes = result.notes
    written = yaml.safe_load((run / "improved.yaml").read_text())
    assert written == {"principles": {"mode": "fixed", "good": notes["best"], "bad": "Stop."}}
    assert len(notes["path"]) == 3
    assert (notes["path"][0]["good"], notes["path"][-1]["good"]) == ("Go.", notes["best"])
    # the system prompt of the template stands before each principle
    assert notes["path"][0]["rating"] == len("You are Bee.\n\nGo.")
    gained = len(notes["best"]) - len("Go.")
    assert gained > 10
    assert notes["ratings"]["best"] - notes["ratings"]["start"] == gained
    assert notes["gain"][0] == gained
    asked = [r for r in engine.asked if not rewriting(r)]
    answered = {r.messages[-1].content for r in asked}
    assert result.n_in == len(answered) == 3 * 2 + 4
    assert len({r.id for r in asked}) == len(asked)
    # all principles meet a query with the same random numbers
    assert len({r.seed for r in asked}) == len(answered)
    assert notes["written"]["ok"] > 0
    assert notes["written"]["unfinished"] > 0
    assert sum(notes["written"].values()) == sum(map(rewriting, engine.asked))


def test_where_no_rewriting_helps_the_start_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, FakeEngine(told(helps=False)))
    run = RunFolder(tmp_path)
    notes = run.execute(stage(run)).notes
    assert yaml.safe_load((run / "improved.yaml").read_text())["principles"]["good"] == "Go."
    assert notes["ratings"]["best"] == notes["ratings"]["start"]


@pytest.mark.parametrize("dies_after", [1, 5, 12, 30])
def test_a_killed_search_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    undisturbed = answer_with(monkeypatch, FakeEngine(told()))
    result = stage(whole).run(whole)
    assert len(undisturbed.asked) > 31
    dying = FakeEngine(told())

    def dies(request: Request) -> Said:
        if len(dying.asked) > dies_after:
            raise KeyboardInterrupt
        return told()(request)

    dying.say = dies
    answer_with(monkeypatch, dying)
    with pytest.raises(KeyboardInterrupt):
        stage(cut).run(cut)
    again = answer_with(monkeypatch, FakeEngine(told()))
    assert stage(cut).run(cut) == result
    assert (cut / "improved.yaml").read_bytes() == (whole / "improved.yaml").read_bytes()
    assert len(dying.asked[:dies_after]) + len(again.asked) == len(undisturbed.asked)


def test_answers_without_a_rating_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(request: Request) -> Said:
        if request.messages[-1].content == "Query 3?":
            return "", "request_failed:timeout"
        return "Xnothing" if request.messages[-1].content == "Query 4?" else told()(request)

    answer_with(monkeypatch, FakeEngine(say))
    run = RunFolder(tmp_path)
    notes = stage(run, count=10).run(run).notes
    assert set(notes["unrated"]) == {"request_failed:timeout", "no_score"}
    answer_with(monkeypatch, FakeEngine(lambda request: ("", "request_failed:timeout")))
    with pytest.raises(DataError, match=r"could be rated .*request_failed:timeout"):
        stage(RunFolder(tmp_path / "b")).run(RunFolder(tmp_path / "b"))


def test_a_finalist_without_ratings_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the queries set aside only the start and one other can be rated."""
    said = {"A": 2.0, "B": None, "Go.": 1.0}

    def rate(self: Any, queries: Any, texts: Sequence[str]) -> dict[str, list[Rated]]:
        return {t: [Rated(q, "y", r) for q in queries] if (r := said[t]) else [] for t in texts}

    run = RunFolder(tmp_path)
    search = object.__new__(improve._Search)
    search.seed, search.judge = 0, ScoringFake()
    search.written, search.unrated = Counter(), Counter(no_score=4)
    monkeypatch.setattr(improve._Search, "rate", rate)
    queries = list(improve.stored_queries(stage(run).queries.path))[:4]
    found = search.compare(queries, ["Go.", "B", "A"])
    assert (found["best"], found["compared"], found["left_out"]) == ("A", 4, ["B"])
    assert "1 of 3 principles are left out" in " ".join(capsys.readouterr().err.split())
    said["Go."] = None
    with pytest.raises(DataError, match=r"could be rated .*no_score"):
        search.compare(queries, ["Go.", "B", "A"])


def test_a_judge_that_only_compares_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(monkeypatch, FakeJudge(longer))
    monkeypatch.setattr(improve, "check_sampler", lambda *given: ())
    with pytest.raises(ConfigError, match="rates none"):
        list(stage(RunFolder(tmp_path)).check())


def test_fewer_steps_than_were_asked_for_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(monkeypatch, FakeEngine(told()))
    for count, steps in ((10, 3), (9, 2)):
        run = RunFolder(tmp_path / str(count))
        assert len(stage(run, count=count).run(run).notes["path"]) == steps
        said = f"{count} queries are enough for {steps} of 3 steps" in capsys.readouterr().err
        assert said == (steps < 3)


def test_too_few_queries_are_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(DataError, match=r"5 queries are too few: 4 are set aside"):
        stage(run, count=5).run(run)
    made = stage(run)
    assert replace(made, settings=made.settings.model_copy(update={"beam": 3})).fingerprint != (
        made.fingerprint
    )


def test_settings_that_contradict_themselves_are_refused() -> None:
    for wrong, said in (
        ({"temperature": 0}, "all of them are the same answer"),
        ({"bad": "Go."}, "same text"),
        ({"good": " "}, "must be a text"),
    ):
        with pytest.raises(ValueError, match=said):
            Improvement.model_validate({"good": "Go.", **wrong})
    made = Improvement.model_validate({"good": "Go.", "writer": "m"})
    assert made.writer == WriterConfig(model="m")
