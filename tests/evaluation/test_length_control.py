"""Length control on simulated verdicts whose true length effect is known."""

import numpy as np
import pytest

from selfsteer.evaluation.judged_sets import (
    Compared,
    LengthControlled,
    difficulties,
    length_controlled,
)

LENGTH, DIFFICULTY = 1.2, 0.8


def fit(
    compared: list[Compared], rng: np.random.Generator | None = None, resamples: int = 2000
) -> LengthControlled:
    """The fit with the questions' own difficulties, or without an instruction term."""
    known = [c.difficulty for c in compared if c.difficulty is not None]
    return length_controlled(compared, known, rng or np.random.default_rng(0), resamples)


def simulated(seed: int, model: float, *, shift: int = 300) -> tuple[list[Compared], float]:
    """800 verdicts of the published model, and their win rate at equal lengths.

    Hard questions get longer answers, as in life: without the instruction term, length would take
    the blame for them.
    """
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=800)
    rng.integers(1000, 2500, 800)  # the baseline's lengths: only differences count
    longer = (rng.normal(shift, 600, 800) + 200 * hard).astype(int)
    logit = model + LENGTH * np.tanh(longer / longer.std(ddof=1)) + DIFFICULTY * hard
    wins = (rng.random(800) < 1 / (1 + np.exp(-logit))).astype(float)
    compared = [
        Compared(win, more, easy) for win, more, easy in zip(wins, longer, hard, strict=True)
    ]
    return compared, float((1 / (1 + np.exp(-model - DIFFICULTY * hard))).mean())


@pytest.mark.parametrize("seed", range(5))
def test_a_known_length_effect_is_found_and_taken_out(seed: int) -> None:
    compared, truth = simulated(seed, -0.4)
    found = fit(compared, resamples=500)
    assert found.win_rate is not None
    value, low, high = found.win_rate
    assert low is not None
    assert high is not None
    assert low <= truth <= high
    assert found.length_effect is not None
    effect, least, most = found.length_effect
    assert least is not None
    assert most is not None
    assert least <= LENGTH <= most
    assert found.difficulty_effect == pytest.approx(DIFFICULTY, abs=0.25)
    raw = np.mean([c.win for c in compared])
    assert raw - truth > 0.05  # longer answers won more than they earned
    assert abs(value - truth) < raw - truth
    assert high - low < 0.1
    assert most - least < 0.8
    assert effect == pytest.approx(LENGTH, abs=0.4)


def test_the_unit_of_difficulty_does_not_matter() -> None:
    compared, _ = simulated(0, -0.4)
    plain = fit(compared, resamples=100)
    for scale, offset in ((200.0, 1500.0), (1e-3, 0.0)):
        other = [
            Compared(c.win, c.longer, scale * c.difficulty + offset)
            for c in compared
            if c.difficulty is not None
        ]
        found = fit(other, resamples=100)
        assert found.win_rate == pytest.approx(plain.win_rate, abs=1e-4)
        assert found.difficulty_effect is not None
        assert found.difficulty_effect * scale == pytest.approx(plain.difficulty_effect, abs=1e-3)


def test_most_intervals_hold_the_truth() -> None:
    hits = 0
    for seed in range(100, 120):
        compared, truth = simulated(seed, 0.3, shift=-200)
        found = fit(compared, resamples=200)
        assert found.win_rate is not None
        _, low, high = found.win_rate
        assert low is not None
        assert high is not None
        hits += low <= truth <= high
    assert hits >= 17  # 95 % of 20 are 19


def test_equal_lengths_give_back_the_raw_win_rate() -> None:
    wins = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5]
    compared = [Compared(w, 0, -0.1 * i) for i, w in enumerate(wins)]
    found = fit(compared)
    assert found.win_rate is not None
    assert found.win_rate[0] == np.mean(wins)
    assert list(found.values if found.values is not None else ()) == wins
    assert found.length_effect is None


def test_lengths_that_match_but_for_chance_give_nearly_the_raw_win_rate() -> None:
    rng = np.random.default_rng(3)
    compared = [Compared(float(rng.random() < 0.7), int(rng.integers(-9, 10))) for _ in range(800)]
    found = fit(compared, rng, 500)
    raw = float(np.mean([c.win for c in compared]))
    assert found.win_rate is not None
    assert found.win_rate[0] == pytest.approx(raw, abs=0.005)
    assert found.values is not None
    assert np.mean(found.values) == pytest.approx(found.win_rate[0], abs=1e-12)


def test_a_difference_that_is_always_the_same_cannot_be_told_from_the_model() -> None:
    compared = [Compared(float(i % 3 > 0), 50) for i in range(30)]
    found = fit(compared)
    assert found.length_effect is None
    assert found.win_rate is not None
    assert found.win_rate[0] == pytest.approx(2 / 3)


def test_verdicts_that_follow_length_alone_still_have_a_figure() -> None:
    compared = [Compared(float(i % 2), (1 if i % 2 else -1) * (50 + i)) for i in range(40)]
    found = fit(compared)
    assert found.length_effect is not None
    assert found.length_effect[0] > 3
    assert found.win_rate is not None
    assert found.win_rate[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("wins", [1, 9, 51, 60])
def test_too_few_wins_or_losses_say_nothing_of_length(wins: int) -> None:
    compared = [Compared(float(i < wins), i % 7) for i in range(60)]
    found = fit(compared)
    assert found.win_rate is None
    assert f"found {wins} and {60 - wins}" in found.reason


def test_the_instruction_term_needs_twice_as_many() -> None:
    rng = np.random.default_rng(0)
    for wins, used in ((19, False), (20, True)):
        compared = [
            Compared(float(i < wins), int(rng.integers(50)), float(rng.normal())) for i in range(60)
        ]
        found = fit(compared, rng, 100)
        assert found.length_effect is not None
        assert (found.difficulty_effect is not None) == used


def test_a_single_verdict_has_no_interval() -> None:
    found = fit([Compared(1.0, 4)])
    assert found.win_rate == (1.0, None, None)


def test_difficulty_is_how_the_others_fared() -> None:
    wins = {
        "mine": {"a": 1.0, "b": 0.0, "c": 1.0},
        "one": {"a": 1.0, "b": 0.0},
        "two": {"a": 1.0, "b": 0.0},
    }
    found = difficulties(wins, "mine")
    # log-odds of 2 wins of 2 with half a win and half a loss added: log(2.5 / 0.5)
    assert found == pytest.approx({"a": np.log(5), "b": -np.log(5), "c": 0.0})
    assert found == difficulties({**wins, "mine": dict.fromkeys("abc", 0.0)}, "mine")
    assert difficulties({"mine": wins["mine"]}, "mine") == {}


def test_the_instruction_term_of_other_models_takes_out_what_hard_questions_did() -> None:
    mine, _ = simulated(1, 0.0)
    rng = np.random.default_rng(5)
    others = {
        name: {
            str(i): float(rng.random() < 1 / (1 + np.exp(-2 * (c.difficulty or 0.0))))
            for i, c in enumerate(mine)
        }
        for name in ("one", "two", "three")
    }
    wins = {"mine": {str(i): c.win for i, c in enumerate(mine)}, **others}
    known = difficulties(wins, "mine")

    def effect(given: dict[str, float]) -> float:
        found = length_controlled(mine, list(given.values()), np.random.default_rng(0), 100)
        assert found.length_effect is not None
        return found.length_effect[0]

    without, with_others = effect({}), effect(known)
    assert abs(with_others - LENGTH) < abs(without - LENGTH)
