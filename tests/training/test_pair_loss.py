"""Settings of the pair loss, from a recipe to the losses that a step is made of."""

from pathlib import Path
from typing import Any

import pytest

from selfsteer.models.load import load_model
from selfsteer.objectives import Budget, Objective
from selfsteer.recipe.sections import Policy
from selfsteer.stages.train import Train
from selfsteer.training.preference import PreferenceTask
from tests.make import make_checkpoint, recipe, stages_of
from tests.training.test_trainer import make_examples


def objective_of(made: Any, title: str = "policy") -> Objective:
    stage = stages_of(made)[f"iteration-1/{title}"]
    assert isinstance(stage, Train)
    assert isinstance(stage.objective, Objective)
    return stage.objective


def test_the_settings_of_each_training_are_its_own() -> None:
    given = {"training": {"budget": {"slack": 0}, "ceiling": 3}, "generator": {"budget": {}}}
    made = recipe("sso", **given)
    policy, generator = objective_of(made), objective_of(made, "generator")
    assert (policy.budget, policy.base.ceiling) == (Budget(1.0, 0.0), 3.0)
    assert (generator.budget, generator.base.ceiling) == (Budget(1.0, 0.1), None)
    assert objective_of(recipe("pbaa")).budget is None


def test_a_step_pays_for_what_chosen_answers_lost(tmp_path: Path) -> None:
    """The reference is 0.05 nats a token above the model, 0.02 are free: 2 · 0.03 a token."""
    policy = Policy.model_validate({"model": "x", "device": "cpu"})
    loaded = load_model(str(make_checkpoint(tmp_path / "start", "llama")), policy)
    free, held = (
        Objective.named("pbaa"),
        Objective.named("pbaa", budget={"weight": 2, "slack": 0.02}),
    )
    examples = make_examples(loaded, free, 4, shift=0.05)
    losses = []
    for objective in (free, held):
        loss, metrics = PreferenceTask(loaded, objective, examples).loss(loaded.model, examples)
        losses.append(loss)
    tokens = [len(e.sequences["plain/good"].response_ids) for e in examples]
    assert len(set(tokens)) > 1
    extra = (losses[1] - losses[0]).tolist()
    assert extra == pytest.approx([2 * 0.03 * n for n in tokens], rel=1e-3)
    total, count = metrics["budget_loss"]
    assert float(total) / float(count) == pytest.approx(0.03 * sum(tokens) / 4, rel=1e-3)
