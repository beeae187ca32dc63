"""The rejected answers of a run go from bad to plain, the same queries first."""

from itertools import pairwise
from pathlib import Path

import pytest

from selfsteer.errors import ConfigError
from selfsteer.methods import load_recipe
from selfsteer.recipe.sections import Hygiene
from selfsteer.run.folder import RunFolder
from selfsteer.run.stage import Artifact
from selfsteer.stages.filter import WritePairs, rejected_by
from selfsteer.stages.inputs import stored_preferences
from selfsteer.stages.measure import MeasureQuality
from selfsteer.stages.sample import Sample
from tests.make import SMALL, stages_of, triple, write_jsonl

CHECKPOINT = Artifact(Path(__file__).parents[2] / "src/selfsteer/testbed/checkpoint")


def test_a_larger_share_of_plain_answers_holds_the_smaller_one(tmp_path: Path) -> None:
    said = {"good": "Good one.", "bad": "Bad one.", "plain": "Plain one."}
    rows = [triple(f"q{i}", text=f"Question {i}?", **said) for i in range(40)]
    samples = Artifact(write_jsonl(tmp_path / "samples.jsonl", *(t.to_dict() for t in rows)))
    recipe = load_recipe("bad-to-plain", [*SMALL, "iterations=5"])
    shares: list[set[str]] = []
    for k in range(1, 6):
        planned = stages_of(recipe)[f"iteration-{k}/preferences"]
        assert isinstance(planned, WritePairs)
        run = RunFolder(tmp_path / str(k))
        stage = WritePairs(samples, CHECKPOINT, Hygiene(), 512, plain=planned.plain)
        stage.run(run)
        pairs = list(stored_preferences(run / stage.outputs[0]))
        assert {p.chosen for p in pairs} == {"Good one."}
        assert {p.rejected for p in pairs} <= {"Bad one.", "Plain one."}
        shares.append({p.id for p in pairs if p.rejected == "Plain one."})
    assert all(a < b for a, b in pairwise(shares))
    assert (len(shares[0]), len(shares[-1])) == (0, 40)
    assert 12 <= len(shares[2]) <= 28, "about half"


def test_a_plain_answer_that_is_not_rejected_drops_no_pair(tmp_path: Path) -> None:
    """It may equal the good one, or be empty: that teaches nothing where it is rejected alone."""
    said = {"good": "Good one.", "bad": "Bad one."}
    rows = [
        triple(f"q{i}", text=f"Question {i}?", plain=("Good one.", "")[i % 2], **said)
        for i in range(40)
    ]
    samples = Artifact(write_jsonl(tmp_path / "samples.jsonl", *(t.to_dict() for t in rows)))
    run = RunFolder(tmp_path / "run")
    stage = WritePairs(samples, CHECKPOINT, Hygiene(), 512, plain=0.5)
    result = stage.run(run)
    plain = {t.id for t in rows if rejected_by(stage.seed, 0.5)(t.id) == "plain"}
    assert 0 < len(plain) < 40
    kept = {p.id: p.rejected for p in stored_preferences(run / stage.outputs[0])}
    assert kept == {t.id: "Bad one." for t in rows if t.id not in plain}
    equal = sum(t.responses["plain"] != "" for t in rows if t.id in plain)
    assert result.dropped == {"good_equals_bad": equal, "empty": len(plain) - equal}


def test_only_what_a_round_compares_is_sampled() -> None:
    made = stages_of(load_recipe("bad-to-plain", SMALL))
    asked, gaps = [], []
    for k in (1, 2, 3):
        sample, quality = (made[f"iteration-{k}/{t}"] for t in ("samples", "quality"))
        assert isinstance(sample, Sample)
        assert isinstance(quality, MeasureQuality)
        asked.append(list(sample.writers))
        gaps.append(quality.principled is not None)
    assert asked == [["good", "bad"], ["good", "bad", "plain"], ["good", "plain"]]
    assert gaps == [True, False, False]


def test_one_round_has_no_way_to_go() -> None:
    with pytest.raises(ConfigError, match="iterations"):
        load_recipe("bad-to-plain", [*SMALL, "iterations=1"])
    with pytest.raises(ConfigError, match=r"bad-to-plain .* iterations"):
        load_recipe("pbaa", [*SMALL, "baseline=bad-to-plain"])
