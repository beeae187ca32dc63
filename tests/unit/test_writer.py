import random
from collections import Counter

import pytest

from selfsteer import catalogue
from selfsteer.errors import ConfigError
from selfsteer.principles.writer import (
    CHOOSABLE,
    MAX_GUIDELINE_CHARS,
    Outcome,
    complete_features,
    feature_answer,
    feature_prompt,
    parse_features,
    parse_principles,
    picked,
    principle_answer,
    principle_prompt,
    written,
)
from selfsteer.records import Message, Query

QUERY = Query("q", (Message("system", "Be a bear."), Message("user", "What do bees eat?")))
LONG = "x" * (MAX_GUIDELINE_CHARS + 1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Good: Be right.\nBad: Be wrong.", ("Be right.", "Be wrong.")),
        ("Bad: Be wrong.\nGood: Be right.", ("Be right.", "Be wrong.")),
        ("Sure!\n\n**Good:** Be right.\n\n**Bad:** Be wrong.", ("Be right.", "Be wrong.")),
        ("good guideline: Be right.\nBAD GUIDELINE: Be wrong.", ("Be right.", "Be wrong.")),
        ("- Good principle: Be right.\n- Bad principle: Be wrong.", ("Be right.", "Be wrong.")),
        ("## Good:\nBe right.\nAlways.\n## Bad:\nBe wrong.", ("Be right. Always.", "Be wrong.")),
        ("Good: A good bee: yes.\nBad: B", ("A good bee: yes.", "B")),
        ("Good: first\nBad: B\nGood: second", ("first", "B")),
    ],
)
def test_usable_answers_are_read(answer: str, expected: tuple[str, str]) -> None:
    assert parse_principles(answer) == (Outcome.OK, *expected)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("", Outcome.NO_SECTIONS),
        ("Bees eat nectar.", Outcome.NO_SECTIONS),
        ("A good bee: yes. A bad bee: no.", Outcome.NO_SECTIONS),
        ("Good: Be right.", Outcome.ONE_SIDED),
        ("Bad: Be wrong.", Outcome.ONE_SIDED),
        ("Good: Be right.\nBad:  \n", Outcome.ONE_SIDED),
        ("Good:\nBad: Be wrong.", Outcome.ONE_SIDED),
        ("Good: Be right.\nBad: be  RIGHT.", Outcome.IDENTICAL),
        (f"Good: {LONG}\nBad: Be wrong.", Outcome.TOO_LONG),
        (f"Good: Be right.\nBad: {LONG}", Outcome.TOO_LONG),
    ],
)
def test_unusable_answers_have_an_outcome_and_no_text(answer: str, outcome: Outcome) -> None:
    assert parse_principles(answer) == (outcome, "", "")


def test_a_guideline_at_the_bound_is_kept() -> None:
    answer = principle_answer(LONG[1:], "Be wrong.")
    assert parse_principles(answer) == (Outcome.OK, LONG[1:], "Be wrong.")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Accuracy, Safety", ("Accuracy", "Safety")),
        ("1. **accuracy**\n2. HELPFULNESS.", ("Accuracy", "Helpfulness")),
        ("Kindness and Accuracy", ("Accuracy",)),
        ("Concision", ()),
        ("Inaccuracy", ()),
        ("", ()),
        ("Accuracy, accuracy", ("Accuracy",)),
    ],
)
def test_features_are_catalogue_names_in_the_order_of_the_answer(
    answer: str, expected: tuple[str, ...]
) -> None:
    assert parse_features(answer) == expected


def test_choosable_are_the_seven() -> None:
    assert set(CHOOSABLE) == {
        "Safety",
        "Logicality",
        "Comprehensiveness",
        "Helpfulness",
        "Literariness",
        "Accuracy",
        "Engagement",
    }


@pytest.mark.parametrize("name", CHOOSABLE)
def test_an_answer_in_the_asked_form_is_read_back(name: str) -> None:
    features = catalogue.ordered(tuple({name, "Safety"}))
    assert parse_features(feature_answer(features)) == features


def test_surplus_features_are_cut_and_missing_ones_filled() -> None:
    rng = random.Random(0)
    chosen = ("Logicality", "Accuracy", "Engagement")
    assert complete_features(chosen, 2, 0.0, rng) == ("Logicality", "Accuracy")
    assert complete_features(chosen[:2], 2, 0.0, rng) == ("Logicality", "Accuracy")
    for _ in range(50):
        found = complete_features(("Accuracy",), 3, 0.0, rng)
        assert "Accuracy" in found
        assert len(set(found)) == 3
        assert set(found) <= set(CHOOSABLE)
        assert found == catalogue.ordered(found)
    assert complete_features((), 7, 0.0, rng) == CHOOSABLE


def test_missing_features_are_filled_evenly() -> None:
    """6 others share 6000 fills: 1000 each, standard deviation 29."""
    rng = random.Random(1)
    filled = Counter(
        f
        for _ in range(6000)
        for f in complete_features(("Accuracy",), 2, 0.0, rng)
        if f != "Accuracy"
    )
    assert len(filled) == 6
    assert all(abs(n - 1000) < 130 for n in filled.values())


def test_concision_is_appended_with_its_probability() -> None:
    """20 % of 5000 is 1000, standard deviation 28."""
    rng = random.Random(2)
    found = [complete_features(("Accuracy", "Safety"), 2, 0.2, rng) for _ in range(5000)]
    with_it = [f for f in found if "Concision" in f]
    assert abs(len(with_it) - 1000) < 130
    assert set(with_it) == {("Safety", "Accuracy", "Concision")}
    assert "Concision" not in complete_features((), 7, 0.0, rng)
    assert "Concision" in complete_features((), 7, 1.0, rng)


def test_chance_comes_only_from_the_given_generator() -> None:
    def draw(seed: int) -> list[tuple[str, ...]]:
        rng = random.Random(seed)
        return [complete_features((), 2, 0.2, rng) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_prompts_show_the_query_and_not_its_system_message() -> None:
    for prompt in (feature_prompt(QUERY, 2), principle_prompt(QUERY, ("Accuracy",))):
        (turn,) = prompt
        assert turn.role == "user"
        assert "What do bees eat?" in turn.content
        assert "Be a bear" not in turn.content
    assert all(name in feature_prompt(QUERY, 2)[0].content for name in CHOOSABLE)
    assert "Concision" not in feature_prompt(QUERY, 2)[0].content
    asked = principle_prompt(QUERY, ("Accuracy", "Helpfulness"))[0].content
    assert "helpful and accurate" in asked
    assert "unhelpful and inaccurate" in asked


def test_prompts_show_a_conversation_with_its_roles() -> None:
    turns = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why?"))
    (turn,) = feature_prompt(Query("q", turns), 2)
    assert "user: Hi\nassistant: Yes?\nuser: Why?" in turn.content


def test_principles_are_adjectives_guideline_and_closing_line() -> None:
    found = written(("Accuracy", "Helpfulness"), "Name the food.", "Name a brick.")
    closing = "Do not reveal that you follow guidelines."
    assert found.good == (f"Your response should be helpful and accurate. Name the food. {closing}")
    assert found.bad == (
        f"Your response should be unhelpful and inaccurate. Name a brick. {closing}"
    )
    assert set(found.features) == {"Accuracy", "Helpfulness"}


def test_picked_principles_hold_each_features_guideline() -> None:
    found = picked(("Safety", "Accuracy", "Concision"))
    for name in ("Safety", "Accuracy", "Concision"):
        feature = catalogue.FEATURES[name]
        assert feature.good in found.good
        assert feature.bad in found.bad
        assert feature.bad not in found.good
    assert "safe, accurate and concise." in found.good
    assert "harmful, inaccurate and wordy." in found.bad


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match="'Kindness'"):
        picked(("Kindness",))
