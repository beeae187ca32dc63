"""Principles for a query file, without a run: the first two stages of one."""

from pathlib import Path
from typing import Any

from pydantic import Field

from selfsteer.recipe.sections import (
    EngineConfig,
    Policy,
    PrinciplesConfig,
    Queries,
    Section,
    resolve_path,
)
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.principles import WritePrinciples
from selfsteer.stages.queries import ReadQueries


class Writing(Section):
    """Settings of ``selfsteer principles write``."""

    folder: Path
    seed: int = Field(0, description="seed of everything", ge=0, lt=2**31)
    policy: Policy
    queries: Queries
    principles: PrinciplesConfig = PrinciplesConfig()

    @property
    def tracking(self) -> tuple[str, ...]:
        """No tracker follows it."""
        return ()

    def plan(self) -> list[Stage]:
        """Queries, then principles."""
        common: dict[str, Any] = {"seed": self.seed, "loading": self.policy.loading}
        reading = ReadQueries(self.queries, **common)
        queries = Artifact(self.folder / reading.outputs[0], reading)
        policy = Artifact(Path(resolve_path(self.policy.model)))
        return [
            reading,
            WritePrinciples(queries, policy, self.principles, EngineConfig(), **common),
        ]
