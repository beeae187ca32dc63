"""SGPO's improver, trained on the tiny world with scripted answers."""

from pathlib import Path

import pytest

from selfsteer.engines.base import Request
from selfsteer.errors import ConfigError
from selfsteer.methods import load_recipe
from selfsteer.run.execute import execute
from selfsteer.run.stage import Artifact
from selfsteer.stages.inputs import stored_triples
from selfsteer.stages.oppose import IMPROVE, LEAN, Improve
from selfsteer.stages.train import Train
from selfsteer.view import RunView
from tests.fakes import FakeEngine, answer_with
from tests.make import recipe as made_recipe
from tests.make import stages_of, tiny_pairs, write_pairs

OWN = (
    "policy={model: 'package:selfsteer.testbed/checkpoint', threads: 1}",
    "queries.near_duplicates=null",
    "sampling.max_new_tokens=64",
    "improver_training={learning_rate: 1e-3, batch_size: 4, epochs: 4}",
)


def test_the_policy_learns_to_improve_without_seeing_given_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tiny_pairs(10, seed=1)
    given = write_pairs(tmp_path / "given.jsonl", pairs)
    copied = {p.prompt[-1].content: p.chosen for p in pairs[:2]}

    def say(request: Request) -> str:
        if len(request.messages) == 1:
            return "My own answer."
        question, own, asked = (m.content for m in request.messages)
        assert own == "My own answer."
        wanted = next(p.chosen for p in pairs if p.prompt[-1].content == question)
        assert asked == f"{IMPROVE}\n\n{LEAN}{wanted}"
        return copied.get(question, "Improved answer: I am better now.")

    engine = answer_with(monkeypatch, FakeEngine(say))
    recipe = load_recipe("sgpo", [*OWN, f"queries.path={given}", f"runs_dir={tmp_path}"])
    execute(recipe, {"name": "given"}, until="improver/policy")
    assert len(engine.asked) == 20
    view = RunView.open(recipe.folder)
    stage = view.stage("LeanOnGiven")
    assert stage is not None
    assert stage.dropped == {"improver_no_change": 2}
    for example in stored_triples(recipe.folder / "improver/rewrites"):
        assert example.responses == {"good": "I am better now."}
        assert [m.content for m in example.messages[1:]] == ["My own answer.", IMPROVE]
    lines = view.curves["improver/policy"]
    assert lines[-1]["nll_loss"] < lines[0]["nll_loss"] / 2


def test_the_rounds_start_from_the_trained_improver(tmp_path: Path) -> None:
    given = write_pairs(tmp_path / "given.jsonl", tiny_pairs(2, seed=1))
    made = stages_of(load_recipe("sgpo", [*OWN, f"queries.path={given}"]))
    assert [name for name in made if name.startswith("improver")] == [
        f"improver/{title}" for title in ("samples", "opponents", "rewrites", "policy")
    ]
    trained = Artifact(Path("runs/sgpo/improver/policy"), made["improver/policy"])
    first, policy = made["iteration-1/improved"], made["iteration-1/policy"]
    assert isinstance(first, Improve)
    assert isinstance(policy, Train)
    assert (first.policy, policy.start, policy.reference) == (trained, trained, trained)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("improver=org/model", "its own improver"),
        ("improver_training.reference=first", "without a reference"),
        ("improver_training.selection={points: 2}", "leave selection unset"),
    ],
)
def test_what_contradicts_the_training_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("sgpo", [*OWN, "queries.path=q", setting])


def test_answers_must_fit_into_the_improvers_training_too() -> None:
    improver = {"max_length": 100}
    with pytest.raises(ConfigError, match="max_new_tokens 200 is longer than max_length 100"):
        made_recipe("sgpo", improver_training=improver, sampling={"max_new_tokens": 200})


def test_given_answers_are_asked_for_only_then() -> None:
    assert not made_recipe("sgpo").reads_answers
    assert made_recipe("sgpo", improver_training={}).reads_answers
