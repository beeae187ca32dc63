"""Self-rewarding (arXiv 2401.10020): the policy ranks its own plain answers.

Less than the paper: it scores one answer at a time and adds seed data for judging.
"""

from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.plain import RankedByJudge


class SelfRewarding(RankedByJudge):
    """n plain answers per query, ranked by the policy that wrote them."""

    method: Literal["self-rewarding"] = "self-rewarding"

    pair: ClassVar[str] = (
        "Both were written by a model to the prompt alone; of several it ranked the chosen one "
        "first and the rejected one last itself"
    )

    @override
    def answers_in_process(self) -> bool:
        """The policy judges here."""
        return True
