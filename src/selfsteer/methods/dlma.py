"""DLMA (arXiv 2402.11907): PBAA's pairs, each with a margin that the principles themselves say.

The margin is how much more the good principle makes of the chosen answer than of the rejected one.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, plain_pair
from selfsteer.objectives import SUMMED, ContrastMargin
from selfsteer.recipe.sections import Margin, Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.sample import Sample


class DLMA(PrincipledPairs):
    """Pairs of answers under both principles, with a margin of their contrast."""

    method: Literal["dlma"] = "dlma"
    margin: Margin = Margin()
    training: Training = Training()

    by_contrast: ClassVar[bool] = True

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        asked = self.ask(plan, policy)
        samples = plan(Sample(asked, {"good": policy, "bad": policy}, self.sampling))
        pairs = self.pairs(plan, samples, policy, principled=asked)
        margin = ContrastMargin(self.margin.weight, self.margin.bound)
        objective = replace(plain_pair(self.training), name=self.method, margin=margin)
        return self.train(plan, pairs, policy, objective, self.training, principled=asked)

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.training.base not in SUMMED:
            yield (
                f"method {self.method} needs training.base sigmoid or hinge: its margin is of "
                f"log-prob sums, and base {self.training.base} compares means"
            )
