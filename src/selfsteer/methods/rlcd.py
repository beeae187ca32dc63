"""RLCD (arXiv 2307.12950): a reward model of principled pairs ranks plain answers.

Best of n and DPO stand in for the paper's PPO. Its affixes of earlier turns are left out.
"""

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from selfsteer.errors import ConfigError
from selfsteer.methods.base import Plan, Principled, reward_stage
from selfsteer.methods.plain import Ranked
from selfsteer.recipe.sections import Reward, Training
from selfsteer.run.stage import Artifact
from selfsteer.stages.filter import FilterTriples
from selfsteer.stages.rank import RankAnswers
from selfsteer.stages.sample import Sample


class RLCD(Principled, Ranked):
    """n plain answers per query, ranked by a reward model trained on principled pairs."""

    method: Literal["rlcd"] = "rlcd"
    training: Training = Training()
    reward: Reward = Field(Reward(), description="reward model that ranks the plain answers")

    pair: ClassVar[str] = (
        "Both were written by a model to the prompt alone; of several a reward model ranked the "
        "chosen one first and the rejected one last. That model was trained on answers under a "
        "good principle against answers under a bad one"
    )

    @override
    def before_rounds(self, plan: Plan) -> Artifact:
        """One reward model for all rounds, from the first policy's good and bad answers.

        Raises:
            ConfigError: the run trains another one already.
        """
        if plan.reward is not None:
            raise ConfigError(
                "A run holds one reward model, and method rlcd trains its own. Remove reward, or "
                "take rlcd as the method and the other one as its baseline."
            )
        policy = plan.base
        with plan.at(self.method, None, "ranker"):
            asked = self.ask(plan, policy)
            samples = plan(Sample(asked, {"good": policy, "bad": policy}, self.sampling))
            catalogue = self.principles.catalogue
            pairs = plan(
                FilterTriples(samples, policy, self.hygiene, None, catalogue, trained_on=True)
            )
        with plan.at(self.method, None, ""):
            plan.reward = plan(reward_stage(self, self.reward, own=(self.method, pairs)))
        return policy

    @override
    def opposed(self, plan: Plan, policy: Artifact) -> Artifact:
        n, sampling = self.ranking.samples, self.sampling
        return plan(RankAnswers(plan.queries, policy, n, None, sampling, reward=plan.reward))
