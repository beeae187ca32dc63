"""SPIN whose judge says which answer is chosen: DNPO's labels (arXiv 2502.05400).

The other half of the paper, noise on the reference that is trained against the policy, is left out.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.spin import Given
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.run.stage import Artifact
from selfsteer.stages.inputs import Share
from selfsteer.stages.oppose import Relabel


class JudgedSPIN(Given):
    """A given answer and the policy's own, in the order that the judge gives them."""

    method: Literal["spin-judged"] = "spin-judged"

    pair: ClassVar[str] = (
        "One came with the prompt and the other was written by a model; a judge said which of them "
        "is the chosen one"
    )
    either_side: ClassVar[bool] = True

    @property
    @override
    def ranker(self) -> JudgeConfig | None:
        return self.judge

    @override
    def opposed(self, plan: Plan, policy: Artifact, share: Share | None = None) -> Artifact:
        assert self.judge is not None
        pairs = super().opposed(plan, policy, share)
        return plan(Relabel(pairs, self.judge, self.sampling.shard_size))

    @override
    def faults(self) -> Iterator[str]:
        if self.judge is None:
            yield "method spin-judged needs a judge that says which answer is chosen; set judge"
        elif self.judge.kind == "human":
            yield "human labels cannot compare answers that are sampled now; set another judge"
        yield from super().faults()
