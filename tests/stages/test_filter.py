from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsteer.data.jsonl import dump_lines, read_jsonl
from selfsteer.data.records import Preference, Triple
from selfsteer.errors import ArtifactError, ConfigError, DataError
from selfsteer.models.chat import ChatFormat
from selfsteer.recipe.sections import Bound, Filter, Hygiene
from selfsteer.run.folder import RunFolder, read_dropped
from selfsteer.run.stage import Artifact
from selfsteer.stages import filter as module
from selfsteer.stages.filter import (
    AS_RELEASED,
    FILTER_SEQUENCES,
    FilterTriples,
    Left,
    WritePairs,
    even_lengths,
    length_figures,
    matched_lengths,
    names_safety,
    refuse_bad_as_chosen,
    steering_filter,
    strip_lead_in,
    to_preference,
    within_caps,
)
from tests.make import make_tokenizer, recipe, stages_of, triple


def means(*rows: tuple[float, float, float, float, float, float]) -> dict[str, np.ndarray]:
    """Columns: m(y+|x+), m(y+|x), m(y+|x-), m(y-|x-), m(y-|x), m(y-|x+)."""
    return {
        name: np.array(column)
        for name, column in zip(FILTER_SEQUENCES, zip(*rows, strict=True), strict=True)
    }


def sifted(
    m: dict[str, np.ndarray], settings: Filter = AS_RELEASED
) -> tuple[np.ndarray, dict[str, int]]:
    """Mask of what v1's filter leaves, and how many each of its steps drops."""
    left, counts = np.arange(len(m["good/good"])), {}
    for reason, lost in steering_filter(m, settings):
        counts[reason] = int(lost.sum())
        left = left[~lost]
    keep = np.zeros(len(m["good/good"]), dtype=bool)
    keep[left] = True
    return keep, counts


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
    keep, counts = sifted(means(row, small))
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
    keep, counts = sifted(means(*rows))
    assert keep.tolist() == [False] * 6
    assert counts == {"steering_order": 1, "off_policy": 1, "small_gap": 4}
    rows[3] = row(-3, 4, -4, 4.4)
    keep, counts = sifted(means(*rows))
    assert keep.tolist() == [False, False, False, True, False, False]
    assert counts == {"steering_order": 1, "off_policy": 1, "small_gap": 3}


def test_both_responses_must_be_near_the_policy() -> None:
    """Plain means -1, -3 and -3, -1: each triple is below one of the means (-2, -2)."""
    rows = [(0.0, -1.0, -2.0, -2.0, -3.0, -4.0), (-2.0, -3.0, -4.0, 0.0, -1.0, -2.0)]
    keep, counts = sifted(means(*rows))
    assert not keep.any()
    assert counts == {"steering_order": 0, "off_policy": 2, "small_gap": 0}


def test_the_filter_of_nothing_keeps_nothing_and_warns_of_nothing() -> None:
    empty = {name: np.zeros(0) for name in FILTER_SEQUENCES}
    keep, counts = sifted(empty)
    assert keep.shape == (0,)
    assert set(counts.values()) == {0}
    keep, counts = sifted(means((-3.0, -2.0, -1.0, -3.0, -2.0, -1.0)))
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


def clean(triples: list[Triple], hygiene: Hygiene) -> tuple[list[Triple], dict[str, int], int]:
    """What hygiene leaves, drops by reason, lead-ins that were cut off."""
    left = Left(triples, hygiene).sift()
    return list(left), left.reasons, left.stripped


def test_clean_counts_the_first_reason_that_applies() -> None:
    triples = [
        triple("t0", plain="plain text", good="good text", bad="bad text"),
        triple("t1", plain="plain text", good=" \n", bad="bad text"),
        triple("t2", plain="", good="good text", bad="bad text"),
        triple("t3", plain="plain text", good="short", bad="bad text"),
        triple("t4", plain="plain text", good="same text", bad="same text"),
        triple("t5", plain="plain text", good="plain text", bad="bad text"),
        triple("t6", plain="plain text", good="good text", bad="plain text"),
        triple("t7", plain="same text", good="same text", bad="same text"),
        triple("t8", plain="", good="", bad=""),
        triple("t9", good="good text", bad="bad text"),
    ]
    kept, dropped, stripped = clean(triples, Hygiene(min_chars=8))
    assert [t.id for t in kept] == ["t0", "t9"]
    assert dropped == {"empty": 3, "too_short": 1, "good_equals_bad": 2, "equals_plain": 2}
    assert stripped == 0
    assert len(triples) == len(kept) + sum(dropped.values())


def test_a_pair_without_its_other_half_is_no_pair() -> None:
    with pytest.raises(DataError, match=r"triple t has no bad response, found good, plain; .*1\.0"):
        Left([triple(good="Yes.", plain="No.")], Hygiene()).sift()


def test_a_bound_of_zero_or_one_keeps_the_shortest_answers() -> None:
    short = [triple("t0", plain="C", good="A", bad="B")]
    assert clean(short, Hygiene())[0] == short
    assert clean(short, Hygiene(min_chars=0))[0] == short
    assert clean(short, Hygiene(min_chars=2))[1] == {"too_short": 1}


def test_cleaning_looks_at_texts_without_their_lead_ins() -> None:
    triples = [
        triple("t0", plain="Grass.", good="Helpful response: Honey.", bad="Rude answer: Bricks."),
        triple("t1", plain="Grass.", good="Good response: Honey.", bad="Bad response: Honey."),
        triple("t2", plain="Grass.", good="Good response:", bad="Bricks."),
    ]
    kept, dropped, stripped = clean(triples, Hygiene())
    assert [dict(t.responses) for t in kept] == [
        {"plain": "Grass.", "good": "Honey.", "bad": "Bricks."}
    ]
    assert dropped == {"good_equals_bad": 1, "empty": 1}
    assert stripped == 5
    kept, dropped, stripped = clean(triples, Hygiene(strip_lead_ins=False))
    assert kept == triples
    assert (dropped, stripped) == ({}, 0)


# -- thresholds ------------------------------------------------------------------------------------

OFF = Bound(rule="off")


def random_means(size: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(-2, 1, size) for name in FILTER_SEQUENCES}


def only(**step: Any) -> Filter:
    """A filter of which one step alone is on."""
    settings: dict[str, Any] = {"steering_order": False, "near_on_policy": OFF, "gap": OFF}
    return Filter(**{**settings, **step})


@pytest.mark.parametrize("step", ["near_on_policy", "gap"])
def test_quantile_0_keeps_all_and_off_too(step: str) -> None:
    for bound in (Bound(quantile=0), OFF):
        keep, counts = sifted(random_means(), only(**{step: bound}))
        assert keep.all()
        assert sum(counts.values()) == 0


@pytest.mark.parametrize("step", ["near_on_policy", "gap"])
@pytest.mark.parametrize(
    "bounds",
    [
        [{"quantile": q} for q in (0, 0.1, 0.35, 0.5, 0.8, 0.95)],
        [{"at_least": v} for v in (-9, -3, -2, -1.5, 0, 1)],
    ],
)
def test_a_higher_threshold_keeps_a_subset(step: str, bounds: list[dict[str, Any]]) -> None:
    masks = [sifted(random_means(), only(**{step: Bound(**b)}))[0] for b in bounds]
    assert masks[0].all()
    for wide, narrow in pairwise(masks):
        assert (wide | ~narrow).all()
        assert narrow.sum() < wide.sum() or not wide.any()


def test_thresholds_by_hand() -> None:
    """m(y+|x) = -1, -2, -3, -4; m(y-|x) = -4, -3, -2, -1. At least -3: 1 and 2 stay.

    Median -2.5 of each: 0, 1 pass the first, 2, 3 the second: none. Quantile 0.25 (-3.25): 1, 2.
    """
    plain = np.array([-1.0, -2.0, -3.0, -4.0])
    m = dict.fromkeys(FILTER_SEQUENCES, np.zeros(4)) | {
        "plain/good": plain,
        "plain/bad": plain[::-1],
    }
    for bound, kept in (
        (Bound(at_least=-3.0), [1, 2]),
        (Bound(quantile=0.5), []),
        (Bound(quantile=0.25), [1, 2]),
        (Bound(rule="mean"), []),
    ):
        keep, counts = sifted(m, only(near_on_policy=bound))
        assert np.flatnonzero(keep).tolist() == kept
        assert counts == {"off_policy": 4 - len(kept)}


def test_without_settings_it_is_the_releases_filter() -> None:
    m = random_means(4000)
    given = Filter(near_on_policy=Bound(rule="mean"), gap=Bound(rule="mean"))
    keep, counts = sifted(m)
    again, same = sifted(m, given)
    assert (keep == again).all()
    assert counts == same
    assert keep.any()


def test_what_a_recipe_may_say_of_the_filter() -> None:
    for value, expected in (
        ({"gap": "off"}, Filter(gap=OFF)),
        ({"gap": False}, Filter(gap=OFF)),  # YAML reads off as false
        ({"near_on_policy": {"at_least": -1.2}}, Filter(near_on_policy=Bound(at_least=-1.2))),
    ):
        assert recipe(filter=value).filter == expected
    for wrong, said in (
        ({"gap": {"quantile": 0.5, "at_least": 1}}, "exactly one"),
        ({"gap": {}}, "exactly one"),
        ({"gap": {"quantile": 1}}, "less than 1"),
        ({"gap": {"quantil": 0.1}}, "did you mean 'filter.gap.quantile'"),
        ({"enabled": False, "gap": "off"}, "has no other settings"),
    ):
        with pytest.raises(ConfigError, match=said):
            recipe(filter=wrong)


# -- lengths ---------------------------------------------------------------------------------------


def test_caps_are_inclusive() -> None:
    lengths = np.array([[10, 20], [20, 10], [10, 21], [5, 5], [1, 12]])
    assert within_caps(lengths, Hygiene()).all()
    by_ratio = within_caps(lengths, Hygiene(max_length_ratio=2))
    assert by_ratio.tolist() == [True, True, False, True, False]
    by_tokens = within_caps(lengths, Hygiene(max_length_difference=10))
    assert by_tokens.tolist() == [True, True, False, True, False]
    both = within_caps(lengths, Hygiene(max_length_ratio=12, max_length_difference=10))
    assert both.tolist() == [True, True, False, True, False]


def test_matching_keeps_as_many_of_either_sign_in_each_cell() -> None:
    """Cell of (10, 20): three with the longer chosen, one without. Cell of (10, 80): one, alone."""
    lengths = np.array([[20, 10], [21, 10], [20, 11], [10, 20], [80, 10], [7, 7]])
    ids = list("abcdef")
    keep = matched_lengths(lengths, ids, 0)
    assert keep[:3].sum() == 1
    assert keep[3:].tolist() == [True, False, True]
    order = [4, 2, 0, 5, 3, 1]
    again = matched_lengths(lengths[order], [ids[i] for i in order], 0)
    assert [ids[i] for i in np.flatnonzero(keep)] == sorted(
        ids[order[i]] for i in np.flatnonzero(again)
    )


def test_matched_lengths_say_nothing_of_what_was_chosen() -> None:
    """Chosen are longer by a third on average before, and equally long to a few percent after."""
    rng = np.random.default_rng(0)
    lengths = np.stack(
        [rng.lognormal(4, 0.6, 20_000), rng.lognormal(3.7, 0.6, 20_000)], axis=1
    ).astype(int)
    ids = [str(i) for i in range(len(lengths))]
    kept = lengths[matched_lengths(lengths, ids, 0)]
    before, after = length_figures(lengths), length_figures(kept)
    assert before["longer_chosen"] > 0.6
    assert after["longer_chosen"] == after["longer_rejected"]
    assert before["chosen"] / before["rejected"] > 1.3
    assert after["chosen"] / after["rejected"] == pytest.approx(1, abs=0.02)
    quantiles = np.quantile(kept, [0.1, 0.5, 0.9], axis=0)
    assert quantiles[:, 0] == pytest.approx(quantiles[:, 1], rel=0.05)
    assert len(kept) > 0.5 * len(lengths)
    seeds = [matched_lengths(lengths, ids, s) for s in (0, 0, 1)]
    assert (seeds[0] == seeds[1]).all()
    assert (seeds[0] != seeds[2]).any()


def test_length_figures_of_nothing_are_none() -> None:
    assert length_figures(np.zeros((0, 2)))["longer_chosen"] is None
    assert length_figures(np.array([[4, 2], [2, 4], [3, 3], [3, 3]])) == {
        "pairs": 4,
        "chosen": 3.0,
        "rejected": 3.0,
        "longer_chosen": 0.25,
        "longer_rejected": 0.25,
    }


def test_length_drops_are_counted_and_matching_is_for_what_the_policy_learns_from() -> None:
    chat = ChatFormat(make_tokenizer("llama"))
    triples = [
        triple("t0", good="abc", bad="abcdef"),
        triple("t1", good="abcdef", bad="abc"),
        triple("t2", good="abcdef", bad="abc"),
        triple("t3", good="a" * 60, bad="a"),
    ]
    hygiene = Hygiene(match_lengths=True, max_length_ratio=4)
    for match, count in ((True, 2), (False, 3)):
        left = Left(triples, hygiene)
        figures = even_lengths(left, hygiene, lambda: chat, 0, match=match)
        assert len(left) == len(list(left)) == count
        expected = {"length_gap": 1} | ({"length_unmatched": 1} if match else {})
        assert left.reasons == expected
        assert figures["before"]["pairs"] == 4
        assert figures["before"]["longer_chosen"] == 0.75
        assert figures["after"]["pairs"] == count


# -- the stages ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with four triples: one is empty, one tells its principle, one has a twin."""
    triples = [
        triple("t0", "Accuracy", plain="Hay.", good="Helpful response: Honey.", bad="Bricks."),
        triple("t1", "Accuracy", plain="Hay.", good=" ", bad="Bricks."),
        triple("t2", "Safety", plain="Hay.", good="Bad answer: Milk.", bad="Milk."),
        triple("t3", "Safety", plain="Hay.", good="Honey, of course.", bad="Bricks."),
    ]
    (tmp_path / "triples.jsonl").write_text(dump_lines(triples))
    return RunFolder(tmp_path)


def test_what_the_filter_drops_is_written_down_as_it_was_judged(
    run: RunFolder, checkpoints: dict[str, Path]
) -> None:
    given = Artifact(run / "triples.jsonl"), Artifact(checkpoints["llama"])
    stage = FilterTriples(*given, Hygiene())
    result = run.execute(stage)
    assert (result.n_in, result.n_out) == (4, 2)
    assert result.dropped == {"empty": 1, "good_equals_bad": 1}
    assert result.notes["survivors"] == {"in": 4, "hygiene": 2, "lengths": 2}
    assert result.notes["lead_ins_stripped"] == 2
    empty, equal = read_dropped(run / "filter.dropped.jsonl")
    assert (empty.id, empty.reason) == ("t1", "empty")
    assert (equal.id, equal.reason) == ("t2", "good_equals_bad")
    assert isinstance(equal.record, dict)
    assert Triple.from_dict(equal.record).responses["good"] == "Milk.", "without its lead-in"
    kept = [Triple.from_dict(v).responses["good"] for _, v in read_jsonl(run / stage.outputs[0])]
    assert kept == ["Honey.", "Honey, of course."]


def test_pairs_are_written_of_what_hygiene_leaves_unless_that_is_done(
    run: RunFolder, checkpoints: dict[str, Path]
) -> None:
    given = Artifact(run / "triples.jsonl"), Artifact(checkpoints["llama"])
    result = run.execute(WritePairs(*given, Hygiene(), 2))
    assert (result.n_in, result.n_out) == (4, 2)
    assert result.dropped == {"empty": 1, "good_equals_bad": 1}
    assert result.notes["about_safety"] == 1
    assert [d.id for d in read_dropped(run / "preferences.dropped.jsonl")] == ["t1", "t2"]
    as_is = WritePairs(*given, Hygiene(), 3, cleaned=True)
    result = run.execute(as_is)
    assert (result.n_out, result.dropped) == (4, {})
    assert not (run / "preferences.dropped.jsonl").exists()
    assert sorted(p.name for p in (run / "preferences").iterdir()) == [
        "shard-00000.jsonl",
        "shard-00001.jsonl",
    ]


# -- safety ----------------------------------------------------------------------------------------


def about(number: int, *features: str) -> Triple:
    return triple(f"t{number}", *features, good="I help.", bad="I harm.")


def test_a_preference_is_the_good_response_over_the_bad_with_its_features() -> None:
    made = to_preference(about(0, "Safety", "Accuracy"))
    assert (made.chosen, made.rejected) == ("I help.", "I harm.")
    assert made.extra == {"features": ["Safety", "Accuracy"]}
    assert Preference.from_dict(made.to_dict()) == made
    assert to_preference(triple("t0", good="a", bad="b")).extra == {}


def test_the_bad_response_can_never_be_written_as_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever swaps the two, on purpose or not, gets an error instead of a file."""
    triples = [about(i, "Safety") for i in range(3)]
    (tmp_path / "given.jsonl").write_text(dump_lines(triples))
    given = Artifact(tmp_path / "given.jsonl")
    stage = WritePairs(given, given, Hygiene(), 2, cleaned=True)
    right, wrong = RunFolder(tmp_path / "right"), RunFolder(tmp_path / "wrong")
    stage.run(right)
    shards = sorted((right / "preferences").iterdir())
    chosen = [v["chosen"][0]["content"] for shard in shards for _, v in read_jsonl(shard)]
    assert chosen == ["I help."] * 3

    def swapped(t: Triple) -> Preference:
        return Preference(t.id, t.messages, t.responses["bad"], t.responses["good"])

    monkeypatch.setattr(module, "to_preference", swapped)
    with pytest.raises(ArtifactError, match="written under the bad principle"):
        stage.run(wrong)
    assert not wrong.path.exists()
    with pytest.raises(ArtifactError, match="t1"):
        refuse_bad_as_chosen(triples, [to_preference(triples[0]), swapped(triples[1])])


def test_records_about_safety_are_known_as_triples_and_as_preferences() -> None:
    triples = [about(0, "Safety"), about(1, "Accuracy"), about(2, "Accuracy", "Safety")]
    assert [names_safety(t) for t in triples] == [True, False, True]
    assert [names_safety(to_preference(t)) for t in triples] == [True, False, True]
    assert not names_safety(triple("t0", good="a", bad="b"))


def test_what_is_exported_does_not_change_what_is_trained_on() -> None:
    def fingerprint(**hygiene: Any) -> str:
        return stages_of(recipe(hygiene=hygiene))["iteration-1/preferences"].fingerprint

    assert fingerprint() == fingerprint(export_unsafe=False)
    assert fingerprint() != fingerprint(match_lengths=True)
