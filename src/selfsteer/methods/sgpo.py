"""SGPO (arXiv 2507.20181): the policy's answers, written again, against what they were.

As in the paper, policy and improver can first be trained as one model, on rewrites that lean on
given answers; how the paper has them written is not published, and the words are ours.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.plain import Plain
from selfsteer.objectives import BaseLoss, Objective, Term
from selfsteer.recipe.sections import (
    EngineConfig,
    GrownQueries,
    ImproverTraining,
    WriterConfig,
    resolve_path,
)
from selfsteer.run.stage import Artifact
from selfsteer.stages.oppose import Improve, LeanOnGiven, OpposeGiven
from selfsteer.stages.sample import Sample

#: The NLL of the new answer, per token; nothing is compared.
IMPROVING = Objective("improver", BaseLoss("simpo"), (Term("plain", "good", "good", 0.0, 1.0),))


class SGPO(Plain):
    """An improver rewrites the policy's answers; the new ones are preferred."""

    method: Literal["sgpo"] = "sgpo"
    queries: GrownQueries
    improver: WriterConfig | None = Field(
        None, description="what rewrites the policy's answers; null: the policy of that iteration"
    )
    improver_training: ImproverTraining | None = Field(
        None,
        description="first train the policy to improve its answers, leaning on given ones; null: "
        "no such training",
    )

    pair: ClassVar[str] = (
        "The rejected one was written by a model to the prompt alone, the chosen one is what a "
        "model made of it when asked to write it again, better"
    )

    @property
    @override
    def reads_answers(self) -> bool:
        return self.improver_training is not None

    @override
    def before_rounds(self, plan: Plan) -> Artifact:
        """Policy and improver in one model, where it is trained for that."""
        policy, settings = plan.base, self.improver_training
        if settings is None:
            return policy
        with plan.at(self.method, None, "improver"):
            samples = plan(Sample(plan.queries, {"plain": policy}, self.sampling))
            answers = Artifact(Path(resolve_path(self.queries.path)))
            pairs = plan(OpposeGiven(samples, answers, self.sampling, self.queries.columns))
            examples = plan(LeanOnGiven(pairs, policy, self.sampling))
            return self.train(plan, examples, policy, IMPROVING, settings)

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        samples = plan(Sample(plan.queries, {"plain": policy}, self.sampling))
        return plan(Improve(samples, policy, self.improver, self.sampling))

    @property
    @override
    def shortest(self) -> int:
        own, improver = self.training, self.improver_training
        return min(own.max_length, improver.max_length if improver else own.max_length)

    @override
    def engines(self) -> dict[str, EngineConfig]:
        return {} if self.improver is None else {"improver": self.improver}

    @override
    def sampled_models(self) -> dict[str, bool]:
        return {**super().sampled_models(), "the trained improver": self.reads_answers}

    @override
    def answers_in_process(self) -> bool:
        here = self.improver is not None and self.improver.answering.kind == "transformers"
        return super().answers_in_process() or here

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.improver and self.improver_training:
            yield "improver_training makes the policy its own improver; remove one of them"
