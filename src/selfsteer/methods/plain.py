"""What methods without principles share: plain answers in pairs, then one plain term."""

from abc import abstractmethod
from collections.abc import Iterator

from typing_extensions import override

from selfsteer.methods.base import Paired, Plan, plain_pair
from selfsteer.recipe.sections import ComparedRanking, GrownQueries, Ranking, Sampling, Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.rank import RankAnswers


def written_plainly(method: str, training: Training) -> Iterator[str]:
    """The fault of a training that asks for principles where answers are written without one."""
    if training.weighting == "dora":
        yield (
            "training.weighting dora asks under which principle an answer was written, and method "
            f"{method} trains on answers that are written without one; use wpo"
        )


def all_alike(method: str, sampling: Sampling) -> Iterator[str]:
    """The fault of a sampling that gives every answer to a query alike."""
    if sampling.temperature == 0:
        yield (
            f"method {method} needs answers that differ, and at sampling.temperature 0 there is "
            "only one"
        )


class Plain(Paired):
    """A method whose pairs are made of plain answers (docs/methods.md)."""

    training: Training = Training()

    @abstractmethod
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        """Plans what makes a chosen and a rejected answer to every query."""

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        return self.learnt_from(plan, self.opposed(plan, policy), policy)

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from written_plainly(self.method, self.training)

    def learnt_from(self, plan: Plan, opposed: Artifact, policy: Artifact) -> Artifact:
        """The policy trained on what `opposed` planned."""
        pairs = self.pairs(plan, opposed, policy)
        return self.train(plan, pairs, policy, plain_pair(self.training), self.training)


class Ranked(Plain):
    """A method that ranks n plain answers per query."""

    queries: GrownQueries
    ranking: Ranking = Ranking()

    @override
    def faults(self) -> Iterator[str]:
        """Settings under which there is nothing to rank, too."""
        yield from all_alike(self.method, self.sampling)
        if self.sampling.keep_unfinished:
            yield f"method {self.method} ranks finished answers; unset sampling.keep_unfinished"
        yield from super().faults()


class RankedByJudge(Ranked):
    """A method whose n plain answers per query a judge ranks, or the policy as one."""

    ranking: ComparedRanking = ComparedRanking()

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        ranking = self.ranking
        return plan(
            RankAnswers(
                plan.queries,
                policy,
                ranking.samples,
                self.ranker,
                self.sampling,
                order=ranking.order,
            )
        )

    @override
    def faults(self) -> Iterator[str]:
        if self.ranking.order == "climb" and self.ranker and not self.ranker.only_compares:
            yield (
                "ranking.order: climb is for judges that only compare, and judge "
                f"{self.ranker.kind} scores each answer once; remove it"
            )
        yield from super().faults()
