"""A Bradley-Terry reward model on given preferences, and nothing else."""

from collections.abc import Iterator
from typing import Literal

from typing_extensions import override

from selfsteer.methods.base import Plan, Recipe, reward_stage
from selfsteer.recipe.sections import Reward
from selfsteer.run.stage import Stage


class RewardModel(Recipe):
    """Preference sets to a reward model; no policy is trained."""

    method: Literal["reward"] = "reward"
    reward: Reward

    @override
    def plan(self) -> list[Stage]:
        plan = Plan(self)
        plan(reward_stage(self, self.reward, own=None))
        return plan.stages

    @override
    def faults(self) -> Iterator[str]:
        yield from super().faults()
        wrong = {
            "method reward needs reward.data: preference sets, or run folders": (
                not self.reward.data
            ),
            "reward.own_weight has no effect: the run has no pairs of its own": (
                "own_weight" in self.reward.model_fields_set
            ),
            "policy.layout has no effect with method reward; remove it": (
                "layout" in self.policy.model_fields_set
            ),
        }
        yield from (text for text, holds in wrong.items() if holds)
