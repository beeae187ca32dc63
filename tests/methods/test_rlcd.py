"""RLCD on the tiny world: a reward model from contrast pairs ranks plain answers."""

from pathlib import Path

import pytest

from selfsteer.errors import ConfigError
from selfsteer.judges.reward import RewardJudge
from selfsteer.methods import load_recipe
from selfsteer.report.browser import Index, build
from selfsteer.run.execute import execute
from selfsteer.run.stage import Artifact
from selfsteer.stages.inputs import stored_preferences, stored_queries, stored_triples
from selfsteer.stages.rank import RankAnswers, trained_judge
from selfsteer.stages.sample import Sample
from selfsteer.verbs.exporting import export_round
from selfsteer.view import RunView
from tests.make import SMALL, stages_of

OWN = ("ranking.samples=3", "reward={learning_rate: 1e-3, batch_size: 4, forward_pairs: 4}")


def test_plain_answers_are_ranked_by_the_models_own_reward_model(tmp_path: Path) -> None:
    recipe = load_recipe("rlcd", [*SMALL, *OWN, f"runs_dir={tmp_path}"])
    execute(recipe, {"name": "given"}, until="iteration-1/ranked")
    view = RunView.open(recipe.folder)
    assert view.reward is not None
    # its principles hold for all rounds, and what they were followed by is shown with the first
    of = view.round()
    assert [t.id for t in of.principles] == [
        t.id for t in stored_triples(recipe.folder / "ranker/principles.jsonl")
    ]
    sampled, competing = of.sampled
    assert (competing.name, competing.ranked) == ("iteration-1/ranked", True)
    assert (sampled.name, [s.kind for s in sampled.takers]) == ("ranker/samples", ["FilterTriples"])
    index = Index(build(sampled))
    assert index.about["of"] == 8
    assert all(r["triple"]["principles"]["good"] for r in index.records([1, 2]))
    written = export_round(of, "reward", tmp_path / "reward")
    assert written.count == 8
    pairs = {t.id: t.responses for t in stored_triples(recipe.folder / "ranker/filtered.jsonl")}
    assert view.reward.sources["rlcd"].read == len(pairs)
    made = stages_of(recipe)
    reward = Artifact(recipe.folder / "reward", made["train_reward"])
    judge = RewardJudge(trained_judge(reward, 32))
    ranked = recipe.folder / "iteration-1/ranked"
    queries = {q.id: q for q in stored_queries(ranked / "candidates")}
    found = list(stored_preferences(ranked))
    assert found
    for pair in found:
        query = queries[pair.id]
        answers = query.extra["answers"]
        scores = [s or 0.0 for s in judge.score_all([(query, text) for text in answers])]
        assert pair.chosen == answers[scores.index(max(scores))]
        assert pair.rejected == answers[scores.index(min(scores))]


def test_one_reward_model_serves_all_rounds() -> None:
    made = stages_of(load_recipe("rlcd", [*SMALL, "iterations=2"]))
    for k in (1, 2):
        stage = made[f"iteration-{k}/ranked"]
        assert isinstance(stage, RankAnswers)
        assert stage.reward is not None
        assert stage.reward.maker == made["train_reward"]
    other = stages_of(load_recipe("rlcd", [*SMALL, "iterations=2", "reward.epochs=2"]))
    ranked = "iteration-1/ranked"
    assert other[ranked].fingerprint != made[ranked].fingerprint


def test_beside_a_baseline_there_is_one_reward_model_still() -> None:
    """Whoever is the baseline; a second one is refused."""
    made = stages_of(load_recipe("rlcd", [*SMALL, "baseline=pbaa"]))
    assert list(made).count("train_reward") == 1
    samples = made["baseline/iteration-1/samples"]
    assert isinstance(samples, Sample)
    assert samples.queries.maker == made["ranker/principles"]
    assert "train_reward" in stages_of(load_recipe("pbaa", [*SMALL, "baseline=rlcd"]))
    with pytest.raises(ConfigError, match="one reward model"):
        load_recipe("pbaa", [*SMALL, "baseline=rlcd", "reward={}"]).plan()
