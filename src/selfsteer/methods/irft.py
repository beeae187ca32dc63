"""IRFT (arXiv 2405.17888): SPIN with own answers and reference renewed within one pass.

Its losses are sigmoid and hinge of `training.base`. The paper's third, without a link function, and
RFT, its variant that trains a reward model and runs PPO, are left out.
"""

from typing import Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.methods.base import Plan
from selfsteer.methods.spin import Given
from selfsteer.run.stage import Artifact
from selfsteer.stages.inputs import Share


class IRFT(Given):
    """Given answers against the policy's own, a slice of the queries at a time."""

    method: Literal["irft"] = "irft"
    iterations: int = Field(
        5,
        description="rounds, each on a slice of the queries and from a new reference",
        ge=1,
        le=1000,
    )

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        """Every iteration takes a slice of the queries."""
        opposed = self.opposed(plan, policy, Share(k, None, self.iterations))
        return self.learnt_from(plan, opposed, policy)
