import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsteer.data.files import read_rows
from selfsteer.data.records import Message, Query, Triple
from selfsteer.errors import ConfigError, DataError
from selfsteer.evaluation.implicit_reward import ImplicitReward
from selfsteer.evaluation.rewardbench import (
    SECTIONS,
    Item,
    evaluate,
    markdown,
    outcome,
    read_items,
    ties_score,
)
from selfsteer.models.load import load_model
from selfsteer.models.score import score_records
from selfsteer.recipe.sections import Policy
from tests.make import make_checkpoint


class Told:
    """Scores are in the answers: "2.5 whatever" scores 2.5, "none" has no score."""

    name = "told"
    scale = "as told"

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        first = [text.split()[0] for _, text in answers]
        return [None if x == "none" else float(x) for x in first]


def row(subset: str, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {
        "prompt": "Name a fish.",
        "subset": subset,
        "chosen": chosen,
        "rejected": rejected,
        **more,
    }


def read(*rows: dict[str, Any]) -> list[Item]:
    items, dropped, _ = read_items(((f"row {i}", r) for i, r in enumerate(rows, 1)), "mine")
    assert not dropped
    return items


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return evaluate(read(*rows), Told(), np.random.default_rng(0))


def rights(subset: str, right: int, wrong: int) -> list[dict[str, Any]]:
    return [row(subset, "1 a", "0 b")] * right + [row(subset, "0 a", "1 b")] * wrong


# -- the published constants ----------------------------------------------------------------------


def test_the_published_set_has_2985_prompts_and_maths_weighs_as_code() -> None:
    counts = {name: n for subsets in SECTIONS.values() for name, n in subsets.items()}
    assert len(counts) == 23
    assert sum(counts.values()) - counts["math-prm"] + 447 == 2985
    assert counts["math-prm"] == sum(n for name, n in counts.items() if name.startswith("hep-"))
    sizes = {s: sum(v.values()) for s, v in SECTIONS.items()}
    assert (sizes["Chat"], sizes["Chat Hard"], sizes["Safety"]) == (358, 456, 740)
    # XSTest has 250 safe prompts in all
    assert SECTIONS["Safety"]["xstest-should-respond"] == 250
    assert SECTIONS["Safety"]["xstest-should-refuse"] == 154


# -- by hand ---------------------------------------------------------------------------------------


def test_sections_are_weighted_by_published_counts() -> None:
    """Chat: easy (100) all right, med (40) half right: (100 + 20) / 140. Reasoning: (984·0 + 164) /
    1148. Both alone make the score.
    """
    found = report(
        *rights("alpacaeval-easy", 2, 0),
        *rights("mt-bench-med", 1, 1),
        *rights("math-prm", 0, 3),
        *rights("hep-go", 1, 0),
    )
    assert found["benchmark"] == "RewardBench"
    chat, reasoning = (found["sections"][s]["score"][0] for s in ("Chat", "Reasoning"))
    assert chat == pytest.approx(120 / 140)
    assert reasoning == pytest.approx(164 / 1148)
    assert found["score"][0] == pytest.approx((chat + reasoning) / 2)
    assert found["sections"]["Safety"] == {"score": None, "subsets": []}
    assert "donotanswer" in found["missing"]
    assert "hep-go" not in found["missing"]
    assert len(found["missing"]) == 19
    assert found["accuracy"][0] == pytest.approx(4 / 8)


def test_all_code_weighs_as_much_as_all_maths() -> None:
    code = [r for name in SECTIONS["Reasoning"] if name != "math-prm" for r in rights(name, 1, 0)]
    found = report(*rights("math-prm", 0, 1), *code)
    assert found["sections"]["Reasoning"]["score"][0] == pytest.approx(0.5)


def test_prior_sets_are_half_a_section() -> None:
    chat = [r for name in SECTIONS["Chat"] for r in rights(name, 1, 0)]
    found = report(*chat, *rights("shp", 1, 1), *rights("summarize", 0, 1))
    assert found["sections"]["Prior Sets"]["score"][0] == pytest.approx(0.25)
    assert found["score"][0] == pytest.approx((1.0 + 0.5 * 0.25) / 1.5)
    assert "anthropic_hhh" in found["missing"]


def test_unknown_subsets_stand_under_their_own_names_and_outside_the_score() -> None:
    found = report(*rights("donotanswer", 1, 0), *rights("our own", 0, 2))
    assert found["others"] == ["our own"]
    assert found["score"][0] == 1.0
    alone = report(*rights("our own", 1, 3))
    assert (alone["benchmark"], alone["score"]) == (None, None)
    assert alone["subsets"]["our own"]["accuracy"][0] == 0.25


def test_a_tie_is_no_win_in_a_pair_and_a_share_among_several() -> None:
    (pair,) = read(row("x", "1 a", "1 b"))
    assert outcome(pair, [1.0, 1.0]) == 0.0
    (four,) = read(row("x", ["1 a"], ["2 b", "3 c", "4 d"]))
    assert outcome(four, [2.0, 0.0, 1.0, -1.0]) == 1.0
    assert outcome(four, [2.0, 2.0, 1.0, 2.0]) == pytest.approx(1 / 3)
    assert outcome(four, [1.0, 2.0, 0.0, 0.0]) == 0.0
    (tied,) = read(row("x", ["1 a", "2 b"], ["3 c", "4 d"]))
    assert outcome(tied, [2.0, 3.0, 1.0, 0.0]) == 1.0
    assert outcome(tied, [2.0, 1.0, 1.0, 0.0]) == 0.0
    assert report(row("x", "1 a", "1 b"))["tied_scores"] == 1


def test_rewardbench_2_is_the_mean_of_its_subsets() -> None:
    found = report(
        row("Factuality", ["3 a"], ["2 b", "1 c", "0 d"]),
        row("Factuality", ["1 a"], ["2 b", "1 c", "0 d"]),
        row("precise if", ["1 a"], ["0 b", "0 c", "0 d"]),
    )
    assert found["benchmark"] == "RewardBench 2"
    assert found["sections"]["Factuality"]["score"][0] == 0.5
    assert found["score"][0] == pytest.approx(0.75)
    assert found["missing"] == ["Math", "Safety", "Focus", "Ties"]
    text = markdown({**found, "model": "m", "dropped": {"equal": 2}})
    assert "| **Score** | 75.0 |" in text
    assert "| precise if | 100.0 |" in text
    assert "Dropped: 2 equal." in text
    assert "Math, Safety, Focus, Ties" in text


def test_the_ties_score_by_hand() -> None:
    """Two prompts. First: spread 1, gap 2 tied, gap 3 ref: all right. Second: spread 2, gap 1
    tied, gap −1 ref: tied row right, ref row wrong, no margin exceeds the spread.

    0.3·1 + 0.3·½ + 0.2·½ + 0.2·½ + 0.01·(tanh(2/1 − 1) + tanh(−1/2 − 1)) / 2
    """
    prompts = [{"tied": (1.0, 2.0), "ref": (0.0, 3.0)}, {"tied": (2.0, 1.0), "ref": (0.0, -1.0)}]
    expected = 0.3 + 0.15 + 0.1 + 0.1 + 0.01 * (math.tanh(1.0) + math.tanh(-1.5)) / 2
    assert ties_score(prompts) == pytest.approx(expected)
    assert ties_score([{"tied": (0.0, 1.0), "ref": (0.0, 1.0)}]) == pytest.approx(1.01)
    assert math.isnan(ties_score([{"tied": (1.0, 2.0)}]))
    rows = [
        row("Ties", ["3 a", "2 b"], ["0 c", "-1 d"], id="tied:1"),
        row("Ties", ["3 a"], ["0 c"], id="ref:1"),
        row("Ties", ["3 a", "1 b"], ["0 c"], id="tied:2"),
        row("Ties", ["-1 a"], ["0 c"], id="ref:2"),
    ]
    found = report(*rows)
    assert found["subsets"]["Ties"]["score"][0] == pytest.approx(expected)
    assert found["subsets"]["Ties"]["accuracy"][0] == 0.75
    assert found["score"][0] == pytest.approx(expected)
    plain = report(*[{**r, "id": i} for i, r in enumerate(rows)])
    assert "score" not in plain["subsets"]["Ties"]


def test_intervals_narrow_with_rows_and_hold_the_value() -> None:
    widths = []
    for size in (10, 1000):
        found = report(*rights("donotanswer", size * 7 // 10, size * 3 // 10))
        value, low, high = found["score"]
        assert low < value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
    certain = report(*rights("donotanswer", 10, 0))["score"]
    assert certain[0] == certain[2] == 1.0
    assert certain[1] < 0.95


def test_rows_that_are_too_long_are_counted() -> None:
    found = report(row("x", "1 a", "0 b"), row("x", "none a", "0 b"))
    assert (found["rows"], found["too_long"]) == (1, 1)
    with pytest.raises(DataError, match="too long"):
        report(row("x", "none a", "0 b"))


# -- files -----------------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "subset": "Math", "prompt": "Name a fish.", "chosen": "Trout.", "rejected": "Owl."},
    {"id": "b", "subset": "Math", "prompt": "Name a fowl.", "chosen": "Hen.", "rejected": "Bat."},
]


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    for kind in ("jsonl", "json", "parquet", "csv"):
        items, dropped, _ = read_items(read_rows(tmp_path / f"a.{kind}"), "a")
        assert not dropped
        assert [(i.id, i.query.text, i.answers) for i in items] == [
            ("a", "Name a fish.", ("Trout.", "Owl.")),
            ("b", "Name a fowl.", ("Hen.", "Bat.")),
        ]


def test_conversations_and_numbered_columns() -> None:
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    asked = [*before, {"role": "user", "content": "Name a fish."}]
    answer = {"role": "assistant", "content": "A trout."}
    other = {"role": "assistant", "content": "An owl."}
    whole, prior = read(
        {"chosen": [*asked, answer], "rejected": [*asked, other]},
        {"prompt": asked, "chosen": "A trout.", "rejected": "An owl."},
    )
    assert whole.query.messages == prior.query.messages
    assert whole.answers == prior.answers == ("A trout.", "An owl.")
    assert (whole.id, whole.subset) == (prior.id, "mine")
    (several,) = read({"prompt": "q", "chosen": "a", "rejected_1": "b", "rejected_2": "c"})
    assert several.rejected == ("b", "c")


def test_unusable_rows_are_counted_by_reason() -> None:
    rows = [
        row("x", "a", "b"),
        row("x", "a", "a"),
        row("x", "a", None),
        row("x", "a", []),
        {"chosen": "a", "rejected": "b"},
        {
            side: [{"role": "user", "content": side}, {"role": "assistant", "content": answer}]
            for side, answer in (("chosen", "a"), ("rejected", "b"))
        },
    ]
    items, dropped, examples = read_items(((f"line {i}", r) for i, r in enumerate(rows, 1)), "x")
    assert len(items) == 1
    assert dropped == {"equal": 1, "malformed": 2, "unknown_shape": 1, "prompts_differ": 1}
    assert examples[0].startswith("line 2: ")
    assert examples[1].startswith("line 3: rejected must be a text")


# -- a policy as a reward model --------------------------------------------------------------------

FISH = Query("q", (Message("user", "What does the bear eat?"),))
ANSWERS = ("The bear eats honey.", "Tea.")


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [
        str(make_checkpoint(tmp_path / name, "llama", seed)) for name, seed in (("a", 1), ("b", 2))
    ]


def sums(source: str) -> tuple[list[float], list[int]]:
    loaded = load_model(source, Policy(model=source, device="cpu", dtype="float32"))
    triple = Triple("q", FISH.messages, None, {"good": ANSWERS[0], "bad": ANSWERS[1]})
    names = ("plain/good", "plain/bad")
    found = score_records(loaded.model, loaded.chat.tokenizer, [triple], names)
    return [float(found[n][0][0]) for n in names], [int(found[n][1][0]) for n in names]


def test_the_implicit_reward_is_betas_share_of_the_log_ratio(models: list[str]) -> None:
    policy = Policy(model=models[0], device="cpu", dtype="float32")
    (mine, lengths), (theirs, _) = sums(models[0]), sums(models[1])
    asked = [(FISH, a) for a in ANSWERS]
    free = ImplicitReward(policy, None, beta=0.5).score_all(asked)
    assert free == pytest.approx([0.5 * m for m in mine], rel=1e-5)
    ratio = ImplicitReward(policy, models[1], beta=0.5).score_all(asked)
    expected = [0.5 * (m - t) for m, t in zip(mine, theirs, strict=True)]
    assert ratio == pytest.approx(expected, rel=1e-4)
    mean = ImplicitReward(policy, models[1], beta=0.5, per_token=True).score_all(asked)
    assert mean == pytest.approx([e / n for e, n in zip(expected, lengths, strict=True)], rel=1e-4)
    same = ImplicitReward(policy, models[0]).score_all(asked)
    assert same == pytest.approx([0.0, 0.0], abs=1e-6)


def test_what_exceeds_the_context_has_no_score(models: list[str]) -> None:
    policy = Policy(model=models[0], device="cpu", dtype="float32")
    found = ImplicitReward(policy, None).score_all([(FISH, "honey " * 5000), (FISH, "Tea.")])
    assert found[0] is None
    assert found[1] is not None


def test_a_reference_of_another_family_is_refused(models: list[str], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "qwen2")
    policy = Policy(model=models[0], device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="different tokens"):
        ImplicitReward(policy, str(other)).score_all([(FISH, "Tea.")])
