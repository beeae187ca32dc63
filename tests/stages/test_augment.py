import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import read_jsonl
from selfsteer.data.records import Dropped, Message, Query
from selfsteer.errors import DataError
from selfsteer.recipe.sections import Augment, GrownQueries
from selfsteer.stages.augment import Outcome, augment, parse_query, prompt
from tests.fakes import FakeEngine, Said

SEEDS = [
    Query.from_dict({"id": f"s{i}", "prompt": f"Tell me something new about subject {word}."})
    for i, word in enumerate(("amber", "beech", "copper", "dunes", "elk"))
]


def scripted(reply: Callable[[str, random.Random], Said], size: int | None = None) -> FakeEngine:
    """Answers each prompt by a function of it and a random generator of the request's seed."""
    return FakeEngine(lambda r: reply(r.messages[-1].content, random.Random(r.seed)), size)


def fresh(text: str, rng: random.Random) -> str:
    return "New query: " + " ".join(f"w{rng.randrange(9999)}" for _ in range(9))


def grow(tmp_path: Path, engine: FakeEngine, to: int = 12, **more: Any) -> tuple[Any, list[Query]]:
    given = {k: more.pop(k) for k in list(more) if k in ("evaluation", "check", "drop")}
    seeds = more.pop("seeds", SEEDS)
    names = ("depth", "breadth", "instruct", "attempts")
    own = {k: more.pop(k) for k in names if k in more}
    settings = GrownQueries(path="q.jsonl", augment=Augment(to=to, **own), **more)
    path = tmp_path / "augmented.jsonl"
    result = augment(seeds, settings, engine, path, seed=3, **given)
    return result, [Query.from_dict(v) for _, v in read_jsonl(path)]


@pytest.mark.parametrize(
    ("reply", "outcome", "text"),
    [
        ("New query: Why do bees dance?", Outcome.OK, "Why do bees dance?"),
        ('Sure.\n**New Query:** "Why do\nbees dance?"', Outcome.OK, "Why do\nbees dance?"),
        ("- new query: A?", Outcome.OK, "A?"),
        ("Why do bees dance?", Outcome.NO_LABEL, ""),
        ("Query: Why do bees dance?", Outcome.NO_LABEL, ""),
        ("New query: A?\nNew query: B?", Outcome.SEVERAL, ""),
        ("New query:  \n", Outcome.EMPTY, ""),
        ("New query: ?!", Outcome.EMPTY, ""),
        ("New query: Why?\nAnswer: Because.", Outcome.SCAFFOLDING, ""),
        ("New query: Query: Why do bees dance?", Outcome.SCAFFOLDING, ""),
        ("New query: Why?\n\nExplanation: harder.", Outcome.SCAFFOLDING, ""),
        ("New query: text of the query", Outcome.ECHOES_PROMPT, ""),
        (
            "New query: Below is a query that somebody asked an assistant.",
            Outcome.ECHOES_PROMPT,
            "",
        ),
    ],
)
def test_replies_are_parsed_strictly(reply: str, outcome: Outcome, text: str) -> None:
    assert parse_query(reply) == (outcome, text)


def test_prompts_show_their_sources_and_hide_system_messages() -> None:
    talk = Query.from_dict({"prompt": [*SEEDS[0].messages], "system": "Secret."})
    (message,) = prompt("depth", [talk])
    assert SEEDS[0].text in message.content
    assert "Secret" not in message.content
    (message,) = prompt("instruct", SEEDS[:3])
    assert [f"{i}. {q.text}" in message.content for i, q in enumerate(SEEDS[:3], 1)] == [True] * 3
    assert len({prompt(how, SEEDS[:1])[0].content for how in ("depth", "breadth", "instruct")}) == 3


def test_the_set_grows_to_its_size_with_lineage(tmp_path: Path) -> None:
    result, queries = grow(tmp_path, scripted(fresh), to=45)
    assert (result.n_in, result.n_out, result.dropped) == (45, 45, {})
    assert result.notes["rounds"] == 1
    assert sum(result.notes["added"].values()) == 40
    assert result.notes["diversity"]["after"]["distinct_1"] > 0.9
    assert [q.id for q in queries] == sorted(q.id for q in queries)
    new = [q for q in queries if "augmented" in q.extra]
    assert len(new) == 40
    ids = {q.id for q in SEEDS}
    for q in new:
        lineage = q.extra["augmented"]
        assert set(lineage["from"]) <= ids
        assert len(lineage["from"]) == (3 if lineage["how"] == "instruct" else 1)
        assert lineage["round"] == 1
    counts = {h: sum(q.extra["augmented"]["how"] == h for q in new) for h in ("depth", "instruct")}
    assert counts == {k: v for k, v in result.notes["added"].items() if k != "breadth"}
    assert not (tmp_path / "augment").exists()


@pytest.mark.parametrize("how", ["depth", "breadth", "instruct"])
def test_shares_of_one_way_alone(tmp_path: Path, how: str) -> None:
    shares: dict[str, Any] = {k: float(k == how) for k in ("depth", "breadth", "instruct")}
    result, _ = grow(tmp_path, scripted(fresh), **shares)
    assert result.notes["replies"] == {how: 7}


def test_a_new_query_keeps_the_system_message_it_grew_from(tmp_path: Path) -> None:
    seeds = [Query.from_dict({"id": "s", "prompt": "Tell me of elks.", "system": "Be brief."})]
    shares: dict[str, Any] = {"depth": 0.5, "breadth": 0.5, "instruct": 0.0}
    _, queries = grow(tmp_path, scripted(fresh), to=4, seeds=seeds, **shares)
    assert all(q.messages[0] == Message("system", "Be brief.") for q in queries)


def test_each_refusal_is_counted_by_its_reason(tmp_path: Path) -> None:
    evaluation = [
        Query.from_dict(
            {"id": "e1", "prompt": "Who first sailed around the southern cape at night?"}
        ),
        Query.from_dict({"id": "e2", "prompt": "Where do elks sleep?"}),
    ]
    near = "one two three four five six seven eight nine ten eleven twelve"
    replies: list[Said] = [
        "Why?",
        "New query: a b",
        "New query: " + "word " * 80,
        "New query: Почему небо голубое и трава зелёная?",
        "New query: TELL me something new about subject amber.",
        "New query: Tell me something new about subject  Elk.",
        f"New query: {near}",
        f"New query: {near} thirteen",
        f"New query: {near}",
        "New query: Say who first sailed around the southern cape at noon",
        "New query: where do elks sleep",
        "New query: Let the judge fail on this one",
        ("New query: cut", "length"),
        ("", "prompt_too_long"),
    ]
    left = iter(replies)

    def check(query: Query) -> None:
        if "judge" in query.text:
            raise DataError("not of this world")

    told: list[Dropped] = []
    result, queries = grow(
        tmp_path,
        scripted(lambda text, rng: next(left)),
        to=5 + len(replies),
        attempts=1,
        max_chars=200,
        scripts=("Latin",),
        evaluation=evaluation,
        check=check,
        drop=told.append,
        ngram=6,
        depth=0.0,
        breadth=0.0,
        instruct=1.0,
        seeds=SEEDS,
    )
    assert Counter(d.reason for d in told) == result.dropped
    assert all(set(d.to_dict()["record"]) >= {"how", "sources", "text"} for d in told)
    # a seed told again is one that was shown, or another one
    again = {k: result.dropped.pop(k, 0) for k in ("equals_source", "duplicate_but_case")}
    assert sum(again.values()) == 2
    assert result.dropped == {
        "no_label": 1,
        "too_short": 1,
        "too_long": 1,
        "other_script": 1,
        "near_duplicate": 1,
        "duplicate": 1,
        "contaminated": 2,
        "judge_cannot_score": 1,
        "unfinished": 1,
        "prompt_too_long": 1,
    }
    assert near in {q.text for q in queries}
    assert result.n_in == result.n_out + sum(result.dropped.values()) + 2


def test_it_stops_after_its_attempts_and_says_how_far_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = scripted(lambda text, rng: "no")
    result, queries = grow(tmp_path, engine, to=7, attempts=3)
    assert len(queries) == 5
    assert result.dropped == {"no_label": 6}
    assert result.notes["rounds"] == engine.calls == 3
    assert "3 rounds of augmentation came to 5 of 7 queries" in capsys.readouterr().err


def test_a_later_round_builds_on_earlier_finds(tmp_path: Path) -> None:
    def sometimes(text: str, rng: random.Random) -> str:
        return fresh(text, rng) if rng.random() < 0.5 else "no"

    result, queries = grow(tmp_path, scripted(sometimes), to=60, attempts=20)
    assert len(queries) == 60
    rounds = {q.id: q.extra["augmented"]["round"] for q in queries if q.extra}
    assert len(set(rounds.values())) == result.notes["rounds"] > 2
    sources = [
        (rounds[q.id], rounds.get(i, 0)) for q in queries if q.extra
        for i in q.extra["augmented"]["from"]
    ]  # fmt: skip
    assert all(made > source for made, source in sources)
    assert any(source > 0 for _, source in sources)


def test_an_interrupted_run_asks_nothing_twice_and_ends_the_same(tmp_path: Path) -> None:
    def reply(text: str, rng: random.Random) -> str:
        return fresh(text, rng) if rng.random() < 0.5 else "no"

    whole, _ = grow(tmp_path / "whole", scripted(reply), to=30)
    expected = (tmp_path / "whole" / "augmented.jsonl").read_bytes()
    total = scripted(reply)
    grow(tmp_path / "count", total, to=30)

    class Stop(Exception):
        pass

    def stopping(text: str, rng: random.Random) -> str:
        if len(engine.asked) > 7:
            raise Stop
        return reply(text, rng)

    asked, result = 0, None
    while result is None:
        engine = scripted(stopping)
        with suppress(Stop):
            result, _ = grow(tmp_path / "cut", engine, to=30)
        asked += len(engine.asked) - (result is None)
    assert (tmp_path / "cut" / "augmented.jsonl").read_bytes() == expected
    assert asked == len(total.asked) > 25
    assert (result.n_in, result.dropped, result.notes) == (
        whole.n_in,
        whole.dropped,
        whole.notes,
    )


def test_a_size_that_is_reached_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="to 5 is not above the 5 queries"):
        grow(tmp_path, scripted(fresh), to=5)


def test_a_gap_of_any_length_is_read() -> None:
    gap = "\n" * 20_000
    assert parse_query(f"New query:{gap}Why do bees{gap}dance?") == (
        Outcome.OK,
        f"Why do bees{gap}dance?",
    )
    assert parse_query(f"Sure.{gap}New query: Why?{gap}Answer: no")[0] is Outcome.SCAFFOLDING
