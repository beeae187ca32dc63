"""What methods without principles share: plain answers in pairs, then one plain term."""

from abc import abstractmethod

from typing_extensions import override

from selfsteer.methods.base import Aligning, Plan, plain_pair
from selfsteer.recipe.sections import Training
from selfsteer.run.stage import Artifact


class Plain(Aligning):
    """A method whose pairs are made of plain answers (docs/methods.md)."""

    training: Training = Training()

    @abstractmethod
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        """Plans what makes a chosen and a rejected answer to every query."""

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        pairs = self.pairs(plan, self.opposed(plan, policy), policy)
        return self.train(plan, pairs, policy, plain_pair(self.training), self.training)
