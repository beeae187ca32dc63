import math

import pytest

from selfsteer.evaluation.reward_quality import (
    ScoredPair,
    calibration,
    length_class,
    reward_quality,
    win,
)
from selfsteer.judges.stats import proportion_interval


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def pair(difference: float, source: str = "a", chosen: int = 10, rejected: int = 10) -> ScoredPair:
    return ScoredPair(source, 5.0 + difference, 5.0, chosen, rejected)


def test_a_tie_is_half_a_win() -> None:
    assert [win(x) for x in (0.1, 0.0, -0.1)] == [1.0, 0.5, 0.0]


def test_calibration_by_hand() -> None:
    """Five pairs in the bin [0.8, 0.85) at 0.82, four right; one wrong at 0.97.

    ECE = 5/6·|0.8 − 0.82| + 1/6·|0 − 0.97| = 0.01667 + 0.16167.
    """
    found = calibration([logit(0.82)] * 4 + [-logit(0.82), -logit(0.97)])
    assert found["ece"] == pytest.approx(0.1 / 6 + 0.97 / 6)
    by_count = {(round(b["from"], 2), b["pairs"]) for b in found["bins"] if b["pairs"]}
    assert by_count == {(0.8, 5), (0.95, 1)}
    (bin_80,) = [b for b in found["bins"] if b["pairs"] == 5]
    assert (bin_80["stated"], bin_80["right"]) == (pytest.approx(0.82), pytest.approx(0.8))
    assert len(found["bins"]) == 10


def test_an_honest_model_has_no_calibration_error_and_a_boasting_one_has() -> None:
    honest = [logit(0.75)] * 3 + [-logit(0.75)]
    assert calibration(honest)["ece"] == pytest.approx(0.0)
    assert calibration([10 * d for d in honest])["ece"] == pytest.approx(0.25, abs=1e-4)


def test_certainty_and_ties_have_their_bins() -> None:
    found = calibration([1000.0, 0.0])
    assert found["bins"][-1]["pairs"] == found["bins"][0]["pairs"] == 1
    assert found["bins"][0]["right"] == 0.5
    with pytest.raises(ValueError, match="one pair"):
        calibration([])


@pytest.mark.parametrize(
    ("chosen", "rejected", "name"),
    [
        (50, 100, "rejected much longer"),
        (80, 100, "rejected longer"),
        (96, 100, "similar"),
        (104, 100, "similar"),
        (120, 100, "chosen longer"),
        (150, 100, "chosen much longer"),
        (3, 0, "chosen much longer"),
    ],
)
def test_length_classes(chosen: int, rejected: int, name: str) -> None:
    assert length_class(chosen, rejected) == name


def test_figures_by_source_and_length() -> None:
    found = reward_quality(
        [pair(1.0), pair(-1.0, "b"), pair(2.0, "b", chosen=20), pair(0.0, "b", rejected=20)]
    )
    assert found["pairs"] == 4
    assert found["accuracy"][0] == pytest.approx(2.5 / 4)
    assert found["ties"] == 1
    assert found["mean_difference"] == pytest.approx(0.5)
    assert found["longer_is_chosen"][0] == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    sources = {k: (v["pairs"], v["accuracy"][0]) for k, v in found["by_source"].items()}
    assert sources == {"a": (1, 1.0), "b": (3, 0.5)}
    lengths = {k: (v["pairs"], v["accuracy"][0]) for k, v in found["by_length"].items()}
    assert lengths == {
        "rejected much longer": (1, 0.5),
        "similar": (2, 0.5),
        "chosen much longer": (1, 1.0),
    }
    assert reward_quality([]) == {"pairs": 0}


@pytest.mark.parametrize(
    ("successes", "size", "low", "high"),
    # Newcombe 1998, table I, method 3 (Wilson's score)
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_as_published(successes: int, size: int, low: float, high: float) -> None:
    found = proportion_interval(successes, size)
    assert found == (
        pytest.approx(successes / size),
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )
    with pytest.raises(ValueError, match="one value"):
        proportion_interval(0, 0)
