"""Base, baseline and policy on public benchmarks and judged question sets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from selfsteer.data.digests import model_digest
from selfsteer.recipe.sections import Benchmarks, JudgeConfig, Sampling
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage


@dataclass(frozen=True)
class RunBenchmarks(Stage):
    """Several models on public benchmarks and judged question sets.

    Args:
        models: rows of the table; the first is what the others are held against.
        settings: which benchmarks.
        judge: of the judged sets.
        sampling: how models answer them.
    """

    models: Mapping[str, Artifact]
    settings: Benchmarks
    judge: JudgeConfig | None
    sampling: Sampling

    title = "benchmarks"
    makes = ("benchmarks.json", "benchmarks.md")

    def cost(self, scale: Scale) -> Cost:
        """See `Stage.cost`."""
        return Cost(unknown=(self.name,))

    def check(self) -> Iterator[str]:
        """See `Stage.check`."""
        from selfsteer.stages.benchmarking import check_benchmarks

        check_benchmarks(self.settings, self.judge)
        yield from ()

    def run(self, run: RunFolder) -> StageResult:
        """See `Stage.run`."""
        from selfsteer.stages.benchmarking import Contestant, Setup, benchmark

        # by content: on a GPU the same recipe need not train the same model twice
        rows = [
            Contestant(name, str(m.path), model_digest(str(m.path)))
            for name, m in self.models.items()
        ]
        setup = Setup(self.settings, self.judge, self.sampling, self.loading, self.seed)
        return benchmark(rows, setup, run.path)
