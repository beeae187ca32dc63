"""Self-rewarding (arXiv 2401.10020): the policy ranks its own plain answers.

Less than the paper: it scores one answer at a time and adds seed data for judging.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.best_of_n import answers_must_differ
from selfsteer.methods.plain import Plain
from selfsteer.recipe.sections import GrownQueries, Ranking
from selfsteer.run.stage import Artifact
from selfsteer.stages.rank import RankAnswers


class SelfRewarding(Plain):
    """n plain answers per query, ranked by the policy that wrote them."""

    method: Literal["self-rewarding"] = "self-rewarding"
    queries: GrownQueries
    ranking: Ranking = Ranking()

    pair: ClassVar[str] = (
        "Both were written by a model to the prompt alone; of several it ranked the chosen one "
        "first and the rejected one last itself"
    )

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        return plan(RankAnswers(plan.queries, policy, self.ranking.samples, None, self.sampling))

    @override
    def answers_in_process(self) -> bool:
        """The policy judges here."""
        return True

    @override
    def faults(self) -> Iterator[str]:
        yield from answers_must_differ(self)
        yield from super().faults()
