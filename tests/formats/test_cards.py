"""What cards say of a run with several iterations, and of its settings."""

import json
from pathlib import Path
from typing import Any

from selfsteer.formats.cards import model_card, warnings_of
from selfsteer.formats.hub import plan_upload
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
            notes = {"selection": {"text": f"step {k} of 9 kept", "warnings": [f"odd {k}"]}}
            more = {"notes": notes} if title == "policy" else {}
            lines.append(entry("finish", stage, kind) | of | counts | more)
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


def test_the_card_says_which_steps_were_kept_and_what_the_run_warned_of(tmp_path: Path) -> None:
    of = last_round(tmp_path / "three", "iterations=3", "training.epochs=3")
    (of.folder / "policy.selection.json").write_text(
        json.dumps({"chosen": 3, "steps": 9, "wins": None, "candidates": []})
    )
    card = model_card(of)
    assert "- Selection, iteration 2: step 2 of 9 kept\n" in card
    assert "- Selection, iteration 3: step 3 of 9 kept: 1 of 3 epochs\n" in card
    warned = [f"iteration-{k}/policy: odd {k}" for k in (1, 2, 3)]
    assert "## Warnings\n\n" + "\n".join(f"- {x}" for x in warned) + "\n\n" in card
    assert warnings_of(of) == warned
    assert warnings_of(of, data=True) == warned[:2]
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert plan_upload(tmp_path, "me/model", private=True).warnings == warned
