"""What stages ask for adds up to what the recipe asks for, on numbers worked out by hand."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from selfsteer.errors import ConfigError
from selfsteer.methods import Recipe, load_recipe
from selfsteer.run.cost import Cost, Rates, Scale, Training, disk_bytes, scoring, seconds, total
from tests.make import smoke


def planned(recipe: Recipe, queries: int, held_out: int = 0) -> Cost:
    return total(stage.cost(Scale(queries, held_out)) for stage in recipe.plan())


def test_the_cost_of_the_generator_way(tmp_path: Path) -> None:
    """10 queries, triples for 4; base, baseline and policy answer 5 held-out queries.

    Answers: good and bad 4 + 10 + 10 (baseline); plain 4 + 3·5. Scored: triples 7 sequences of 4
    and bad/plain for the generator's reference; samples 6 of 10, twice. Trained, at 3 forwards:
    generator 4 sequences of 4, policy and baseline 2 of 10.
    """
    cost = planned(smoke(tmp_path, "generator.queries=4"), 10, 5)
    assert cost.principles == 10
    steered = {n: cost.answers[n] for n in ("plain", "good", "bad")}
    assert steered == {"good": 24, "bad": 24, "plain": 19}
    assert cost.forwards == 8 * 4 + 2 * 6 * 10
    assert cost.trained == 3 * (4 * 4 + 2 * (2 * 10))
    assert len(cost.trainings) == 3
    assert cost.judged == 10 + 4 + 10 + 2 * 5, "samples, triples, the baseline's, evaluation"
    assert planned(smoke(tmp_path, "judge=null"), 10, 5).judged == 0
    assert cost.unknown == ()


def test_who_is_asked_for_principles(tmp_path: Path) -> None:
    """The policy names features; a writer is asked for each of its candidates."""

    def asked(*more: str) -> dict[str, int]:
        answers = planned(smoke(tmp_path, "judge=null", "evaluation=null", *more), 10).answers
        return {n: answers[n] for n in ("features", "principles") if answers[n]}

    assert asked("principles={mode: picked, features: random}") == {}
    assert asked("principles={mode: picked, features: model}") == {"features": 10}
    several = "principles={mode: generated, candidates: 3}"
    assert asked(several) == {"features": 10, "principles": 30}
    assert asked("principles={mode: fixed, good: Be kind., bad: Be rude.}") == {}


def test_the_cost_of_other_ways(tmp_path: Path) -> None:
    common = ("policy.model=package:selfsteer.testbed/checkpoint", "queries.path=q.jsonl")
    v1 = load_recipe("sso-online", [f"runs_dir={tmp_path}", *common, "name=v1"])
    online = planned(v1, 30)
    assert online.principles == 30, "three iterations of a third each"
    assert [online.answers[n] for n in ("good", "bad", "plain")] == [30, 30, 30]
    assert online.trained == 3 * 6 * 30
    steps = "training.selection.points=0"
    plain = ("baseline=null", "principles=null", "generator=null", steps, "evaluation=null")
    ranked = planned(smoke(tmp_path, "method=best-of-n", *plain), 10)
    assert ranked.forwards == 2 * 10, "without principles there is no steering gap to score"
    assert ranked.judged == 4 * 10 + 10, "the oracle scores each of 4 answers; quality"
    itself = planned(smoke(tmp_path, "method=self-rewarding", *plain), 10)
    assert itself.judged == 6 * 10 + 10, "the policy compares each answer with each other"
    climb = planned(smoke(tmp_path, "method=self-rewarding", "ranking.order=climb", *plain), 10)
    assert climb.judged == 3 * 10 + 10, "each answer with the best so far"
    revised = planned(smoke(tmp_path, "method=sgpo", *plain), 10)
    assert revised.answers == {"plain": 10 + 10}, "an answer and what is made of it"
    assert (revised.judged, revised.unknown) == (10, ())
    halves = smoke(
        tmp_path,
        "baseline=null",
        "evaluation=null",
        "generator.per_half=true",
        "generator.base=simpo",
        "training.gradient_checkpointing=true",
    )
    cost = planned(halves, 10)
    assert len(cost.trainings) == 3
    assert cost.trained == 3 * (2 * 10 + 2 * 10) + 4 * 2 * 10


def test_noise_reads_the_rejected_answers_once_more(tmp_path: Path) -> None:
    """Its collisions are no log-probs, so nothing that was scored before saves the forward."""
    plain = ("method=pbaa", "baseline=null", "generator=null", "evaluation=null")
    without = planned(smoke(tmp_path, *plain), 10)
    assert planned(smoke(tmp_path, *plain, "training.noise=0.5"), 10).forwards == (
        without.forwards + 10
    )


def test_the_cost_is_that_of_the_grown_query_set(tmp_path: Path) -> None:
    grown = planned(smoke(tmp_path, "queries.augment.to=40", "evaluation=null"), 10)
    assert grown.unknown == ("augment",)
    same = planned(smoke(tmp_path, "evaluation=null"), 40)
    assert replace(grown, unknown=(), records=0) == replace(same, records=0)


def test_a_sequence_is_scored_once_whoever_asks() -> None:
    """The larger of two wishes counts; other texts are other sequences."""
    names = ("plain/good", "good/good")
    costs = [
        Cost(scores=scoring("samples", names, 4)),
        Cost(scores=scoring("samples", names[:1], 7)),
        Cost(scores=scoring("triples", names[:1], 2)),
    ]
    assert total(costs).forwards == 7 + 4 + 2


def test_seconds_and_bytes_by_hand() -> None:
    """Two models of 1000 parameters; 15 answers of 100 tokens, 11 sequences scored."""
    cost = Cost(
        principles=10,
        judged=6,
        answers=Counter(good=10, plain=5),
        scores={**scoring("t", ("plain/good", "good/good"), 4), **scoring("t", ("plain/good",), 7)},
        trainings=(Training(("plain/good", "plain/bad"), 5, 10.0), Training(("x",), 5, 10.0)),
    )
    assert (cost.forwards, cost.trained) == (11, 30)
    rates = Rates(0.5, {"good": 2.0, "plain": 1.0}, 0.1)
    assert seconds(cost, rates) == pytest.approx(
        {"principles": 5, "sampling": 25, "scoring": 1.1, "training": 3, "judging": 0}
    )
    assert seconds(cost, replace(rates, per_judged=0.5))["judging"] == 3

    def disk(checkpoints: int) -> dict[str, int]:
        return disk_bytes(
            cost, tokens=100, parameters=1000, bytes_per_weight=2, checkpoints=checkpoints
        )

    assert disk(1) == {
        "models": 2 * 1000 * 2,
        "checkpoints": 2 * 1000 * 12,
        "samples": 2 * 15 * 100 * 5,
        "scores": 11 * 100 * 4,
    }
    assert disk(0)["checkpoints"] == 0


def test_stages_of_a_model_that_is_nowhere_are_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names nothing"):
        planned(smoke(tmp_path, "policy.model=package:selfsteer.testbed/none"), 1)
