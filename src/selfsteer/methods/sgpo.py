"""SGPO (arXiv 2507.20181): the policy's answers, written again, against what they were.

Less than the paper: it trains policy and improver as one model first; here nothing is trained for
the rewriting.
"""

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.plain import Plain
from selfsteer.recipe.sections import EngineConfig, GrownQueries, WriterConfig
from selfsteer.run.stage import Artifact
from selfsteer.stages.oppose import Improve
from selfsteer.stages.sample import Sample


class SGPO(Plain):
    """An improver rewrites the policy's answers; the new ones are preferred."""

    method: Literal["sgpo"] = "sgpo"
    queries: GrownQueries
    improver: WriterConfig | None = Field(
        None, description="what rewrites the policy's answers; null: the policy of that iteration"
    )

    pair: ClassVar[str] = (
        "The rejected one was written by a model to the prompt alone, the chosen one is what a "
        "model made of it when asked to write it again, better"
    )

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        samples = plan(Sample(plan.queries, {"plain": policy}, self.sampling))
        return plan(Improve(samples, policy, self.improver, self.sampling))

    @override
    def engines(self) -> dict[str, EngineConfig]:
        return {} if self.improver is None else {"improver": self.improver}

    @override
    def answers_in_process(self) -> bool:
        here = self.improver is not None and self.improver.answering.kind == "transformers"
        return super().answers_in_process() or here
