"""What of the evaluation queries is counted, asked and kept."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from selfsteer.data.records import Query
from selfsteer.errors import ConfigError
from selfsteer.judges.base import Judgement, Pair
from selfsteer.recipe.sections import Evaluation, JudgeConfig, Queries, Sampling
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.run.stage import Artifact
from selfsteer.stages import evaluate
from selfsteer.stages.evaluate import Evaluate
from tests.fakes import FakeEngine, ScoringFake, answer_with
from tests.make import write_jsonl

PROMPTS = ("Why is it so?", "Why is it so?", "Who?", "Where is it then?", "Which is too long?")


def stage(run: RunFolder, *models: str) -> Evaluate:
    """An evaluation on `PROMPTS`; the run's own query is the first of them, in other case."""
    run.path.mkdir(exist_ok=True)
    own = Artifact(write_jsonl(run / "queries.jsonl", {"id": "a", "prompt": PROMPTS[0].upper()}))
    held_out = write_jsonl(run.path.parent / "e.jsonl", *({"prompt": p} for p in PROMPTS))
    return Evaluate(
        own,
        {name: Artifact(Path(name)) for name in ("base", *models)},
        {"sso": ("base", *models)[-1]},
        Evaluation(queries=Queries(path=str(held_out), min_chars=5)),
        Sampling(),
        None,
    )


def test_what_is_dropped_of_the_evaluation_queries_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = ("", "prompt_too_long")
    engine = FakeEngine(lambda r: lost if "long" in r.messages[0].content else "So.")
    answer_with(monkeypatch, engine)
    run = RunFolder(tmp_path / "run")
    result = run.execute(stage(run, "sso/iteration-1"))
    assert (result.n_in, result.n_out) == (5, 2)
    assert result.dropped == {"duplicate": 1, "too_short": 1, "prompt_too_long": 1}
    assert "1 of 3 evaluation queries are also alignment queries" in capsys.readouterr().err
    asked = [r.messages[0].content for r in engine.asked]
    assert sorted(asked) == sorted(2 * ("Why is it so?", "Where is it then?", "Which is too long?"))
    # the same query has the same seed, whoever answers
    assert len({(r.id, r.seed) for r in engine.asked}) == 3
    written = Counter(d.reason for d in read_dropped(run / "evaluation.dropped.jsonl"))
    assert written == result.dropped
    report = json.loads((run / "evaluation.json").read_text())
    assert report["queries"] == 2
    assert list(report["models"]) == ["base", "sso/iteration-1"]


def test_answers_of_an_earlier_try_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, engine = RunFolder(tmp_path / "run"), FakeEngine(lambda r: "So.")
    made = stage(run, "sso/iteration-1", "sso/iteration-2")
    answer_with(monkeypatch, engine)
    run.execute(made)
    whole = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    (run / "evaluation/answers-sso-iteration-2.jsonl").unlink()
    # killed when the answers were written, but still waited in the store as well
    (run / "evaluation/answers-base.partial.jsonl").touch()
    engine.asked.clear()
    run.execute(made)
    assert len(engine.asked) == 3
    assert (run / "evaluation.json").read_bytes() == whole
    assert not list((run / "evaluation").glob("*.partial*"))


def test_the_judge_is_told_which_answers_were_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[bool, ...]] = []

    class Noted(ScoringFake):
        def score_all(
            self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
        ) -> list[float | None]:
            ends.append(tuple(finished or ()))
            return super().score_all(answers)

        def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
            ends.extend(pair.finished for pair in pairs)
            return super().compare_all(pairs)

    cut_off = ("So", "length")
    answers: list[str | tuple[str, str]] = [cut_off, *["So."] * 4, cut_off]
    said = iter(answers)
    answer_with(monkeypatch, FakeEngine(lambda r: next(said)))
    monkeypatch.setattr(evaluate, "load_judge", lambda *args: Noted())
    run = RunFolder(tmp_path / "run")
    run.execute(replace(stage(run, "sso/iteration-1"), judge=JudgeConfig(kind="oracle")))
    base, theirs, *pairs = ends
    assert sum(base) == sum(theirs) == 2
    assert pairs == [*zip(theirs, base, strict=True)]


def test_a_judge_that_is_not_there_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    judge = JudgeConfig(kind="human", path=str(tmp_path / "none.jsonl"))
    made = replace(stage(RunFolder(tmp_path / "run")), models={}, judge=judge)
    with pytest.raises(ConfigError, match="none"):
        list(made.check())


@pytest.mark.parametrize(
    ("after", "shown", "kept"),
    [(("A", "A b.", "A."), "Where is it then?", 1), (("A b c d.",) * 3, None, 0)],
)
def test_the_query_that_gained_most_and_the_rules_are_shown(
    after: tuple[str, ...],
    shown: str | None,
    kept: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 3 words score 1: the second and third gain, and the second's answers are shorter."""
    before = ("A b.", "A b c d.", "A b c d e f.")
    pairs = zip(before, after, strict=True)
    said = {q: iter(texts) for q, texts in zip(PROMPTS[2:], pairs, strict=True)}
    answer_with(monkeypatch, FakeEngine(lambda r: next(said[r.messages[0].content])))
    run = RunFolder(tmp_path / "run")
    rules = [{"words": {"max": 3}}]
    held_out = write_jsonl(
        tmp_path / "held-out.jsonl", *({"prompt": p, "checks": rules} for p in PROMPTS[2:])
    )
    run.execute(
        replace(
            stage(run, "sso/iteration-1"),
            settings=Evaluation(queries=Queries(path=str(held_out))),
            judge=JudgeConfig(kind="checks"),
        )
    )
    report = json.loads((run / "evaluation.json").read_text())
    example, rule = report.get("example"), report["rules"].pop("words (of queries)")
    assert not report["rules"]
    assert (rule["queries"], rule["kept"]) == (3, {"base": 1 / 3, "sso/iteration-1": kept})
    gain, low, high = rule["gained"]["sso/iteration-1"]
    assert gain == pytest.approx(kept - 1 / 3)
    assert low <= gain <= high
    assert (example and example["query"]) == shown
    if example:
        assert example["answers"] == {"base": "A b c d.", "sso/iteration-1": "A b."}
        assert example["scores"] == {"base": 0.0, "sso/iteration-1": 1.0}
