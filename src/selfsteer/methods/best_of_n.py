"""Best of n: a judge ranks plain answers; the best against the worst."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.plain import RankedByJudge
from selfsteer.recipe.sections import JudgeConfig, JudgedRanking


class BestOfN(RankedByJudge):
    """n plain answers per query, ranked by a judge."""

    method: Literal["best-of-n"] = "best-of-n"
    ranking: JudgedRanking = JudgedRanking()

    pair: ClassVar[str] = (
        "Both were written by a model to the prompt alone; of several a judge ranked the chosen "
        "one first and the rejected one last"
    )

    @property
    @override
    def ranker(self) -> JudgeConfig | None:
        return self.ranking.judge or self.judge

    @property
    @override
    def judges(self) -> tuple[JudgeConfig, ...]:
        return (*super().judges, *([self.ranking.judge] if self.ranking.judge else []))

    @override
    def faults(self) -> Iterator[str]:
        if self.ranker is None:
            yield "method best-of-n needs a judge that ranks: set ranking.judge or judge"
        elif self.ranker.kind == "human":
            yield "human labels cannot rank answers that are sampled now; set ranking.judge"
        yield from super().faults()
