"""Best of n: a judge ranks plain answers; the best against the worst."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.plain import Plain
from selfsteer.recipe.sections import GrownQueries, JudgeConfig, JudgedRanking
from selfsteer.run.stage import Artifact
from selfsteer.stages.rank import RankAnswers


class BestOfN(Plain):
    """n plain answers per query, ranked by a judge."""

    method: Literal["best-of-n"] = "best-of-n"
    queries: GrownQueries
    ranking: JudgedRanking = JudgedRanking()

    pair: ClassVar[str] = (
        "Both were written by a model to the prompt alone; of several a judge ranked the chosen "
        "one first and the rejected one last"
    )

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        judge = self.ranking.judge or self.judge
        return plan(RankAnswers(plan.queries, policy, self.ranking.samples, judge, self.sampling))

    @property
    @override
    def judges(self) -> tuple[JudgeConfig, ...]:
        return (*super().judges, *([self.ranking.judge] if self.ranking.judge else []))

    @override
    def faults(self) -> Iterator[str]:
        ranker = self.ranking.judge or self.judge
        if ranker is None:
            yield "method best-of-n needs a judge that ranks: set ranking.judge or judge"
        elif ranker.kind == "human":
            yield "human labels cannot rank answers that are sampled now; set ranking.judge"
        yield from answers_must_differ(self)
        yield from super().faults()


def answers_must_differ(recipe: Plain) -> Iterator[str]:
    """Settings under which there is nothing to rank."""
    method, sampling = recipe.method, recipe.sampling
    if sampling.temperature == 0:
        yield (
            f"method {method} needs answers that differ, and at sampling.temperature 0 there is "
            "only one"
        )
    if sampling.keep_unfinished:
        yield f"method {method} ranks finished answers; unset sampling.keep_unfinished"
