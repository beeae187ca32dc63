"""Good over plain: the answer under the good principle is preferred to what the policy says itself.

The distillation pair of Open Character Training (arXiv 2511.01689), with the policy as its own
teacher and without the paper's KL term: β 0.1, and 0.1 of the NLL of the good answer.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, plain_pair
from selfsteer.objectives import Term
from selfsteer.recipe.sections import PolicyTraining
from selfsteer.run.stage import Artifact
from selfsteer.stages.sample import Sample

#: Weight of the NLL (arXiv 2511.01689).
NLL = 0.1


class GoodOverPlain(PrincipledPairs):
    """The good answer is preferred to the plain one, under the plain context."""

    method: Literal["good-over-plain"] = "good-over-plain"
    training: PolicyTraining = PolicyTraining()

    pair: ClassVar[str] = (
        "The chosen one was written under a good principle, which was then taken away, and the "
        "rejected one to the prompt alone"
    )
    bad_on_purpose: ClassVar[bool] = False

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        asked = self.ask(plan, policy)
        samples = plan(Sample(asked, {"good": policy, "plain": policy}, self.sampling))
        pairs = self.pairs(plan, samples, policy, plain=1.0)
        # of a pair the good response is the chosen one, the bad one whatever was rejected
        pair = (Term("plain", "good", "bad", sft=NLL),)
        objective = replace(plain_pair(self.training), name=self.method, terms=pair)
        return self.train(plan, pairs, policy, objective, self.training)
