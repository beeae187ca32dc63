"""SPIN (arXiv 2401.01335): given answers against the policy's own."""

from pathlib import Path
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.plain import Plain
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.stage import Artifact
from selfsteer.stages.inputs import Share
from selfsteer.stages.oppose import OpposeGiven
from selfsteer.stages.sample import Sample


class Given(Plain):
    """A method that prefers answers that come with the queries to the policy's own."""

    needs_answers: ClassVar[bool] = True
    pair: ClassVar[str] = (
        "The chosen one came with the prompt, the rejected one was written by a model"
    )

    @override
    def opposed(self, plan: Plan, policy: Artifact, share: Share | None = None) -> Artifact:
        """See `Plain.opposed`; of all queries, or of a share of them."""
        own = plan(Sample(plan.queries, {"plain": policy}, self.sampling, share=share))
        answers = Artifact(Path(resolve_path(self.queries.path)))
        return plan(OpposeGiven(own, answers, self.sampling, self.queries.columns))


class SPIN(Given):
    """Every iteration sets all given answers against the policy's own."""

    method: Literal["spin"] = "spin"
