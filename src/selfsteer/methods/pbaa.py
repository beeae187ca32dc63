"""PBAA, principle-based automated alignment: the policy itself writes the preferences.

The baseline that SSO is measured against (SSO v2, §4): SSO without its generator.
"""

from typing import Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, plain_pair
from selfsteer.recipe.sections import Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.sample import Sample


def pbaa_round(recipe: PrincipledPairs, plan: Plan, asked: Artifact, policy: Artifact) -> Artifact:
    """Pairs of the policy's own good and bad answers, then one plain term."""
    samples = plan(Sample(asked, {"good": policy, "bad": policy}, recipe.sampling))
    pairs = recipe.pairs(plan, samples, policy, principled=asked)
    objective = plain_pair(recipe.training)
    return recipe.train(plan, pairs, policy, objective, recipe.training, principled=asked)


class PBAA(PrincipledPairs):
    """Pairs of answers under the good and the bad principle (SSO v2's baseline)."""

    method: Literal["pbaa"] = "pbaa"
    training: Training = Training()

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        return pbaa_round(self, plan, self.ask(plan, policy), policy)


class WithBaseline(PrincipledPairs):
    """A method that PBAA can be run beside, on the same queries and principles."""

    baseline: Literal["pbaa"] | None = Field(
        None, description="also run PBAA, on the same queries and principles; null: no baseline"
    )

    @property
    @override
    def methods(self) -> tuple[str, ...]:
        return (self.method, *([self.baseline] if self.baseline else []))

    @override
    def after_rounds(self, plan: Plan) -> None:
        super().after_rounds(plan)
        if self.baseline is None:
            return
        policy = plan.base
        for k, asked in enumerate(plan.asked, 1):
            with plan.at(self.baseline, k, f"baseline/iteration-{k}"):
                policy = pbaa_round(self, plan, asked, policy)
            plan.policies[self.baseline].append(policy)
