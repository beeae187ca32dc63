"""On-policy context distillation: the policy learns to answer as if the good principle were there.

After OPCD (arXiv 2602.12275): the reverse KL at each token of the policy's own plain answer to what
the frozen start says there under the good principle. What any system message does to style is in
the target as well; contrast distillation takes it out with the bad one.
"""

from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.contrast import Distilled
from selfsteer.objectives import TokenObjective
from selfsteer.recipe.sections import Distillation


class ContextDistillation(Distilled):
    """The good context, distilled at every token of plain answers (after OPCD)."""

    method: Literal["distil"] = "distil"
    distillation: Distillation = Distillation()

    pair: ClassVar[str] = (
        "At each of their tokens it was drawn to what a good principle would have made of it; "
        "no other answer was written, and none was ranked"
    )

    @property
    @override
    def target(self) -> tuple[TokenObjective, Distillation]:
        return TokenObjective(self.distillation.direction), self.distillation
