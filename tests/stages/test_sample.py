"""Who is asked what, what is dropped, and what a killed stage asks again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import read_shards
from selfsteer.data.records import Preference, Triple
from selfsteer.engines.base import Completion, Contrast, Request
from selfsteer.engines.load import Engines
from selfsteer.errors import ConfigError
from selfsteer.recipe.sections import Loading, PrincipledSampling, Sampling
from selfsteer.run.cost import Scale
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.run.stage import Artifact
from selfsteer.stages.filter import to_preference
from selfsteer.stages.sample import Sample, check_sampler
from tests.fakes import FakeEngine, Said, answer_with
from tests.make import triple, write_jsonl

NAMES = ("plain", "good", "bad")


def stage(run: RunFolder, count: int = 10, **settings: Any) -> Sample:
    """Three responses to each of so many queries, four queries to a shard."""
    rows = (triple(f"q{i}", "Safety", text=f"Query {i}?").to_dict() for i in range(count))
    asked = Artifact(write_jsonl(run / "principles.jsonl", *rows))
    writers = dict.fromkeys(NAMES, Artifact(Path("policy")))
    return Sample(asked, writers, Sampling(shard_size=4, **settings), title="triples")


def told(request: Request) -> Said:
    """An answer that depends on its request alone; some are cut off, some are missing."""
    name, _, identity = request.id.split("/")
    if (name, identity) in (("good", "q3"), ("bad", "q8")):
        return "It is", "length"
    if identity == "q5":
        return "", "prompt_too_long"
    return f"{name} {identity} {request.seed % 1000}"


def thinking(request: Request) -> Said:
    """Thoughts before each answer, but for those that never come to an end."""
    name, _, identity = request.id.split("/")
    lost = {("good", "q3"): "length", ("plain", "q5"): "stop"}.get((name, identity))
    thoughts = f"<think>\nFor {name}.\n</think>\n\n"
    if lost:
        return Completion("", "", lost, 10, 5, thoughts.partition("\n</")[0])
    return Completion("", name, "stop", 10, 5, "" if identity == "q7" else thoughts)


def made(run: RunFolder) -> dict[str, bytes]:
    """All that the stage left, the ledger aside."""
    files = (p for p in run.path.rglob("*") if p.is_file() and p.name != "ledger.jsonl")
    return {str(p.relative_to(run.path)): p.read_bytes() for p in files}


def test_each_response_is_asked_for_in_its_own_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, run = answer_with(monkeypatch, FakeEngine(told)), RunFolder(tmp_path)
    stage(run).run(run)
    asked = {r.id: r for r in engine.asked}
    assert len(asked) == len(engine.asked) == 30
    assert [m.role for m in asked["plain/0/q0"].messages] == ["user"]
    assert asked["good/0/q0"].messages[0].content == "Be fine q0."
    assert asked["bad/0/q0"].messages[0].content == "Be foul q0."
    assert len({r.seed for r in engine.asked}) == 30
    first = Triple.from_dict(next(iter(read_shards(run / "triples"))))
    assert set(first.responses) == set(NAMES)
    assert first.finished("good")


def test_responses_are_pushed_from_the_opposite_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, run = answer_with(monkeypatch, FakeEngine(told)), RunFolder(tmp_path)
    plain = stage(run)
    pushed = replace(plain, sampling=PrincipledSampling(contrast=3, contrast_bad=-0.25))
    pushed.run(run)
    asked = {r.id: r for r in engine.asked}
    assert asked["plain/0/q0"].contrast is None
    for name, other, ratio in (("good", "bad", 3.0), ("bad", "good", -0.25)):
        assert asked[f"{name}/0/q0"].contrast == Contrast(asked[f"{other}/0/q0"].messages, ratio)
    # a context is decoded beside each good and each bad answer
    written = {"good": pushed.writers["good"]}
    for sampled, expected in (
        (plain, {"plain": 10, "good": 10, "bad": 10}),
        (pushed, {"plain": 10, "good": 10, "bad": 10, "contrast": 20}),
        (replace(pushed, writers=written), {"good": 10, "contrast": 10}),
    ):
        monkeypatch.setattr(Sample, "records", lambda self, scale: 10)
        assert sampled.cost(Scale(10)).answers == expected


@pytest.mark.parametrize("reasoning", ["drop", "keep"])
def test_thoughts_are_kept_where_the_recipe_says_so(
    reasoning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, FakeEngine(thinking))
    run = RunFolder(tmp_path)
    result = stage(run, reasoning=reasoning, keep_unfinished=True).run(run)
    assert result.dropped == {"unfinished_reasoning": 1, "no_answer": 1}, "kept or not"
    found = {t.id: t for t in map(Triple.from_dict, read_shards(run / "triples"))}
    assert all(t.responses == {n: n for n in NAMES} for t in found.values())
    kept = {n: f"<think>\nFor {n}.\n</think>\n\n" for n in NAMES if reasoning == "keep"}
    assert found["q0"].reasoning == kept
    rows = {row["id"]: row for row in read_shards(run / "triples")}
    assert [i for i, row in rows.items() if "reasoning" not in row] == (
        ["q7"] if kept else list(found)
    )
    pair = to_preference(found["q0"])
    names = {"good": "chosen", "bad": "rejected"}
    assert pair.reasoning == {names[n]: t for n, t in kept.items() if n in names}
    again = Preference.from_dict(pair.to_dict())
    assert again == pair
    assert again.to_triple().reasoning == {n: t for n, t in kept.items() if n in names}


def test_each_model_is_asked_for_its_own_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {name: FakeEngine(told) for name in ("plus", "minus")}
    monkeypatch.setattr(Engines, "sampler", lambda self, settings, source, *rest: engines[source])
    run = RunFolder(tmp_path)
    both = {"good": Artifact(Path("plus")), "bad": Artifact(Path("minus"))}
    Sample(stage(run, 2).queries, both, Sampling()).run(run)
    assert [r.id for r in engines["plus"].asked] == ["good/0/q0", "good/0/q1"]
    assert [r.id for r in engines["minus"].asked] == ["bad/0/q0", "bad/0/q1"]


def test_drops_are_counted_by_reason_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, FakeEngine(told))
    run = RunFolder(tmp_path)
    result = run.execute(stage(run))
    assert (result.n_in, result.n_out) == (10, 7)
    assert result.dropped == {"unfinished": 2, "prompt_too_long": 1}
    dropped = {d.id: d for d in read_dropped(run / "triples.dropped.jsonl")}
    assert {i: d.reason for i, d in dropped.items()} == {
        "q3": "unfinished",
        "q5": "prompt_too_long",
        "q8": "unfinished",
    }
    record = dropped["q3"].record
    assert isinstance(record, dict)
    assert record["responses"]["good"] == "It is"
    kept = stage(run, keep_unfinished=True).run(RunFolder(tmp_path / "kept"))
    assert kept.dropped == {"prompt_too_long": 1}


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("dies_after", [1, 14, 23, 29])
def test_a_killed_stage_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | None, dies_after: int
) -> None:
    """Drops included; whole shards and answers that were there are not asked for again."""
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    answer_with(monkeypatch, FakeEngine(told, batch_size))
    result = stage(whole).run(whole)
    dying = FakeEngine(told, batch_size)

    def dies(request: Request) -> Said:
        if len(dying.asked) > dies_after:
            raise KeyboardInterrupt
        return told(request)

    dying.say = dies
    answer_with(monkeypatch, dying)
    with pytest.raises(KeyboardInterrupt):
        stage(cut).run(cut)
    assert not (cut / "triples.dropped.jsonl").exists()
    again = answer_with(monkeypatch, FakeEngine(told, batch_size))
    assert stage(cut).run(cut) == result
    assert made(cut) == made(whole)
    asked_twice = {r.id for r in dying.asked[:dies_after]} & {r.id for r in again.asked}
    assert len(asked_twice) < (batch_size or 1)


def test_answers_that_say_nothing_are_noticed_once_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All good answers are the same; a resumed stage knows it from its shards."""
    engine = answer_with(monkeypatch, FakeEngine(told_or_refused))
    run = RunFolder(tmp_path)
    result = stage(run, 20).run(run)
    (text,) = result.notes["warnings"]
    assert text.startswith('100% of 20 good answers to different queries are the same text ("I am')
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("are the same text") == 1
    assert "triples: 100% of 16 good answers" in said, "before the last shard"
    assert len(engine.asked) == 60, "nothing is sampled for it"
    assert stage(run, 20).run(run).notes == result.notes
    assert len(engine.asked) == 60


def told_or_refused(request: Request) -> Said:
    return "I am sorry, but I cannot say." if request.id.startswith("good") else request.id


def test_a_limit_takes_a_subset_that_does_not_depend_on_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, FakeEngine(lambda r: r.id))

    def taken(count: int, limit: int) -> list[str]:
        run = RunFolder(tmp_path / f"{count}-{limit}")
        whole = stage(run, count)
        limited = Sample(whole.queries, whole.writers, whole.sampling, limit)
        assert limited.records(Scale(0)) == 0
        limited.run(run)
        return [v["id"] for v in read_shards(run / "samples")]

    three = taken(10, 3)
    assert three == sorted(three)
    assert set(three) < set(taken(10, 6))
    assert taken(10, 99) == [f"q{i}" for i in range(10)]


def test_a_budget_beyond_the_context_is_refused_before_anything_is_sampled(
    checkpoints: dict[str, Path],
) -> None:
    given = Artifact(checkpoints["gemma"])
    (note,) = check_sampler(Sampling(max_new_tokens=64), [given], Loading())
    assert "no system role" in note
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens 1024"):
        list(check_sampler(Sampling(max_new_tokens=1024), [given], Loading()))
