"""Principles for a query file, without a run: written for each query, or one that is improved."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from typing_extensions import override

from selfsteer.recipe.sections import (
    EngineConfig,
    Improvement,
    JudgeConfig,
    Policy,
    PrinciplesConfig,
    Queries,
    RulesConfig,
    Sampling,
    Section,
    resolve_path,
)
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.improve import ImprovePrinciple
from selfsteer.stages.oppose_rules import OpposeRules
from selfsteer.stages.principles import WritePrinciples
from selfsteer.stages.queries import ReadQueries


class Principled(Section):
    """What a query file and a model come to without a run: queries, then one more stage."""

    folder: Path
    seed: int = Field(0, description="seed of everything", ge=0, lt=2**31)
    policy: Policy
    queries: Queries

    #: The command.
    verb: ClassVar[str]

    @property
    def tracking(self) -> tuple[str, ...]:
        """No tracker follows it."""
        return ()

    @abstractmethod
    def stage(self, queries: Artifact, policy: Artifact) -> Stage:
        """What is made of the queries."""

    @property
    def judges(self) -> tuple[JudgeConfig, ...]:
        """Who judges answers to the queries."""
        return ()

    def plan(self) -> list[Stage]:
        """Queries, then what is made of them."""
        common: dict[str, Any] = {"seed": self.seed, "loading": self.policy.loading}
        reading = ReadQueries(self.queries, self.judges, **common)
        queries = Artifact(self.folder / reading.outputs[0], reading)
        policy = Artifact(Path(resolve_path(self.policy.model)))
        return [reading, replace(self.stage(queries, policy), **common)]


class Writing(Principled):
    """Settings of ``selfsteer principles write``."""

    principles: PrinciplesConfig = PrinciplesConfig()

    verb: ClassVar[str] = "principles write"

    @override
    def stage(self, queries: Artifact, policy: Artifact) -> Stage:
        return WritePrinciples(queries, policy, self.principles, EngineConfig())


class Importing(Section):
    """Settings of ``selfsteer principles import``."""

    folder: Path
    seed: int = Field(0, description="seed of everything", ge=0, lt=2**31)
    path: str
    rules: RulesConfig

    verb: ClassVar[str] = "principles import"

    @property
    def tracking(self) -> tuple[str, ...]:
        """No tracker follows it."""
        return ()

    def plan(self) -> list[Stage]:
        """One stage: the rules to a catalogue."""
        return [OpposeRules(Artifact(Path(self.path)), self.rules, seed=self.seed)]


class Improving(Principled):
    """Settings of ``selfsteer principles improve``."""

    sampling: Sampling = Sampling()
    improve: Improvement
    judge: JudgeConfig

    verb: ClassVar[str] = "principles improve"

    @property
    @override
    def judges(self) -> tuple[JudgeConfig, ...]:
        return (self.judge,)

    @override
    def stage(self, queries: Artifact, policy: Artifact) -> Stage:
        return ImprovePrinciple(queries, policy, self.improve, self.sampling, self.judge)

    @override
    def faults(self) -> Iterator[str]:
        yield from self.sampling.engine.conflicts("sampling.engine")
        if self.improve.writer is not None:
            yield from self.improve.writer.conflicts("improve.writer", named=True)
            if self.improve.writer.model is None:
                yield "improve.writer.model is missing"
