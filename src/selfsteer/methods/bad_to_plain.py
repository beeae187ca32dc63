"""Bad to plain: PBAA over rounds whose rejected answers grow harder (after arXiv 2409.17534).

How the paper controls the gap between its two answers could not be read. Here a share of the
queries, larger with each round, takes the plain answer as the rejected one.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, plain_pair
from selfsteer.methods.plain import written_plainly
from selfsteer.recipe.sections import Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.sample import Sample


class BadToPlain(PrincipledPairs):
    """The good answer is preferred to the bad one at first, and to the plain one at last."""

    method: Literal["bad-to-plain"] = "bad-to-plain"
    iterations: int = Field(
        3,
        description="rounds; no rejected answer is plain in the first, all in the last",
        ge=2,
        le=1000,
    )
    training: Training = Training()

    pair: ClassVar[str] = (
        "The chosen one was written under a good principle; the rejected one under a bad one or, "
        "the more often the later the iteration, to the prompt alone. The principles were then "
        "taken away"
    )

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        plain = (k - 1) / (self.iterations - 1)
        needed = {"good": True, "bad": plain < 1, "plain": plain > 0}
        writers = {name: policy for name, needs in needed.items() if needs}
        asked = self.ask(plan, policy)
        samples = plan(Sample(asked, writers, self.sampling))
        # a steering gap is one of good and bad answers
        principled = None if plain else asked
        pairs = self.pairs(plan, samples, policy, principled=principled, plain=plain)
        return self.train(plan, pairs, policy, plain_pair(self.training), self.training)

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from written_plainly(self.method, self.training)
