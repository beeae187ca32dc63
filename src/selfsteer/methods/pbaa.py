"""PBAA, principle-based automated alignment: the policy itself writes the preferences.

The baseline that SSO is measured against (SSO v2, §4): SSO without its generator.
"""

from typing import Literal

from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, plain_pair
from selfsteer.recipe.sections import Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.sample import Sample


class PBAA(PrincipledPairs):
    """Pairs of answers under the good and the bad principle (SSO v2's baseline)."""

    method: Literal["pbaa"] = "pbaa"
    training: Training = Training()

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        """Pairs of the policy's own good and bad answers, then one plain term."""
        asked = self.ask(plan, policy)
        samples = plan(Sample(asked, {"good": policy, "bad": policy}, self.sampling))
        pairs = self.pairs(plan, samples, policy, principled=asked)
        objective = plain_pair(self.training)
        return self.train(plan, pairs, policy, objective, self.training, principled=asked)
