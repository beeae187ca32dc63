"""Settings of the pair loss, from a recipe to the losses that a step is made of."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsteer.models.load import load_model
from selfsteer.objectives import Budget, ContrastMargin, Objective
from selfsteer.recipe.sections import Loading, Policy, resolve_path
from selfsteer.run.folder import RunFolder
from selfsteer.run.stage import Artifact
from selfsteer.stages.figures import FigurePairs, stored_figures
from selfsteer.stages.train import Train
from selfsteer.training.preference import PreferenceTask
from tests.make import make_checkpoint, recipe, stages_of, tiny_pairs, write_pairs
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


def test_a_step_weighs_each_pair_and_asks_for_its_margin(tmp_path: Path) -> None:
    """The model is the reference: -log σ(-β·margin), times the weight, for each pair its own."""
    policy = Policy.model_validate({"model": "x", "device": "cpu"})
    loaded = load_model(str(make_checkpoint(tmp_path / "start", "llama")), policy)
    objective = replace(Objective.named("pbaa", weighting="dora"), margin=ContrastMargin())
    figures = [{"weights": 0.5 + i, "margins": 4.0 * i} for i in range(3)]
    examples = [
        replace(e, figures=own)
        for e, own in zip(make_examples(loaded, objective, 3), figures, strict=True)
    ]
    order = [2, 0, 1]
    task = PreferenceTask(loaded, objective, examples)
    found, metrics = task.loss(loaded.model, [examples[i] for i in order])
    expected = [(0.5 + i) * math.log1p(math.exp(0.4 * i)) for i in order]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    means = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    assert (means["weight/query"], means["margin/query"]) == (1.5, 4.0)


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


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_noise_takes_off_what_the_start_does_not_know(tmp_path: Path, layout: str) -> None:
    source = resolve_path("package:selfsteer.testbed/checkpoint")
    pairs = tiny_pairs(3, seed=0)
    given = Artifact(write_pairs(tmp_path / "pairs.jsonl", pairs))
    objective = Objective.named("pbaa", noise=0.6)
    loading = Loading.model_validate({"device": "cpu", "layout": layout})
    stage = FigurePairs(given, None, Artifact(Path(source)), objective, 512, loading=loading)
    result = stage.run(RunFolder(tmp_path))
    loaded = load_model(source, loading)
    expected = {}
    for pair in pairs:
        s = loaded.chat.sequence(pair.to_triple(), "plain/bad")
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[*s.prompt_ids, *s.response_ids]])).logits[0]
        masses = logits[len(s.prompt_ids) - 1 : -1].double().softmax(-1)
        unknown = 1 - (masses**2).sum(-1)
        assert len(unknown) == len(s.response_ids)
        expected[pair.id] = 0.5 * 0.6**2 * float(unknown.sum())
    found = {id: f["margins"] for id, f in stored_figures(tmp_path / "figures.jsonl").items()}
    assert found == pytest.approx(expected, rel=1e-4)
    assert result.notes["margins"] == pytest.approx(sum(expected.values()) / 3, rel=1e-4)
