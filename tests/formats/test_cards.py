"""What cards say of a run with several iterations, and of its settings."""

from pathlib import Path
from typing import Any

from selfsteer.formats.cards import model_card
from selfsteer.methods import load_recipe
from selfsteer.view import RoundView, RunView
from tests.make import SMALL, entry, write_jsonl


def last_round(folder: Path, *settings: str) -> RoundView:
    """That of a run of pbaa, whose iteration k has trained on 10 - k pairs."""
    recipe = load_recipe("pbaa", [*SMALL, *settings])
    lines = list[dict[str, Any]]()
    for k in range(1, recipe.last_round + 1):
        of, counts = {"method": "pbaa", "round": k}, {"n_in": 11 - k, "n_out": 10 - k}
        for title, kind in (("preferences", "WritePairs"), ("policy", "Train")):
            stage = f"iteration-{k}/{title}"
            (folder / stage).mkdir(parents=True)
            lines.append(entry("finish", stage, kind) | of | counts)
    write_jsonl(folder / "ledger.jsonl", *lines)
    (folder / "resolved.json").write_text(recipe.model_dump_json())
    return RunView.open(folder).round()


def test_a_policy_was_trained_on_the_pairs_of_all_iterations(tmp_path: Path) -> None:
    card = model_card(last_round(tmp_path / "three", "iterations=3"))
    assert "Iteration: 3 of 3" in card
    assert "Trained on: 24 pairs: 9, 8 and 7 in iterations 1 to 3\n" in card
    for k in (1, 2, 3):
        assert f"| iteration-{k}/preferences | {11 - k} | {10 - k} |" in card
    card = model_card(last_round(tmp_path / "one"))
    assert "Trained on: 9 pairs\n" in card


def test_the_card_has_the_settings_that_are_not_at_their_default(tmp_path: Path) -> None:
    card = model_card(last_round(tmp_path / "plain", "training.save_every_steps=7"))
    (line,) = (x for x in card.splitlines() if x.startswith("- Training: "))
    assert line.rpartition(", ")[2] == "max_length 2048"
    assert "- LoRA" not in card
    given = (
        "policy.lora.rank=8",
        "training.weighting=wpo",
        "training.label_smoothing=0.1",
        "training.ceiling=2.0",
        "training.budget.slack=0.2",
        "training.selection.points=0",
        "training.reference=first",
    )
    card = model_card(last_round(tmp_path / "changed", *given))
    (line,) = (x for x in card.splitlines() if x.startswith("- Training: "))
    for said in (
        "max_length 2048",
        "weighting wpo",
        "label_smoothing 0.1",
        "ceiling 2.0",
        "budget (weight 1.0, slack 0.2)",
        "selection (points 0)",
        "reference first",
    ):
        assert said in line
    assert "- LoRA: rank 8, alpha 32, targets all-linear, bits None" in card
    noisy = model_card(last_round(tmp_path / "noisy", "training.noise=0.3"))
    assert "noise 0.3" in noisy
