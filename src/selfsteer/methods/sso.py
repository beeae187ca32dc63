"""SSO v2, the generator way: a generator trained from the policy writes the preferences."""

from typing import Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, named, plain_pair
from selfsteer.recipe.sections import Filter, Generator, Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.evaluate import Exhibit
from selfsteer.stages.filter import FilterTriples
from selfsteer.stages.sample import Sample


class SSO(PrincipledPairs):
    """Triples train a generator, the generator writes the pairs (SSO v2, arXiv 2410.17131)."""

    method: Literal["sso"] = "sso"
    generator: Generator = Generator()
    training: Training = Training()
    filter: Filter | None = Field(None, description="v1's log-prob filter on triples; null: off")

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        asked = self.ask(plan, policy)
        everyone = {"plain": policy, "good": policy, "bad": policy}
        limit = self.generator.queries
        triples = plan(Sample(asked, everyone, self.sampling, limit, title="triples"))
        kept = plan(
            FilterTriples(
                triples, policy, self.hygiene, active(self.filter), self.principles.catalogue
            )
        )
        good, bad = self.generators(plan, kept, policy)
        samples = plan(Sample(asked, {"good": good, "bad": bad}, self.sampling))
        pairs = self.pairs(plan, samples, policy, principled=asked, triples=kept)
        objective = plain_pair(self.training)
        return self.train(plan, pairs, policy, objective, self.training, principled=asked)

    def generators(
        self, plan: Plan, triples: Artifact, policy: Artifact
    ) -> tuple[Artifact, Artifact]:
        """Who writes the good and the bad responses: one generator, or one per half of the loss."""
        settings = self.generator

        def trained(name: str, title: str, *contexts: str) -> Artifact:
            objective = named(name, settings)
            return self.train(
                plan, triples, policy, objective, settings, contexts=contexts, title=title
            )

        if settings.per_half:
            return (
                trained("sso-plus-only", "generator/plus", "good"),
                trained("sso-minus-only", "generator/minus", "bad"),
            )
        made = trained(settings.objective, "generator", "good", "bad")
        plan.exhibit = Exhibit({"policy": policy, "generator": made}, self.principles)
        return made, made

    @property
    @override
    def shortest(self) -> int:
        return min(self.training.max_length, self.generator.max_length)

    @override
    def sampled_models(self) -> dict[str, bool]:
        return {"the generator": True, **super().sampled_models()}

    @override
    def answers_in_process(self) -> bool:
        return super().answers_in_process() or self.generator.selection.points > 0


def active(settings: Filter | None) -> Filter | None:
    """v1's filter; None where it is off."""
    return settings if settings is not None and settings.enabled else None
