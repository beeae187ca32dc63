import random
from collections import Counter
from pathlib import Path

import pytest
import yaml

from selfsteer.data.records import Message, Query
from selfsteer.engines.base import PROMPT_TOO_LONG, REQUEST_FAILED
from selfsteer.errors import ConfigError
from selfsteer.principles.catalogue import BUILT_IN, Catalogue, Feature
from selfsteer.principles.writer import (
    EXAMPLES,
    MAX_GUIDELINE_CHARS,
    Outcome,
    complete_features,
    contrast,
    feature_answer,
    feature_prompt,
    overlap,
    parse_features,
    parse_principles,
    picked,
    principle_answer,
    principle_prompt,
    read_answer,
    specimen,
    written,
)
from selfsteer.recipe.sections import PrinciplesConfig

QUERY = Query("q", (Message("system", "Be a bear."), Message("user", "What do bees eat?")))
CHOOSABLE = BUILT_IN.choosable
NEVER = BUILT_IN.appending({"Concision": 0.0})
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
    features = BUILT_IN.ordered(tuple({name, "Safety"}))
    assert parse_features(feature_answer(features)) == features


def test_surplus_features_are_cut_and_missing_ones_filled() -> None:
    rng = random.Random(0)
    chosen = ("Logicality", "Accuracy", "Engagement")
    assert complete_features(chosen, 2, rng, NEVER) == ("Logicality", "Accuracy")
    assert complete_features(chosen[:2], 2, rng, NEVER) == ("Logicality", "Accuracy")
    for _ in range(50):
        found = complete_features(("Accuracy",), 3, rng, NEVER)
        assert "Accuracy" in found
        assert len(set(found)) == 3
        assert set(found) <= set(CHOOSABLE)
        assert found == BUILT_IN.ordered(found)
    assert complete_features((), 7, rng, NEVER) == CHOOSABLE


def test_missing_features_are_filled_evenly() -> None:
    """6 others share 6000 fills: 1000 each, standard deviation 29."""
    rng = random.Random(1)
    filled = Counter(
        f
        for _ in range(6000)
        for f in complete_features(("Accuracy",), 2, rng, NEVER)
        if f != "Accuracy"
    )
    assert len(filled) == 6
    assert all(abs(n - 1000) < 130 for n in filled.values())


def test_concision_is_appended_with_its_probability() -> None:
    """20 % of 5000 is 1000, standard deviation 28."""
    rng = random.Random(2)
    found = [complete_features(("Accuracy", "Safety"), 2, rng) for _ in range(5000)]
    with_it = [f for f in found if "Concision" in f]
    assert abs(len(with_it) - 1000) < 130
    assert set(with_it) == {("Safety", "Accuracy", "Concision")}
    assert "Concision" not in complete_features((), 7, rng, NEVER)
    assert "Concision" in complete_features((), 7, rng, BUILT_IN.appending({"Concision": 1.0}))


def test_chance_comes_only_from_the_given_generator() -> None:
    def draw(seed: int) -> list[tuple[str, ...]]:
        rng = random.Random(seed)
        return [complete_features((), 2, rng) for _ in range(20)]

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
        feature = BUILT_IN[name]
        assert feature.good in found.good
        assert feature.bad in found.bad
        assert feature.bad not in found.good
    assert "safe, accurate and concise." in found.good
    assert "harmful, inaccurate and wordy." in found.bad


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match="'Kindness'"):
        picked(("Kindness",))


# -- what makes a pair usable --------------------------------------------------------------------


def answer(good: str, bad: str, reason: str = "stop") -> tuple[str, str]:
    return principle_answer(good, bad), reason


SHARED = " ".join(f"w{i}" for i in range(1, 18))


@pytest.mark.parametrize(
    ("good", "bad", "outcome"),
    [
        ("Be right.", "Be wrong.", Outcome.OK),
        ("Be right.", "Be: RIGHT!", Outcome.IDENTICAL),
        (f"{SHARED} yes", f"{SHARED} no", Outcome.OK),  # 17 of 19 words are common: 0.895
        (f"{SHARED} w18 yes", f"{SHARED} w18 no", Outcome.NEAR_IDENTICAL),  # 18 of 20: 0.9
        ("Be kind.", "Be kind of rude, and show", Outcome.UNBALANCED),  # 8 and 25 characters
        ("Be kind.", "Be kind of rude and show", Outcome.OK),  # 8 and 24
        ("\u77ed\u304f", "\u9577\u304f", Outcome.OK),
    ],
)
def test_a_pair_is_contrastive_and_of_similar_length(good: str, bad: str, outcome: Outcome) -> None:
    assert contrast(good, bad) is outcome
    assert contrast(bad, good) is outcome


def test_overlap_is_the_jaccard_similarity_of_words() -> None:
    assert overlap("a b c d", "A, b! c e") == 3 / 5
    assert overlap("a a a", "a") == 1
    assert overlap("", "") == 0
    # a script without spaces: one word a character
    assert overlap("\u77ed\u3044", "\u9577\u3044") == 1 / 3


def test_answers_that_were_not_finished_or_not_asked_say_so() -> None:
    assert read_answer(*answer("Be right.", "Be wro", "length")) == (Outcome.UNFINISHED, "", "")
    assert read_answer("", PROMPT_TOO_LONG) == (Outcome.PROMPT_TOO_LONG, "", "")
    failed = read_answer("", f"{REQUEST_FAILED}:timeout")
    assert failed == (Outcome.REQUEST_FAILED, "", "")
    assert read_answer(*answer("Be right.", "Be wrong.")) == (Outcome.OK, "Be right.", "Be wrong.")


def test_texts_copied_from_a_shown_example_are_leaks() -> None:
    """Eight words in a row; only of examples that were shown."""
    stolen = EXAMPLES[1].bad.split()
    eight = f"Please {' '.join(stolen[2:10])}"
    seven = f"Please {' '.join(stolen[2:9])}"
    plain = "Write with care and check what was written."
    assert read_answer(*answer(plain, eight), 2)[0] is Outcome.LEAKS_EXAMPLE
    assert read_answer(*answer(eight, plain), 2)[0] is Outcome.LEAKS_EXAMPLE
    assert read_answer(*answer(plain, eight), 1)[0] is Outcome.OK
    assert read_answer(*answer(plain, seven), 2)[0] is Outcome.OK


def test_the_examples_are_themselves_usable() -> None:
    for example in EXAMPLES:
        assert contrast(example.good, example.bad) is Outcome.OK
        assert overlap(example.good, example.bad) < 0.6


def test_examples_are_turns_before_the_question() -> None:
    plain = principle_prompt(QUERY, ("Accuracy",))
    turns = principle_prompt(QUERY, ("Accuracy",), examples=2)
    assert turns[-1:] == plain
    assert [t.role for t in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert parse_principles(turns[3].content) == (Outcome.OK, EXAMPLES[1].good, EXAMPLES[1].bad)
    assert EXAMPLES[1].adjectives[0] in turns[2].content
    assert [len(principle_prompt(QUERY, (), examples=n)) for n in range(4)] == [1, 3, 5, 7]


def test_from_the_query_alone_no_feature_is_named() -> None:
    for turn in principle_prompt(QUERY, (), examples=3):
        if turn.role == "user":
            for name in BUILT_IN.words:
                assert f"an answer that is {name}" not in turn.content
    (turn,) = principle_prompt(QUERY, ())
    assert "What do bees eat?" in turn.content
    assert "accurate" not in turn.content


def test_the_prompts_that_the_shipped_model_knows_do_not_change() -> None:
    (asked,) = principle_prompt(QUERY, ("Accuracy",))
    assert asked.content == (
        "Write two short guidelines for answering the query below, alike in structure and length. "
        "The good one asks for an answer that is accurate, the bad one for an answer that is "
        "inaccurate. Do not answer the query.\n\nQuery: What do bees eat?\n\n"
        "Format:\nGood: guideline\nBad: guideline"
    )
    (named,) = feature_prompt(QUERY, 2)
    assert named.content == (
        "Name the 2 qualities that matter most in an answer to the query below. Choose from "
        "Safety, Logicality, Comprehensiveness, Helpfulness, Literariness, Accuracy, Engagement. "
        "Answer with the names only.\n\nQuery: What do bees eat?"
    )


# -- another catalogue ---------------------------------------------------------------------------


def feature(name: str, weight: float = 1.0) -> Feature:
    return Feature(
        name=name,
        good_adjective=f"{name} good",
        bad_adjective=f"{name} bad",
        good=f"Do {name}.",
        bad=f"Avoid {name}.",
        weight=weight,
    )


BANK = Catalogue(
    domain="retail banking",
    features=(feature("Brand"), feature("Brand voice", 3.0), feature("Fees"), feature("Tone")),
    appended={"Tone": 0.5},
)


def test_a_catalogue_of_ones_own_is_what_the_prompts_list() -> None:
    (asked,) = feature_prompt(QUERY, 1, BANK)
    assert "Choose from Brand, Brand voice, Fees. " in asked.content
    assert "The domain is retail banking. " in asked.content
    assert parse_features("fees; BRAND VOICE, Tone, Brands", BANK) == ("Fees", "Brand voice")
    german = BANK.model_copy(update={"language": "German"})
    assert "in German" in principle_prompt(QUERY, ("Fees",), german)[0].content
    assert "in German" not in principle_prompt(QUERY, ("Fees",), BANK)[0].content


def test_weights_say_how_often_a_missing_feature_is_drawn() -> None:
    """Weight 3 of 5 draws 3000 of 5000, standard deviation 35; so does the second draw add up."""
    rng = random.Random(3)
    quiet = BANK.appending({"Tone": 0.0})
    drawn = Counter(complete_features((), 1, rng, quiet)[0] for _ in range(5000))
    assert abs(drawn["Brand voice"] - 3000) < 160
    assert abs(drawn["Fees"] - 1000) < 130
    assert complete_features((), 3, rng, quiet) == ("Brand", "Brand voice", "Fees")
    both = Counter(complete_features(("Fees",), 2, rng, quiet) for _ in range(4000))
    assert abs(both["Brand voice", "Fees"] - 3000) < 130


def test_each_appended_feature_has_its_own_probability() -> None:
    rng = random.Random(4)
    more = BANK.appending({"Fees": 0.1})
    assert more.choosable == ("Brand", "Brand voice")
    drawn = [complete_features(("Brand",), 1, rng, more) for _ in range(4000)]
    assert abs(sum("Tone" in d for d in drawn) - 2000) < 150
    assert abs(sum("Fees" in d for d in drawn) - 400) < 90


def test_a_specimen_is_whatever_the_recipe_can_show(tmp_path: Path) -> None:
    path = tmp_path / "bank.yaml"
    path.write_text(yaml.safe_dump(BANK.model_dump(mode="json")))
    assert specimen(PrinciplesConfig()) == picked(("Helpfulness", "Accuracy"))
    assert specimen(PrinciplesConfig(), ("Safety",)) == picked(("Safety",))
    mine = PrinciplesConfig(catalogue=str(path))
    assert specimen(mine) == picked(("Brand", "Brand voice"), BANK)
    fixed = PrinciplesConfig(mode="fixed", good="Be kind.", bad="Be rude.")
    assert (specimen(fixed).good, specimen(fixed).bad) == ("Be kind.", "Be rude.")


def test_a_gap_of_any_length_is_read() -> None:
    """A model that falls into line ends: the time must not grow with their square or cube."""
    gap = "\n" * 20_000
    found = parse_principles(f"Sure.{gap}**Good:**{gap}* Be kind.{gap}And clear.{gap}Bad: Be rude.")
    assert found == (Outcome.OK, "Be kind. And clear.", "Be rude.")


def test_words_of_scripts_without_spaces_are_characters() -> None:
    """Else two Thai guidelines that differ in one word would share none."""
    assert overlap("ใช้คำน้อย", "ใช้คำมาก") > 0.3
    assert contrast("ใช้คำน้อย", "ใช้คำน้อย!") is Outcome.IDENTICAL


def test_the_order_in_which_features_are_appended_means_nothing() -> None:
    """A fingerprint sorts keys, so the order of a mapping must not change a result."""
    chances = {"Concision": 0.5, "Literariness": 0.5, "Engagement": 0.5}
    orders = (chances, dict(reversed(chances.items())))
    drawn = [
        [complete_features((), 2, random.Random(i), BUILT_IN.appending(order)) for i in range(50)]
        for order in orders
    ]
    assert drawn[0] == drawn[1]
