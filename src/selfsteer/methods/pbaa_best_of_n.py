"""PBAA, best of n: of n answers on each side, those that the principles find furthest apart.

The picking is that of best of n by principles, on answers that were written under them.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, plain_pair
from selfsteer.methods.plain import all_alike
from selfsteer.recipe.sections import ContrastRanking, Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.contrasting import PickFurthest
from selfsteer.stages.sample import Sample


class PBAABestOfN(PrincipledPairs):
    """PBAA's pairs, of the best of n good answers and the worst of n bad ones."""

    method: Literal["pbaa-best-of-n"] = "pbaa-best-of-n"
    ranking: ContrastRanking = ContrastRanking()
    training: Training = Training()

    by_contrast: ClassVar[bool] = True
    pair: ClassVar[str] = (
        "The chosen one was written under a good principle and the rejected one under a bad one; "
        "of several each, the principles found these furthest apart, and were then taken away"
    )

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        asked, writers = self.ask(plan, policy), {"good": policy, "bad": policy}
        answers = [
            plan(Sample(asked, writers, self.sampling, title=f"answers/{i}"))
            for i in range(1, self.ranking.samples + 1)
        ]
        samples = plan(PickFurthest(tuple(answers), policy, self.ranking.clip))
        pairs = self.pairs(plan, samples, policy, principled=asked)
        objective = plain_pair(self.training)
        return self.train(plan, pairs, policy, objective, self.training, principled=asked)

    @override
    def faults(self) -> Iterator[str]:
        yield from all_alike(self.method, self.sampling)
        yield from super().faults()
