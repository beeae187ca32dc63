"""A method of your own, on the tiny world that ships with the package.

`FirstBad` is the method of docs/house.md: its recipe class and its round are all that a method is.
It runs, resumes, is measured and evaluated as the shipped ones are. To give it to the command line
as well, follow the steps of docs/house.md.

    python examples/custom_method.py
    python examples/custom_method.py iterations=2 queries.limit=480
"""

import sys
from typing import Literal

from selfsteer import RunView, execute
from selfsteer.methods import METHODS
from selfsteer.methods.base import Plan, PrincipledPairs, plain_pair
from selfsteer.recipe.read import merge, validate
from selfsteer.recipe.sections import Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.sample import Sample


class FirstBad(PrincipledPairs):
    """The policy's good answer over the first policy's bad one."""

    method: Literal["first-bad"] = "first-bad"
    training: Training = Training()

    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        """One round: principles, two answers per query, pairs, a trained policy."""
        asked = self.ask(plan, policy)
        samples = plan(Sample(asked, {"good": policy, "bad": plan.base}, self.sampling))
        pairs = self.pairs(plan, samples, policy, principled=asked)
        objective = plain_pair(self.training)
        return self.train(plan, pairs, policy, objective, self.training, principled=asked)


SETTINGS = {
    "name": "first-bad",
    "method": "first-bad",
    "policy": {"model": "package:selfsteer.testbed/checkpoint", "threads": 1},
    "queries": {"path": "package:selfsteer.testbed/queries/align.jsonl", "limit": 240},
    "principles": {"max_new_tokens": 96, "batch_size": 256},
    "sampling": {"max_new_tokens": 96, "batch_size": 256},
    "training": {"learning_rate": 4e-4, "batch_size": 32, "row_tokens": 2048, "max_length": 512},
    "judge": "oracle",
    "evaluation": {"queries": {"path": "package:selfsteer.testbed/queries/final.jsonl"}},
}


def main() -> None:
    """Runs the method and prints what it did; arguments are KEY=VALUE, as for `selfsteer run`."""
    recipe = validate(FirstBad, merge(SETTINGS, sys.argv[1:]), "recipe of first-bad")
    execute(recipe)
    run = RunView.open(recipe.folder, (FirstBad, *METHODS))
    for made in run.rounds:
        pairs = made.quality.preferences
        print(f"{made.label}: {pairs.of:,} pairs, accuracy {pairs.accuracy:.3f}")
    for label, answers in run.evaluation.models.items():
        print(f"{label}: score {answers.score[0]:.3f}")


if __name__ == "__main__":
    main()
