import math

import numpy as np
import pytest

from selfsteer.data.records import Message, Query, Triple, Verdict
from selfsteer.judges.base import Pair
from selfsteer.judges.load import load_judge
from selfsteer.judges.oracle import OracleJudge
from selfsteer.judges.quality import on_policyness, quality, steering_gap
from selfsteer.judges.stats import (
    above,
    accuracy,
    mean_interval,
    statistic_interval,
    verdict_counts,
)


def test_accuracy_counts_ties_and_inconsistent_half_and_leaves_unparseable_out() -> None:
    """2 wins, 1 loss, 1 tie, 1 inconsistent, 5 unparseable: (2 + ½·2) / 5."""
    verdicts = [
        *[Verdict.FIRST] * 2,
        Verdict.SECOND,
        Verdict.TIE,
        Verdict.INCONSISTENT,
        *[Verdict.UNPARSEABLE] * 5,
    ]
    assert accuracy(verdicts) == pytest.approx(0.6)
    assert verdict_counts(verdicts) == {
        "first": 2,
        "second": 1,
        "tie": 1,
        "inconsistent": 1,
        "unparseable": 5,
    }


def test_accuracy_without_a_judgement_is_none_never_zero() -> None:
    assert accuracy([]) is None
    assert accuracy([Verdict.UNPARSEABLE]) is None
    assert load_judge(None) is None


def test_the_oracle_prefers_the_better_answer_in_either_place() -> None:
    query = Query("q", (Message("user", "What does the bee eat?"),))
    good = "I am glad you asked me! A few plain words will be enough. The bee eats nectar."
    bad = "Brick brick brick."
    judge = OracleJudge()
    assert judge.score(query, good) > judge.score(query, bad)
    pairs = [Pair(query, good, bad), Pair(query, bad, good), Pair(query, bad, bad)]
    verdicts = [j.verdict for j in judge.compare_all(pairs)]
    assert verdicts == [Verdict.FIRST, Verdict.SECOND, Verdict.TIE]
    assert judge.score_all([(query, good)]) == [judge.score(query, good)]


def test_on_policyness_averages_probabilities_not_logs() -> None:
    assert on_policyness(np.log([0.5, 1.0])) == pytest.approx(0.75)


def test_steering_gap_by_hand() -> None:
    """Good: mean(−1+3, −2+2) = 1; bad: mean(−1+2, −1+4) = 2."""
    gap = steering_gap(
        {
            "good/good": np.array([-1.0, -2.0]),
            "bad/good": np.array([-3.0, -2.0]),
            "bad/bad": np.array([-1.0, -1.0]),
            "good/bad": np.array([-2.0, -4.0]),
        }
    )
    assert gap == {"good": 1.0, "bad": 2.0}


def test_quality_of_two_pairs_by_hand() -> None:
    """Means per token: good −1, −2; bad −2, −1. Characters: good 2, 4; bad 6, 8."""
    query = (Message("user", "What does the bee eat?"),)
    triples = [
        Triple("a", query, None, {"good": "xx", "bad": "x" * 6}),
        Triple("b", query, None, {"good": "xxxx", "bad": "x" * 8}),
    ]
    sums = {"plain/good": np.array([-4.0, -4.0]), "plain/bad": np.array([-4.0, -8.0])}
    lengths = {"plain/good": np.array([4, 2]), "plain/bad": np.array([2, 8])}
    found = quality(triples, sums, lengths, None)
    expected = (math.exp(-1) + math.exp(-2)) / 2
    assert found["on_policyness"]["chosen"] == pytest.approx(expected)
    assert found["on_policyness"]["rejected"] == pytest.approx(expected)
    assert found["on_policyness"]["both"] == pytest.approx(expected)
    assert found["logps"] == {"chosen": -4.0, "rejected": -6.0}
    assert found["tokens"] == {"chosen": 3.0, "rejected": 5.0}
    assert found["longer_chosen"] == 0.5
    assert found["characters"] == {"chosen": 3.0, "rejected": 7.0}
    assert found["accuracy"] is None
    assert found["verdicts"] is None
    assert found["steering_gap"] is None


def test_the_interval_covers_about_as_often_as_it_says() -> None:
    """200 samples of 40 normal values: 95 % ± a few must cover the true mean 0."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        mean, low, high = mean_interval(list(rng.normal(size=40)), rng, 300)
        assert low is not None
        assert high is not None
        assert low <= mean <= high
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_is_reproducible_and_guards_tiny_samples() -> None:
    values = [0.1, 0.5, 0.9]
    first = mean_interval(values, np.random.default_rng(3))
    assert first == mean_interval(values, np.random.default_rng(3))
    alone = mean_interval([0.5], np.random.default_rng(0))
    assert alone == (0.5, None, None), "NaN would be no JSON"
    assert not above(alone, 0)
    assert above((0.5, 0.1, 0.9), 0)
    assert not above((0.5, -0.1, 0.9), 0)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([], np.random.default_rng(0))


def test_a_statistics_interval_leaves_undefined_resamples_out() -> None:
    values = np.array([0.0, 1.0, 1.0, 1.0])

    def share_of_ones_among_mixed(rows: np.ndarray) -> float:
        return float(values[rows].mean()) if 0 < values[rows].sum() < len(rows) else math.nan

    value, low, high = statistic_interval(
        share_of_ones_among_mixed, 4, np.random.default_rng(0), 500
    )
    assert value == 0.75
    assert (low, high) == (0.25, 0.75)  # all ones and all zeros are undefined
