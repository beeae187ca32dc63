"""SPIN (arXiv 2401.01335): given answers against the policy's own."""

from pathlib import Path
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.plain import Plain
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.stage import Artifact
from selfsteer.stages.oppose import OpposeGiven
from selfsteer.stages.sample import Sample


class SPIN(Plain):
    """Answers that come with the queries are preferred to the policy's own."""

    method: Literal["spin"] = "spin"

    needs_answers: ClassVar[bool] = True
    pair: ClassVar[str] = (
        "The chosen one came with the prompt, the rejected one was written by a model"
    )

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        samples = plan(Sample(plan.queries, {"plain": policy}, self.sampling))
        answers = Artifact(Path(resolve_path(self.queries.path)))
        return plan(OpposeGiven(samples, answers, self.queries.columns))
