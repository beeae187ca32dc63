"""Contrast distillation: the policy learns what its principles would make of its own plain answers.

One plain answer per query; at each of its tokens the frozen start says how the good and the bad
principle would change the next token, and the policy is drawn along their difference. No pairs,
no generator, no judge, no finished answers are needed. docs/method.md derives the target.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from typing_extensions import override

from selfsteer.methods.base import Plan, Principled
from selfsteer.objectives import ContrastObjective, TokenObjective
from selfsteer.recipe.sections import Contrast, Distillation, Distilling
from selfsteer.run.stage import Artifact
from selfsteer.stages.sample import Sample
from selfsteer.stages.teach import Teach


class Distilled(Principled):
    """A method that learns from the tokens of plain answers, under a teacher's eye."""

    training: Distilling = Distilling()

    learnt: ClassVar[str] = "its own answers to the prompts alone"

    @property
    @abstractmethod
    def target(self) -> tuple[TokenObjective, Distillation]:
        """What the policy is drawn to, and how much of it is kept."""

    @override
    def faults(self) -> Iterator[str]:
        sampling = self.sampling
        if "keep_unfinished" in sampling.model_fields_set and not sampling.keep_unfinished:
            yield (
                f"method {self.method} learns from every token, of answers without an end as well; "
                "remove sampling.keep_unfinished: false"
            )
        yield from super().faults()

    @override
    def round(self, plan: Plan, k: int, policy: Artifact) -> Artifact:
        asked = self.ask(plan, policy)
        # the teacher reads every token that there is, of answers without an end as well
        sampling = self.sampling.model_copy(update={"keep_unfinished": True})
        answers = plan(Sample(asked, {"plain": policy}, sampling))
        objective, kept = self.target
        # in every direction the targets are the same
        wanted = replace(objective, direction="reverse")
        much = kept.model_copy(update={"direction": "reverse"})
        start, lora = plan.reference(self.training, policy), self.policy.lora
        # the policy that learns from it begins as these very weights
        teacher = plan(Teach(answers, start, wanted, much, lora.bits if lora else None))
        return self.train(plan, answers, policy, objective, self.training, teacher=teacher)


class ContrastDistillation(Distilled):
    """The difference of the principles, distilled at every token of plain answers."""

    method: Literal["contrast"] = "contrast"
    contrast: Contrast = Contrast()

    by_contrast: ClassVar[bool] = True
    pair: ClassVar[str] = (
        "At each of their tokens it was drawn to where a good principle, and away from where a bad "
        "one, would have moved it; no other answer was written, and none was ranked"
    )

    @property
    @override
    def target(self) -> tuple[TokenObjective, Distillation]:
        c = self.contrast
        return ContrastObjective(c.direction, strength=c.strength, clip=c.clip), c
