"""A query set as it is given: read, cleaned, kept apart from evaluation sets."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from selfsteer.data.jsonl import dump_line, dump_lines, write_atomic
from selfsteer.data.queries import Loaded, load_queries
from selfsteer.judges.load import load_judges
from selfsteer.recipe.sections import JudgeConfig, Queries
from selfsteer.run.cost import Scale
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import COSTS_ONLY, Stage
from selfsteer.terminal import warn


@dataclass(frozen=True)
class ReadQueries(Stage):
    """The queries of a recipe, in id order.

    Args:
        settings: what to read and to keep.
        judges: who will judge answers to them; a query that one of them has no use for ends the
            run here, not after a night of sampling.
        with_answers: whether an answer must stand beside each query.
    """

    settings: Queries
    judges: tuple[JudgeConfig, ...] = field(default=(), metadata=COSTS_ONLY)
    with_answers: bool = False

    title = "queries"

    @property
    @override
    def outputs(self) -> tuple[str, ...]:
        return ("queries.jsonl", *(["contaminated.jsonl"] if self.settings.against else []))

    @override
    def records(self, scale: Scale) -> int:
        return scale.queries

    @override
    def run(self, run: RunFolder) -> StageResult:
        found = load_queries(self.settings, run.path)
        for example in found.examples:
            warn(f"dropped: {example}")
        for judge in load_judges(self.judges):
            judge.check(found.queries)
        if self.with_answers:
            from selfsteer.stages.oppose import given_answers

            given_answers(self.settings.path, self.settings.columns)
        if self.settings.against:
            write_atomic(run / "contaminated.jsonl", dump_lines(found.overlaps))
        write_atomic(run / "queries.jsonl", map(dump_line, found.queries))
        dropped, kept = run.drop(self.name, found.left_out), len(found.queries)
        return StageResult(kept + dropped.total(), kept, dropped, notes=reading_notes(found))

    @override
    def check(self) -> Iterator[str]:
        for judge in load_judges(self.judges):
            judge.check(())
        yield from ()


def reading_notes(found: Loaded) -> dict[str, Any]:
    """What else is worth knowing of how a query set was read."""
    notes = {
        "answers_cut": found.answers_cut,
        "not_compared": dict(found.not_compared),
        "commit": found.commit,
    }
    return {name: value for name, value in notes.items() if value}
