import random
import unicodedata

import numpy as np
import pytest
import regex

from selfsteer.data import curate
from selfsteer.data.records import Query
from selfsteer.errors import ConfigError
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import SCRIPTS, GrownQueries, Queries


def query(text: str, id_: str = "q", system: str | None = None) -> Query:
    return Query.from_dict({"id": id_, "prompt": text, "system": system})


def talk(*turns: str, id_: str = "q") -> Query:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    return Query.from_dict({"id": id_, "messages": messages})


def invented(count: int, rng: random.Random) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


# -- words and bounds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What's  UP,\n doc?", ["what", "s", "up", "doc"]),
        ("Straße, ﬁn", ["strasse", "fin"]),
        ("cafe\u0301 NAÏVE", ["café", "naïve"]),
        ("天気は hello世界", ["天", "気", "は", "hello", "世", "界"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("?!", []),
    ],
)
def test_words_are_folded(text: str, found: list[str]) -> None:
    assert curate.words(text) == found


@pytest.mark.parametrize(
    ("text", "scripts", "reason"),
    [
        ("Why is the sky blue?", ("Latin",), None),
        ("Why is the sky blue?", ("Cyrillic",), "other_script"),
        ("Почему небо голубое?", ("Latin",), "other_script"),
        ("Почему небо голубое?", ("Latin", "Cyrillic"), None),
        ("Explain café and naïveté", ("Latin",), None),
        ("What does 天気予報 mean in this text?", ("Latin",), None),
        ("abc абв", ("Latin",), None),  # exactly half
        ("abc абвг", ("Latin",), "other_script"),
        ("2 + 2 = ?", ("Latin",), None),
        ("なぜ空は青いの", ("Hiragana", "Han"), None),
    ],
)
def test_scripts_are_shares_of_letters(
    text: str, scripts: tuple[str, ...], reason: str | None
) -> None:
    assert curate.bounds(None, None, scripts)(query(text)) == reason


def test_lengths_count_the_user_turns_alone() -> None:
    check = curate.bounds(4, 6, None)
    found = [check(query(t, system="a long system message")) for t in ("abc", "abcd", "abcdefg")]
    assert found == ["too_short", None, "too_long"]
    assert check(talk("ab", "a long answer in between", "cd")) is None  # with the line end: 5


def test_every_known_script_is_one_of_unicode() -> None:
    for script in SCRIPTS:
        assert regex.compile(rf"\p{{Script={script}}}")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scripts": ["Latn"]}, "did you mean Latin"),
        ({"scripts": ["latin"]}, "did you mean Latin"),
        ({"min_chars": 9, "max_chars": 3}, "min_chars 9 exceeds max_chars 3"),
        ({"ngram": 5}, "ngram has no effect without 'against'"),
        ({"near_duplicates": 1.5}, "near_duplicates"),
        ({"near_duplicates": 0.01}, "near_duplicates: .*0.05"),
        ({"augment": {"to": 9, "depth": 0.9}}, "must add up to 1, found 1.5"),
        ({"augment": {"to": 9, "wide": 0.9}}, "unknown key"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(GrownQueries, {"path": "q.jsonl", **values}, "queries")


def test_evaluation_queries_refuse_what_they_have_no_use_for() -> None:
    for name, value in (("augment", {"to": 9}), ("per_iteration", 4)):
        with pytest.raises(ConfigError, match=f"unknown key '{name}'"):
            validate(Queries, {"path": "e.jsonl", name: value}, "evaluation.queries")


# -- duplicates ----------------------------------------------------------------------------------


def test_duplicates_are_told_from_those_in_other_case() -> None:
    seen = curate.Duplicates()
    texts = ["Name a fish.", "Name a fish.", "name  a FISH.\n", "Name a fish?"]
    found = [seen.add(query(t)) for t in texts]
    assert found == [None, "duplicate", "duplicate_but_case", None]
    assert seen.add(query("Name a fish.", system="Be brief.")) is None
    assert seen.add(talk("Name", "a", "fish.")) is None


def test_a_text_composed_in_another_way_is_a_duplicate() -> None:
    seen = curate.Duplicates()
    composed, apart = (unicodedata.normalize(form, "Où est le café ?") for form in ("NFC", "NFD"))
    assert composed != apart
    found = [seen.add(query(t)) for t in (composed, apart, apart.upper(), "Ou est le cafe ?")]
    assert found == [None, "duplicate_but_case", "duplicate_but_case", None]


def test_jaccard_by_hand() -> None:
    a, b = curate.shingles("one two three four five"), curate.shingles("One two three, four six")
    assert a == {"one two three", "two three four", "three four five"}
    assert curate.jaccard(a, b) == 0.5
    assert curate.shingles("Name fish") == {"name fish"}
    assert curate.shingles("?!") == {"?!"}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_miss_hardly_any_pair_at_the_threshold(threshold: float) -> None:
    count, rows = curate.bands(threshold)
    assert count * rows <= curate.PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** count >= curate.RECALL
    if rows < curate.PERMUTATIONS // 2:  # one row more, and it would
        fewer = curate.PERMUTATIONS // (rows + 1)
        assert 1 - (1 - threshold ** (rows + 1)) ** fewer < curate.RECALL


def test_near_duplicates_are_those_of_brute_force() -> None:
    """On 300 texts in families of edited copies: the same decisions, in order, as all pairs."""
    rng = random.Random(3)
    texts: list[list[str]] = []
    for _ in range(60):
        texts.append(invented(rng.randrange(6, 60), rng))
        for _ in range(4):
            copy = list(texts[-1])
            for _ in range(rng.randrange(4)):
                copy[rng.randrange(len(copy))] = invented(1, rng)[0]
            texts.append(copy)
    queries = [query(" ".join(t), f"{i:03d}") for i, t in enumerate(texts)]
    expected, kept = [], list[Query]()
    for q in queries:
        near = [
            k for k in kept
            if curate.jaccard(curate.shingles(k.text), curate.shingles(q.text)) >= 0.8
        ]  # fmt: skip
        expected.append(near[0].id if near else None)
        kept += [] if near else [q]
    index = curate.NearDuplicates(0.8)
    found = [index.add(q) for q in queries]
    assert [f.id if f else None for f in found] == expected
    assert 60 < sum(e is not None for e in expected) < 240


def test_prompts_of_one_template_are_hardly_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all pairs share a band; their signatures say that they are not near enough."""
    rng = random.Random(4)
    template = invented(24, rng)
    queries = [query(" ".join(template + invented(10, rng)), f"{i:03d}") for i in range(300)]
    assert curate.jaccard(*(curate.shingles(q.text) for q in queries[:2])) > 0.5
    compared = []

    def counted(a: set[str], b: set[str]) -> float:
        compared.append(1)
        return len(a & b) / len(a | b)

    monkeypatch.setattr(curate, "jaccard", counted)
    index = curate.NearDuplicates(0.8)
    assert [q.id for q in queries if index.add(q) is not None] == []
    assert len(compared) < 0.02 * 300 * 299 / 2


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.99, 1.0])
def test_signatures_rule_out_hardly_any_pair_at_the_threshold(threshold: float) -> None:
    """By chance itself: 20,000 signatures whose values agree with the threshold's probability."""
    rng = np.random.default_rng(0)
    same = rng.binomial(curate.PERMUTATIONS, threshold, 20_000)
    assert (same / curate.PERMUTATIONS < threshold - curate.MARGIN).mean() <= 0.0005


def test_likeness_is_not_taken_from_a_shared_system_message_or_history() -> None:
    system, history = " ".join(invented(80, random.Random(0))), invented(80, random.Random(1))
    index = curate.NearDuplicates(0.8)
    first = query("What does the bee eat in winter?", system=system)
    assert index.add(first) is None
    assert index.add(query("Name seven rivers of the far north.", system=system)) is None
    assert index.add(query("What does the bee eat in winter?")) is None
    assert index.add(query("what does the bee eat in winter", system=system)) == first
    long = talk(" ".join(history), "Yes.", "What does it eat?")
    assert index.add(long) is None
    assert index.add(talk(" ".join(history), "Yes.", "Where does it live?")) is None
    assert index.add(talk(" ".join(history), "Yes!", "What does it eat")) == long


# -- contamination -------------------------------------------------------------------------------


def test_planted_contamination_is_found_to_the_last_item() -> None:
    rng = random.Random(5)
    evaluation = [invented(rng.randrange(8, 60), rng) for _ in range(200)]
    index = curate.Contamination(8)
    for i, text in enumerate(evaluation):
        index.add("eval", query(" ".join(text), str(i)))
    clean, planted = [], {}
    for i in range(400):
        text = invented(rng.randrange(4, 60), rng)
        clean.append(query(" ".join(text), f"c{i}"))
        source = rng.randrange(200)
        start = rng.randrange(len(evaluation[source]) - 7)
        at = rng.randrange(len(text) + 1)
        text[at:at] = [w.upper() + "," for w in evaluation[source][start : start + 8]]
        planted[f"p{i}"] = (query(" ".join(text), f"p{i}"), source)
    assert all(index.find(q) == [] for q in clean)
    for one, source in planted.values():
        (pair,) = index.find(one)
        assert (pair.id, pair.against, pair.evaluation_id) == (one.id, "eval", str(source))
        assert pair.shared in " ".join(evaluation[source])
        assert len(pair.shared.split()) >= 8


def test_seven_shared_words_are_no_contamination() -> None:
    index = curate.Contamination(8)
    index.add("e", query("one two three four five six seven eight nine", "e1"))
    assert index.find(query("x two three four five six seven eight y")) == []
    (pair,) = index.find(query("x two three four five six seven eight nine"))
    assert pair.shared == "two three four five six seven eight nine"


def test_short_queries_are_compared_whole() -> None:
    index = curate.Contamination(8)
    index.add("e", query("Name a fish!", "e1"))
    index.add("f", query("Continue.", "f1"))
    assert index.find(query("Name a fish that swims.")) == []
    assert [p.evaluation_id for p in index.find(query("name A  fish"))] == ["e1"]
    # a conversation whose last turn is one of theirs
    assert [p.evaluation_id for p in index.find(talk("Hi.", "Hello.", "Name a fish"))] == ["e1"]
    assert index.find(talk("Continue", "With what?", "the story")) == []


def test_a_phrase_of_many_evaluation_queries_lists_the_first_four() -> None:
    index = curate.Contamination(3)
    for i in range(9):
        index.add("e", query(f"tell me about number {i}", f"e{i}"))
    pairs = index.find(query("Tell me about fish"))
    assert [p.evaluation_id for p in pairs] == ["e0", "e1", "e2", "e3"]
    assert {p.shared for p in pairs} == {"tell me about"}


# -- splits and diversity ------------------------------------------------------------------------


def test_the_hold_out_has_its_share_and_grows_with_it() -> None:
    queries = [query(f"Question {i}?", f"id{i}") for i in range(4000)]
    small = {q.id for q in queries if curate.held_out(q, 0.05)}
    large = {q.id for q in queries if curate.held_out(q, 0.1)}
    assert small < large
    assert 150 <= len(small) <= 250  # four standard deviations around 200 are 145 and 255
    assert curate.held_out(query("Question 1?", "other"), 0.1) == ("id1" in large)


def test_diversity_tells_a_template_from_a_mixture() -> None:
    rng = random.Random(0)
    same = [query(f"Please name the capital of country {i % 7}", f"s{i}") for i in range(60)]
    mixed = [query(" ".join(invented(8, rng)), f"m{i}") for i in range(200)]
    found = curate.diversity({"before": same, "after": mixed})
    assert found["after"]["distinct_1"] > 0.9 > 0.1 > found["before"]["distinct_1"]
    assert found["after"]["distinct_2"] > found["before"]["distinct_2"]
    assert found["after"]["clusters"] > 1.5 * found["before"]["clusters"]
    assert found == curate.diversity({"before": same, "after": mixed})
    # 60 texts of 7 words each, 6 + 7 of them different
    assert found["before"]["distinct_1"] == round(13 / 420, 4)
