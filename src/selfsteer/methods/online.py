"""SSO v1, the online way: the policy trains on its own triples, iteration after iteration."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.methods.base import Plan, PrincipledPairs, named
from selfsteer.methods.sso import active
from selfsteer.recipe.sections import Filter, OnlineQueries, OnlineTraining
from selfsteer.run.stage import Artifact
from selfsteer.stages.filter import FilterTriples
from selfsteer.stages.inputs import Share
from selfsteer.stages.sample import Sample


class SSOOnline(PrincipledPairs):
    """The policy is trained on its own triples with steering terms (SSO v1)."""

    method: Literal["sso-online"] = "sso-online"
    queries: OnlineQueries
    training: OnlineTraining = OnlineTraining()
    filter: Filter | None = Field(
        None, description="v1's log-prob filter on triples; null: on, as released"
    )

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        """Every iteration takes a slice of the queries."""
        size = self.queries.per_iteration
        asked = self.ask(plan, policy, Share(k, size, None if size else self.iterations))
        everyone = {"plain": policy, "good": policy, "bad": policy}
        triples = plan(Sample(asked, everyone, self.sampling, title="triples"))
        kept = plan(
            FilterTriples(
                triples,
                policy,
                self.hygiene,
                active(self.filter or Filter()),
                self.principles.catalogue,
                trained_on=True,
            )
        )
        self.pairs(plan, kept, policy, principled=asked, triples=kept, cleaned=True)
        return self.train(plan, kept, policy, named("sso-online", self.training), self.training)

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.hygiene.min_contrast is not None:
            yield (
                "hygiene.min_contrast sorts out pairs, and method sso-online trains on triples; "
                "set filter instead"
            )
