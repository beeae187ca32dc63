import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import read_shards
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Message, Preference, Query
from selfsteer.errors import ConfigError
from selfsteer.judges.oracle import OracleJudge
from selfsteer.methods import Recipe, load_recipe
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.folder import StageResult
from selfsteer.stages import rank as module
from selfsteer.stages.rank import (
    Candidates,
    best_and_worst,
    best_of_n,
    rank,
    rank_all,
    to_preference,
)
from tests.e2e.support import TESTBED
from tests.fakes import FakeEngine

BEE = Query("q1", (Message("user", "What does the bee eat?"),), {"source": "made up"})


class Longest(OracleJudge):
    """Likes length; has no score for anything that begins with an X."""

    def score_all(self, answers: Sequence[tuple[Query, str]]) -> list[float | None]:
        return [None if a.startswith("X") else float(len(a)) for _, a in answers]


def test_scores_come_in_the_order_of_the_answers() -> None:
    assert rank(Longest(), BEE, ["aaa", "X", "b"]) == [3.0, None, 1.0]
    several = [Candidates(BEE, ("a", "bb")), Candidates(BEE, ("ccc", "X", "d"))]
    assert rank_all(Longest(), several) == [[1.0, 2.0], [3.0, None, 1.0]]


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
    assert to_preference(Candidates(BEE, ("a", "b")), [1.0, 0.5], 0.5) == "all_equal"


def test_a_pair_is_best_over_worst_with_all_scores() -> None:
    pair = to_preference(Candidates(BEE, ("mid", "best", "low")), [0.5, 2.0, -1.0])
    assert isinstance(pair, Preference)
    assert (pair.chosen, pair.rejected) == ("best", "low")
    assert pair.extra == {"source": "made up", "scores": [0.5, 2.0, -1.0]}
    assert to_preference(Candidates(BEE, ("a", "b")), [1.0, 1.0]) == "all_equal"
    assert to_preference(Candidates(BEE, ("a", "b")), [1.0, None]) == "no_score"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    small = ("queries.limit=6", "sampling.shard_size=4", "sampling.temperature=1.0")
    return load_recipe("smoke", [f"runs_dir={tmp_path}", "policy.threads=1", *small])


def stage(recipe: Recipe, folder: Path, n: int = 4) -> StageResult:
    where = folder / "preferences"
    source = resolve_path(recipe.policy.model)
    return best_of_n(
        load_queries(recipe.queries).queries, n, recipe, source, OracleJudge, where, "bon", folder
    )


def test_the_stage_keeps_the_oracles_best_and_worst_and_resumes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.policy.model == TESTBED
    whole = stage(recipe, tmp_path / "whole")
    assert whole.n_in == 6
    assert whole.n_in == whole.n_out + whole.dropped.total()
    assert whole.n_out >= 3
    pairs = [Preference.from_dict(v) for v in read_shards(tmp_path / "whole" / "preferences")]
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

    monkeypatch.setattr(module, "rank_all", falls)
    with pytest.raises(KeyboardInterrupt):
        stage(recipe, tmp_path / "cut")
    monkeypatch.setattr(module, "rank_all", rank_all)
    # what is sampled already is not sampled again
    monkeypatch.setattr(module.Engines, "sampler", None)
    assert stage(recipe, tmp_path / "cut").n_out == whole.n_out
    for path in (tmp_path / "whole" / "preferences").rglob("shard-*.jsonl"):
        twin = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert twin.read_bytes() == path.read_bytes()
        assert json.loads(path.read_text().splitlines()[0])["id"]


def test_a_query_is_dropped_for_the_reason_it_has_no_answers(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "q0/0": ("", "prompt_too_long"),
        "q0/1": ("", "prompt_too_long"),
        "q1/1": ("", "request_failed:timeout"),
        "q2/1": ("Nectar. And", "length"),
        "q3/1": ("Bricks, bricks.", "stop"),
    }
    engine = FakeEngine(lambda r: told.get(r.id, "Nectar."))
    monkeypatch.setattr(module.Engines, "sampler", lambda *args: engine)
    queries = [Query(f"q{i}", (Message("user", "What does the bee eat?"),)) for i in range(4)]
    found = best_of_n(queries, 2, recipe, "m", Longest, tmp_path / "p", "bon", tmp_path)
    assert (found.n_in, found.n_out) == (4, 1)
    assert found.dropped == {
        "prompt_too_long": 1,
        "request_failed:timeout": 1,
        "too_few_answers": 1,
    }


def test_the_sampling_model_has_left_memory_when_the_judge_comes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    sampler = module.Engines.sampler

    def watched(*args: Any) -> Any:
        engine = sampler(*args)
        made.append(weakref.ref(engine))
        return engine

    def judge() -> OracleJudge:
        gc.collect()
        assert made
        assert not any(ref() for ref in made)
        return OracleJudge()

    monkeypatch.setattr(module.Engines, "sampler", watched)
    source = resolve_path(recipe.policy.model)
    queries = load_queries(recipe.queries).queries
    best_of_n(queries, 2, recipe, source, judge, tmp_path / "p", "bon", tmp_path)


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.7), (4, 0.0)])
def test_answers_that_cannot_differ_are_refused(
    recipe: Recipe, tmp_path: Path, n: int, temperature: float
) -> None:
    sampling = recipe.sampling.model_copy(update={"temperature": temperature})
    with pytest.raises(ConfigError, match="only one"):
        stage(recipe.model_copy(update={"sampling": sampling}), tmp_path, n)
