from typing import Any

import numpy as np
import pytest

from selfsteer.config import Hygiene
from selfsteer.records import Message, Triple
from selfsteer.stages.filter import FILTER_SEQUENCES, clean, steering_filter, strip_lead_in


def means(*rows: tuple[float, float, float, float, float, float]) -> dict[str, np.ndarray]:
    """Columns: m(y+|x+), m(y+|x), m(y+|x-), m(y-|x-), m(y-|x), m(y-|x+)."""
    return {
        name: np.array(column)
        for name, column in zip(FILTER_SEQUENCES, zip(*rows, strict=True), strict=True)
    }


def test_columns_are_response_given_context() -> None:
    """Names are context/response: y+ under good, plain, bad, then y- under bad, plain, good."""
    assert FILTER_SEQUENCES == (
        "good/good",
        "plain/good",
        "bad/good",
        "bad/bad",
        "plain/bad",
        "good/bad",
    )


ORDERED = (-1.0, -2.0, -3.0, -1.0, -2.0, -3.0)


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (ORDERED, True),
        ((-2.0, -1.0, -3.0, -1.0, -2.0, -3.0), False),  # y+ likelier without its principle
        ((-1.0, -3.0, -2.0, -1.0, -2.0, -3.0), False),  # y+ likelier under the bad one
        ((-1.0, -2.0, -3.0, -2.0, -1.0, -3.0), False),
        ((-1.0, -2.0, -3.0, -1.0, -3.0, -2.0), False),
        ((-2.0, -2.0, -3.0, -1.0, -2.0, -3.0), False),  # equal is not above
        ((-1.0, -2.0, -2.0, -1.0, -2.0, -3.0), False),
        ((-1.0, -2.0, -3.0, -2.0, -2.0, -3.0), False),
        ((-1.0, -2.0, -3.0, -1.0, -2.0, -2.0), False),
    ],
)
def test_order_of_contexts_is_strict(row: Any, kept: bool) -> None:
    """Beside it a row with the smallest gaps, so that the last step can keep the row in question.

    The pair has equal plain means; gaps 2 beat the mean of 2 and 0.2.
    """
    small = (-1.9, -2.0, -2.1, -1.9, -2.0, -2.1)
    keep, counts = steering_filter(means(row, small))
    assert keep[0] == kept
    assert counts["steering_order"] == (0 if kept else 1)


def test_each_steps_means_are_over_what_the_step_before_kept() -> None:
    """Six triples, worked by hand.

    0 breaks the order (its plain means, -0.2, would raise the bounds if they counted).
    1-5 remain: m(y+|x) = -1, -2, -3, -3, -6, mean -3; m(y-|x) = -4, -4, -4, -4, -9, mean -5.
    5 falls below both means; 3 and 4, exactly at the mean, stay. (With 0 the means would be -2.53
    and -4.2: 3 and 4 would go. Were the bound strict they would go too.)
    1-4 remain: good gaps 4, 1, 4, 1, mean 2.5; bad gaps 2, 6, 4, 4, mean 4.
    1: 4 > 2.5 but 2 < 4; 2: 1 < 2.5; 3: 4 > 2.5 but 4 is not above 4; 4: 1 < 2.5. None is kept,
    unless 3's bad gap is a little larger: 4.4 > 4.1.
    (Triple 5's gaps, 40, would raise both means above all others if they counted.)
    """

    def row(plain_good: float, gap_good: float, plain_bad: float, gap_bad: float) -> Any:
        return (
            plain_good + gap_good / 2,
            plain_good,
            plain_good - gap_good / 2,
            plain_bad + gap_bad / 2,
            plain_bad,
            plain_bad - gap_bad / 2,
        )

    rows = [
        (-9.0, -0.2, -0.1, -9.0, -0.2, -0.1),
        row(-1, 4, -4, 2),
        row(-2, 1, -4, 6),
        row(-3, 4, -4, 4),
        row(-3, 1, -4, 4),
        row(-6, 40, -9, 40),
    ]
    keep, counts = steering_filter(means(*rows))
    assert keep.tolist() == [False] * 6
    assert counts == {"steering_order": 1, "off_policy": 1, "small_gap": 4}
    rows[3] = row(-3, 4, -4, 4.4)
    keep, counts = steering_filter(means(*rows))
    assert keep.tolist() == [False, False, False, True, False, False]
    assert counts == {"steering_order": 1, "off_policy": 1, "small_gap": 3}


def test_both_responses_must_be_near_the_policy() -> None:
    """Plain means -1, -3 and -3, -1: each triple is below one of the means (-2, -2)."""
    rows = [(0.0, -1.0, -2.0, -2.0, -3.0, -4.0), (-2.0, -3.0, -4.0, 0.0, -1.0, -2.0)]
    keep, counts = steering_filter(means(*rows))
    assert not keep.any()
    assert counts == {"steering_order": 0, "off_policy": 2, "small_gap": 0}


def test_the_filter_of_nothing_keeps_nothing_and_warns_of_nothing() -> None:
    empty = {name: np.zeros(0) for name in FILTER_SEQUENCES}
    keep, counts = steering_filter(empty)
    assert keep.shape == (0,)
    assert set(counts.values()) == {0}
    keep, counts = steering_filter(means((-3.0, -2.0, -1.0, -3.0, -2.0, -1.0)))
    assert keep.tolist() == [False]
    assert counts == {"steering_order": 1, "off_policy": 0, "small_gap": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Helpful response: The sky is blue.", "The sky is blue."),
        ("Helpful and accurate response: The sky.", "The sky."),
        ("helpful, accurate and concise answer: The sky.", "The sky."),
        ("**Good response:** The sky.", "The sky."),
        ("# Unhelpful reply: No.", "No."),
        ('Bad answer: "No."', 'No."'),
        ("Here is a helpful response: The sky.", "The sky."),
        ("An inaccurate response: The sky is green.", "The sky is green."),
        ("[Safe response]: I will not.", "I will not."),
        ("Good Response:\n\nThe sky.", "The sky."),
    ],
)
def test_lead_ins_that_leak_the_principle_are_cut(text: str, expected: str) -> None:
    assert strip_lead_in(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "A helpful person answers: me.",
        "The response: yes.",
        "Good morning: the sky is blue.",
        "Response to a good question: yes.",
        "The sky is blue. Helpful response: yes.",
        "A good answer needs thought.",
        "Goodness response: no.",
        "Paris.",
        "",
    ],
)
def test_other_beginnings_stay(text: str) -> None:
    assert strip_lead_in(text) == text


def triple(number: int, **responses: str) -> Triple:
    return Triple(f"t{number}", (Message("user", "Hi"),), None, responses)


def test_clean_counts_the_first_reason_that_applies() -> None:
    triples = [
        triple(0, plain="plain text", good="good text", bad="bad text"),
        triple(1, plain="plain text", good=" \n", bad="bad text"),
        triple(2, plain="", good="good text", bad="bad text"),
        triple(3, plain="plain text", good="short", bad="bad text"),
        triple(4, plain="plain text", good="same text", bad="same text"),
        triple(5, plain="plain text", good="plain text", bad="bad text"),
        triple(6, plain="plain text", good="good text", bad="plain text"),
        triple(7, plain="same text", good="same text", bad="same text"),
        triple(8, plain="", good="", bad=""),
        triple(9, good="good text", bad="bad text"),
    ]
    kept, dropped, stripped = clean(triples, Hygiene(min_chars=8))
    assert [t.id for t in kept] == ["t0", "t9"]
    assert dropped == {"empty": 3, "too_short": 1, "good_equals_bad": 2, "equals_plain": 2}
    assert stripped == 0
    assert len(triples) == len(kept) + dropped.total()


def test_a_bound_of_zero_or_one_keeps_the_shortest_answers() -> None:
    short = [triple(0, plain="C", good="A", bad="B")]
    assert clean(short, Hygiene())[0] == short
    assert clean(short, Hygiene(min_chars=0))[0] == short
    assert clean(short, Hygiene(min_chars=2))[1] == {"too_short": 1}


def test_cleaning_looks_at_texts_without_their_lead_ins() -> None:
    triples = [
        triple(0, plain="Grass.", good="Helpful response: Honey.", bad="Rude answer: Bricks."),
        triple(1, plain="Grass.", good="Good response: Honey.", bad="Bad response: Honey."),
        triple(2, plain="Grass.", good="Good response:", bad="Bricks."),
    ]
    kept, dropped, stripped = clean(triples, Hygiene())
    assert [dict(t.responses) for t in kept] == [
        {"plain": "Grass.", "good": "Honey.", "bad": "Bricks."}
    ]
    assert dropped == {"good_equals_bad": 1, "empty": 1}
    assert stripped == 5
    kept, dropped, stripped = clean(triples, Hygiene(strip_lead_ins=False))
    assert kept == triples
    assert (dropped.total(), stripped) == (0, 0)
