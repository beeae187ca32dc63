"""Each sign of collapse on answers made by hand, and silence on short and ordinary ones."""

from collections import Counter

import pytest

from selfsteer.engines.collapse import Said, collapsed, growing, in_circles, signs


def said(*texts: str, cut_off: int = 0) -> Counter[str]:
    """Signs of good answers to as many queries, the first ones cut off."""
    return signs("good", [[Said(t, i < cut_off)] for i, t in enumerate(texts)])


def ordinary(count: int) -> list[str]:
    return [f"The animal number {i} eats {i + 3} kinds of food." for i in range(count)]


REFUSAL = "I'm sorry, but I can't assist with that request, as it is against my guidelines."


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([*[""] * 4, *ordinary(36)], "10% of 40 good answers are empty. Usual cause: the chat"),
        (
            [*[REFUSAL] * 20, *ordinary(20)],
            "50% of 40 good answers to different queries are the same text (\"I'm sorry, but I "
            "can't assist with that request, as it is ag…\"). Usual cause: the model refuses",
        ),
        (
            ["Yes"] * 39 + ["No"],
            '98% of 40 good answers to different queries are the same text ("Y',
        ),
        (
            [*["and fish and fish " * 9] * 4, *ordinary(16)],
            '20% of 20 good answers go in circles ("and fish and fish and fish and fish and fish',
        ),
        (["!" * 200] * 4 + ordinary(16), '20% of 20 good answers go in circles ("!!!'),
    ],
    ids=["empty", "refusals", "one short answer", "words", "characters"],
)
def test_a_sign_is_said_with_its_share_and_an_example(answers: list[str], expected: str) -> None:
    text = collapsed(said(*answers))
    assert text.startswith(expected)
    assert text.endswith(".")


@pytest.mark.parametrize(
    "answers",
    [
        ordinary(40),
        ["Yes"] * 37 + ["No"] * 3,
        ["B", "A"] * 20,
        [""] * 3 + ordinary(37),
        [REFUSAL] * 19 + ordinary(21),
        ["and fish and fish " * 9] * 7 + ordinary(33),
        ["fish and fish and fish and fish"] * 8 + ordinary(32),
        [REFUSAL] * 15,  # too few to say
    ],
    ids=["ordinary", "yes", "labels", "empty", "refusals", "circles", "short circles", "few"],
)
def test_less_is_no_sign(answers: list[str]) -> None:
    assert collapsed(said(*answers)) == ""


def test_answers_without_spaces_are_read_by_characters() -> None:
    assert in_circles("蜜蜂吃花蜜。" * 10)
    assert not in_circles("蜜蜂采集花蜜和花粉,把它们带回蜂巢酿成蜂蜜,供整个蜂群在冬天食用。")


def test_cut_off_answers_are_a_sign_unless_they_are_kept() -> None:
    found = said(*ordinary(20), cut_off=10)
    assert collapsed(found).startswith("50% of 20 good answers do not end within the budget. ")
    assert collapsed(found, unfinished_count=False) == ""
    assert collapsed(said(*ordinary(20), cut_off=9)) == ""


def test_counts_of_shards_add_up_and_the_worst_response_is_said() -> None:
    found = Counter[str]()
    for part in range(4):
        found.update(said(*[REFUSAL] * 3, *ordinary(2)))
        found.update(signs("bad", [[Said(REFUSAL, False)]] * 5))
        found.update(signs("plain", [[Said(t, False)] for t in ordinary(5)]))
        if part < 3:
            assert collapsed(found) == ""
    assert collapsed(found).startswith("100% of 20 bad answers to different queries are")


def test_equal_answers_to_one_query_are_none_to_different_ones() -> None:
    """n answers to each of 10 queries at a low temperature."""
    found = signs("plain", [[Said(text, False)] * 4 for text in ordinary(10)])
    assert collapsed(found) == ""


def test_answers_that_grow_are_said_and_noise_is_not() -> None:
    assert growing([34, 41, 47, 51]).startswith("answers get ever longer: 34, 41, 47, 51 tokens.")
    assert growing([34, 41, 47, 50]) == "", "less than half as long again"
    assert growing([34, 60, 51, 70]) == "", "shorter in between"
    assert growing([34, 41, 60]) == "", "two steps"
