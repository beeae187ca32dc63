import math
from pathlib import Path

import pytest
import torch

from selfsteer.methods import load_recipe
from selfsteer.objectives import Objective, steering_loss
from selfsteer.run.execute import execute
from selfsteer.stages.inputs import stored_preferences, stored_triples
from selfsteer.stages.train import Train
from tests.make import SMALL


def test_the_good_answer_is_chosen_and_the_plain_one_rejected(tmp_path: Path) -> None:
    recipe = load_recipe("good-over-plain", [*SMALL, f"runs_dir={tmp_path}"])
    execute(recipe, {"name": "given"}, until="preferences")
    folder = recipe.folder / "iteration-1"
    samples = {t.id: t.responses for t in stored_triples(folder / "samples")}
    pairs = list(stored_preferences(folder / "preferences"))
    assert pairs
    for pair in pairs:
        assert (pair.chosen, pair.rejected) == (samples[pair.id]["good"], samples[pair.id]["plain"])


def test_its_loss_by_hand() -> None:
    """-log σ(0.1·((-4 + 6) - (-5 + 5))) + 0.1·(4 / 2): one query, answers of 2 tokens."""
    (training,) = (s for s in load_recipe("good-over-plain", SMALL).plan() if isinstance(s, Train))
    policy = {"plain/good": torch.tensor([-4.0]), "plain/bad": torch.tensor([-6.0])}
    reference = {"plain/good": torch.tensor([-5.0]), "plain/bad": torch.tensor([-5.0])}
    lengths = {name: torch.tensor([2]) for name in policy}
    assert isinstance(training.objective, Objective)
    found = steering_loss(training.objective, policy, reference, lengths)
    assert found.loss.item() == pytest.approx(math.log1p(math.exp(-0.2)) + 0.1 * 2, rel=1e-6)
