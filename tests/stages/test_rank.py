import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import Stored, dump_lines, read_shards
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Dropped, Preference, Query, Verdict
from selfsteer.engines.base import Completion
from selfsteer.engines.load import Engines
from selfsteer.errors import ArtifactError
from selfsteer.judges.base import Pair
from selfsteer.judges.oracle import OracleJudge
from selfsteer.recipe.sections import JudgeConfig, Loading, Sampling, resolve_path
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.run.stage import Artifact
from selfsteer.stages import rank as module
from selfsteer.stages.inputs import stored_preferences
from selfsteer.stages.rank import (
    Candidates,
    Climb,
    RankAnswers,
    Tournament,
    best_and_worst,
    competing,
    policy_as_judge,
    rank,
    rank_all,
    to_preference,
)
from tests import make
from tests.e2e.support import TESTBED
from tests.fakes import FakeEngine, FakeJudge, ScoringFake, answer_with, longer

BEE = make.query(id="q1", source="made up")
OWL = make.query("What does the owl eat?", "owl")


def test_scores_come_in_the_order_of_the_answers() -> None:
    assert rank(ScoringFake(), BEE, ["aaa", "X", "b"]) == [3.0, None, 1.0]
    several = [Candidates(BEE, ("a", "bb")), Candidates(BEE, ("ccc", "X", "d"))]
    assert rank_all(ScoringFake(), several) == [[1.0, 2.0], [3.0, None, 1.0]]


@pytest.mark.parametrize(
    ("scores", "places"),
    [
        ([0.1, 0.9, -2.0], (1, 2)),
        ([1.0, 1.0, 0.0, 0.0], (0, 2)),
        ([None, 2.0, 1.0], (1, 2)),
        ([1.0, 1.0], None),
        ([1.0, None], None),
        ([], None),
    ],
)
def test_best_and_worst_are_the_first_of_equals(
    scores: list[float | None], places: tuple[int, int] | None
) -> None:
    assert best_and_worst(scores) == places


def test_scores_within_the_tie_margin_are_equal() -> None:
    assert best_and_worst([1.0, 0.5, 0.75], tie_margin=0.5) is None
    assert best_and_worst([1.0, 0.5, 0.75], tie_margin=0.25) == (0, 1)
    lost = to_preference(Candidates(BEE, ("a", "b")), [1.0, 0.5], 0.5)
    assert isinstance(lost, Dropped)
    assert lost.reason == "all_equal"


def test_a_pair_is_best_over_worst_with_all_scores() -> None:
    pair = to_preference(Candidates(BEE, ("mid", "best", "low")), [0.5, 2.0, -1.0])
    assert isinstance(pair, Preference)
    assert (pair.chosen, pair.rejected) == ("best", "low")
    assert pair.extra == {"source": "made up", "scores": [0.5, 2.0, -1.0]}
    both = Candidates(BEE, ("a", "b"))
    assert to_preference(both, [1.0, 1.0]) == Dropped("q1", "all_equal", both)
    assert to_preference(both, [1.0, None]) == Dropped("q1", "no_score", both)


def test_answers_compete_without_their_thoughts() -> None:
    def said(text: str, thoughts: str = "", reason: str = "stop") -> Completion:
        return Completion("", text, reason, 10, 5, thoughts)

    keep = Sampling(reasoning="keep")
    several = [said("a", "1"), said("bb"), said("a", "2"), said("", "3"), said("", "4", "length")]
    found = competing(BEE, several, keep)
    assert found == Candidates(BEE, ("a", "bb"), ("1", ""))
    assert Candidates.from_dict(found.to_dict()) == found
    pair = to_preference(found, [0.0, 1.0])
    assert isinstance(pair, Preference)
    assert (pair.chosen, pair.rejected, pair.reasoning) == ("bb", "a", {"rejected": "1"})
    assert competing(BEE, several, Sampling()) == Candidates(BEE, ("a", "bb"))
    assert competing(BEE, several[1:2] + several[4:], keep) == Dropped(
        "q1", "unfinished_reasoning", Candidates(BEE, ("bb",))
    )


def test_a_tournament_counts_the_comparisons_won() -> None:
    judge = FakeJudge(longer)
    answers = [(BEE, "aaa"), (BEE, "aa"), (BEE, "bb"), (OWL, "a"), (OWL, "aaaa")]
    assert Tournament(judge).score_all(answers) == [1.0, 0.25, 0.25, 0.0, 1.0]
    assert judge.asked == 3 + 1


def test_what_could_not_be_read_is_no_lost_comparison() -> None:
    answers = [(BEE, "a?"), (BEE, "aa"), (BEE, "a")]
    assert Tournament(FakeJudge(longer)).score_all(answers) == [None, 1.0, 0.0]


def test_a_climb_sets_the_champion_over_the_last_answer_beaten() -> None:
    judge = FakeJudge(longer)
    # aa beats a, bbbb beats aa, ccc loses; then owl: aaaa beats a
    answers = [(BEE, "a"), (BEE, "aa"), (BEE, "bbbb"), (BEE, "ccc"), (OWL, "aaaa"), (OWL, "a")]
    assert Climb(judge).score_all(answers) == [None, None, 1.0, 0.0, 1.0, 0.0]
    assert judge.asked == 3 + 1
    # aa only ties with bb, what beats aa last is aaa
    assert Climb(judge).score_all([(BEE, t) for t in ("aa", "bb", "aaa")]) == [0.0, None, 1.0]


@pytest.mark.parametrize("way", [Tournament, Climb])
def test_a_judge_that_compares_is_told_which_answers_ended(way: type[Tournament | Climb]) -> None:
    def ended(pair: Pair) -> Verdict:
        first, second = pair.finished
        return Verdict.FIRST if first > second else Verdict.SECOND

    answers = [(BEE, "a"), (BEE, "b"), (OWL, "a"), (OWL, "b")]
    found = way(FakeJudge(ended)).score_all(answers, [False, True, True, False])
    assert found == [0.0, 1.0, 1.0, 0.0]


def test_where_a_climb_beats_nobody_there_is_no_pair() -> None:
    tied, unread = [(BEE, "a"), (BEE, "b")], [(OWL, "a"), (OWL, "b?")]
    scores = Climb(FakeJudge(longer)).score_all([*tied, *unread])
    assert scores == [0.5, 0.5, None, None]
    for query, found, reason in ((BEE, scores[:2], "all_equal"), (OWL, scores[2:], "no_score")):
        made = to_preference(Candidates(query, ("a", "b")), found)
        assert isinstance(made, Dropped)
        assert made.reason == reason
    assert Climb(FakeJudge(longer)).score_all([]) == []


def test_the_policy_judges_in_process_with_its_own_settings() -> None:
    found = policy_as_judge("runs/x/policy", Loading(dtype="float32"), 7)
    assert (found.kind, found.model, found.batch_size) == ("chat", "runs/x/policy", 7)
    assert (found.dtype, found.engine.kind) == ("float32", "transformers")


# -- the stage -------------------------------------------------------------------------------------


def stage(folder: Path, queries: Sequence[Query], n: int = 4, judge: str = "oracle") -> RankAnswers:
    folder.mkdir(exist_ok=True)
    (folder / "queries.jsonl").write_text(dump_lines(queries))
    return RankAnswers(
        Artifact(folder / "queries.jsonl"),
        Artifact(Path(resolve_path(TESTBED))),
        n,
        JudgeConfig.model_validate(judge),
        Sampling(temperature=1.0, shard_size=4, max_new_tokens=48, batch_size=16),
        loading=Loading(threads=1),
    )


@pytest.fixture(scope="module")
def questions() -> Sequence[Query]:
    return load_queries(make.smoke(Path(), "queries.limit=6").queries).queries


def test_the_stage_keeps_the_oracles_best_and_worst_and_resumes(
    questions: Sequence[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run, cut_run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    whole = whole_run.execute(stage(whole_run.path, questions))
    assert whole.n_in == 6
    assert whole.n_out >= 3
    pairs = [Preference.from_dict(v) for v in read_shards(whole_run / "ranked")]
    for pair in pairs:
        query = Query(pair.id, pair.prompt)
        high, low = (
            OracleJudge().score(query, pair.chosen),
            OracleJudge().score(query, pair.rejected),
        )
        assert high == max(pair.extra["scores"])
        assert low == min(pair.extra["scores"])
        assert high > low
    # killed while ranking its second shard
    calls = 0

    def falls(*args: object) -> list[list[float | None]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return rank_all(*args)  # type: ignore[arg-type]

    again = stage(cut_run.path, questions)
    monkeypatch.setattr(module, "rank_all", falls)
    with pytest.raises(KeyboardInterrupt):
        cut_run.execute(again)
    monkeypatch.setattr(module, "rank_all", rank_all)
    # what is sampled already is not sampled again
    monkeypatch.setattr(Engines, "sampler", None)
    assert cut_run.execute(again).n_out == whole.n_out
    for path in whole_run.path.rglob("*.jsonl"):
        if path.name != "ledger.jsonl":
            twin = cut_run / str(path.relative_to(whole_run.path))
            assert twin.read_bytes() == path.read_bytes()
    shards = list((whole_run / "ranked").rglob("shard-*.jsonl"))
    assert len(shards) == 2 + 2
    assert all(json.loads(p.read_text().splitlines()[0])["id"] for p in shards)


def test_a_query_is_dropped_for_the_reason_it_has_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "plain/0/q0": ("", "prompt_too_long"),
        "plain/1/q0": ("", "prompt_too_long"),
        "plain/1/q1": ("", "request_failed:timeout"),
        "plain/1/q2": ("Nectar. And", "length"),
        "plain/1/q3": ("Bricks, bricks.", "stop"),
    }
    answer_with(monkeypatch, FakeEngine(lambda r: told.get(r.id, "Nectar.")))
    monkeypatch.setattr(module, "load_judge", lambda *args: ScoringFake())
    run = RunFolder(tmp_path)
    made = stage(run.path, [make.query(id=f"q{i}") for i in range(4)], 2)
    found = run.execute(made)
    assert (found.n_in, found.n_out) == (4, 1)
    assert found.dropped == {
        "prompt_too_long": 1,
        "request_failed:timeout": 1,
        "too_few_answers": 1,
    }
    # one file, of sampling and of ranking
    dropped = list(read_dropped(run / "ranked.dropped.jsonl"))
    assert {d.id: d.reason for d in dropped} == {
        "q0": "prompt_too_long",
        "q1": "request_failed:timeout",
        "q2": "too_few_answers",
    }
    assert all(d.record and d.record["answers"] in ([], ["Nectar."]) for d in dropped)  # type: ignore[index]


def test_queries_without_any_pair_end_the_run_and_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, FakeEngine(lambda r: "Nectar."))
    run = RunFolder(tmp_path)
    with pytest.raises(ArtifactError, match="2 too_few_answers"):
        run.execute(stage(run.path, [make.query(id=f"q{i}") for i in range(2)], 2))
    assert [d.id for d in read_dropped(run / "ranked.dropped.jsonl")] == ["q0", "q1"]


def test_the_stage_climbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, FakeEngine(lambda r: "a" * (r.seed % 7 + 1)))
    judge = FakeJudge(longer)
    monkeypatch.setattr(module, "load_judge", lambda *args: judge)
    run = RunFolder(tmp_path)
    climbing = stage(run.path, [make.query(id=f"q{i}") for i in range(8)], 4, "chat:x")
    run.execute(replace(climbing, order="climb"))
    found = Stored(run / "ranked/candidates", Candidates.from_dict)
    assert judge.asked == sum(len(c.answers) - 1 for c in found)
    for c, pair in zip(found, stored_preferences(run / "ranked"), strict=True):
        assert pair.chosen == max(c.answers, key=len)
        assert len(pair.rejected) < len(pair.chosen)


def test_the_sampling_model_has_left_memory_when_the_judge_comes(
    questions: Sequence[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    sampler = Engines.sampler

    def watched(*args: Any) -> Any:
        engine = sampler(*args)
        made.append(weakref.ref(engine))
        return engine

    def judge(*args: Any) -> OracleJudge:
        gc.collect()
        assert made
        assert not any(ref() for ref in made)
        return OracleJudge()

    monkeypatch.setattr(Engines, "sampler", watched)
    monkeypatch.setattr(module, "load_judge", judge)
    run = RunFolder(tmp_path)
    run.execute(stage(run.path, questions, 2))
