"""The search for a better principle, with ratings and rewritings that are functions of the text."""

from collections.abc import Callable, Sequence

import pytest

from selfsteer.data.records import Query
from selfsteer.principles.improve import Path, Rated, improve, read_rewritten, rewrite_prompt

QUERIES = [Query.from_dict({"id": f"q{i}", "prompt": f"Query {i}?"}) for i in range(6)]
STREAM = [QUERIES[:2], QUERIES[2:4], QUERIES[4:]]


class World:
    """Ratings of a principle, less 0.1 for every query with an odd number; what was asked."""

    def __init__(self, worth: Callable[[str], float | None], **new: Sequence[str]) -> None:
        self.worth, self.new = worth, new
        self.rated: list[list[str]] = []
        self.seen: list[tuple[tuple[str, ...], str, float]] = []

    def rate(self, queries: Sequence[Query], texts: Sequence[str]) -> dict[str, list[Rated]]:
        self.rated.append(list(texts))
        found: dict[str, list[Rated]] = {}
        for text in texts:
            worth = self.worth(text)
            found[text] = [
                Rated(q, f"{text} {q.id}", worth - 0.1 * (int(q.id[1:]) % 2))
                for q in queries
                if worth is not None
            ]
        return found

    def rewrite(self, paths: Sequence[tuple[Path, Rated]]) -> list[Sequence[str]]:
        self.seen += [(p.texts, worst.query.id, worst.rating) for p, worst in paths]
        return [self.new.get(path.texts[-1], ()) for path, _ in paths]


def search(world: World, beam: int, good_enough: float | None = None) -> list[Path]:
    return improve(
        "a",
        STREAM,
        rate=world.rate,
        rewrite=world.rewrite,
        beam=beam,
        good_enough=good_enough,
    )


WORTH = {"a": 0.2, "b": 0.4, "c": 0.1, "d": 0.3, "e": 0.9}


def test_the_best_paths_go_on_and_each_principle_stays_a_candidate() -> None:
    """Ratings are 0.05 lower than the worth: half of the queries cost 0.1."""
    world = World(lambda t: WORTH[t], a=["b", "c", "d"], b=["c"], d=["e", "e"])
    best = search(world, beam=2)
    # after step 2: a, b .15 .35; a, d .15 .25 (dropped: a, a and a, c)
    assert world.rated == [["a"], ["a", "b", "c", "d"], ["b", "c", "d", "e"]]
    assert [p.texts for p in best] == [("a", "d", "e"), ("a", "b", "b")]
    assert [p.ratings for p in best] == [
        pytest.approx((0.15, 0.25, 0.85)),
        pytest.approx((0.15, 0.35, 0.35)),
    ]
    assert best[0].mean == pytest.approx(1.25 / 3)
    # the writer sees the worst answer of the step
    assert [seen[:2] for seen in world.seen] == [
        (("a",), "q1"),
        (("a", "b"), "q3"),
        (("a", "d"), "q3"),
    ]
    assert world.seen[0][2] == pytest.approx(0.1)


def test_a_beam_of_one_misses_what_is_found_on_a_worse_path() -> None:
    world = World(lambda t: WORTH[t], a=["b", "c", "d"], b=["c"], d=["e"])
    (best,) = search(world, beam=1)
    assert best.texts == ("a", "b", "b")


def test_what_is_good_enough_is_not_rewritten() -> None:
    world = World(lambda t: WORTH[t], a=["b", "c", "d"], b=["c"], d=["e"])
    best = search(world, beam=2, good_enough=0.35)
    assert [seen[0] for seen in world.seen] == [("a",), ("a", "d")]
    assert world.rated[2] == ["b", "d", "e"]
    assert best[0].texts == ("a", "d", "e")
    kept = search(World(lambda t: WORTH[t], a=["e"]), beam=2, good_enough=0.1)
    assert [p.texts for p in kept] == [("a", "a", "a")]


def test_a_principle_without_a_rating_is_given_up() -> None:
    world = World(lambda t: None if t == "b" else WORTH[t], a=["b", "d"])
    found = [p.texts for p in search(world, beam=9)]
    assert found == [("a", "d", "d"), ("a", "a", "d"), ("a", "a", "a")]
    assert search(World(lambda t: None), beam=2) == []


def test_of_equals_the_earlier_principle_stays() -> None:
    world = World(lambda t: 0.5, a=["b", "c"])
    assert [p.texts for p in search(world, beam=1)] == [("a", "a", "a")]


def test_a_writer_sees_the_last_principles_the_ratings_and_the_worst_answer() -> None:
    path = Path(("p0", "p1", "p2", "p3", "p3", "p4"), (0.0, 0.1, 0.2, 0.3, 0.35, 0.4))
    (asked,) = rewrite_prompt(path, Rated(QUERIES[3], "Nothing.", 0.25), "stars, 0 to 5")
    assert asked.role == "user"
    text = asked.content
    assert "(stars, 0 to 5):\n0.1: p1\n0.2: p2\n0.35: p3\n0.4: p4\n\n" in text
    assert "Query 3?" in text
    assert "rated 0.25:\nNothing.\n" in text


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        (' "Be brief. Say "no"."\n', "stop", ('Be brief. Say "no".', "ok")),
        ('Where you must, say "no"', "stop", ('Where you must, say "no"', "ok")),
        ("Be brief.", "length", ("", "unfinished")),
        ("", "prompt_too_long", ("", "prompt_too_long")),
        ("", "request_failed:timeout", ("", "request_failed:timeout")),
        ("''", "stop", ("", "empty")),
        ('"', "stop", ("", "empty")),
        ("x" * 1201, "stop", ("", "too_long")),
        ("be KIND", "stop", ("", "unchanged")),
    ],
)
def test_what_a_writer_says_is_read_strictly(
    text: str, reason: str, expected: tuple[str, str]
) -> None:
    assert read_rewritten(text, reason, Path(("Be kind.", "Be fair."))) == expected
