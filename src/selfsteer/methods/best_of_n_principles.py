"""Best of n by principles: the contrast of the principles ranks plain answers; no judge is asked.

The ranker is the reward of contrast distillation, for whole answers (DLMA's, arXiv 2402.11907, with
a clip per token in place of one per answer).
"""

from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan, Principled
from selfsteer.methods.plain import Ranked
from selfsteer.recipe.sections import ContrastRanking, Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.rank import RankAnswers


class BestOfNByPrinciples(Principled, Ranked):
    """n plain answers per query, ranked by what the principles make of them."""

    method: Literal["best-of-n-principles"] = "best-of-n-principles"
    ranking: ContrastRanking = ContrastRanking()
    training: Training = Training()

    by_contrast: ClassVar[bool] = True
    pair: ClassVar[str] = (
        "Both were written by a model to the prompt alone; of several the chosen one became most "
        "likely, and the rejected one least, under a good principle as against a bad one"
    )

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        asked, ranking = self.ask(plan, policy), self.ranking
        return plan(
            RankAnswers(asked, policy, ranking.samples, None, self.sampling, clip=ranking.clip)
        )
