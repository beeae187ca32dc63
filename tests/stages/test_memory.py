"""Stages hold one shard of their records, not all of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from selfsteer.data.jsonl import dump_line
from selfsteer.engines.base import Advance, Completion, Request, SamplingParams, no_news
from selfsteer.recipe.sections import (
    EngineConfig,
    Hygiene,
    PrinciplesConfig,
    Sampling,
    resolve_path,
)
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact
from selfsteer.stages.filter import FilterTriples, WritePairs
from selfsteer.stages.inputs import stored_triples
from selfsteer.stages.principles import WritePrinciples
from selfsteer.stages.sample import in_contexts
from tests.census import RECORDS, SHARD, Census, census, write_shards

__all__ = ["census"]

POLICY = Artifact(Path(resolve_path("package:selfsteer.testbed/checkpoint")))


class Echo:
    """An engine that answers at once."""

    batch_size = None

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        for r in requests:
            yield Completion(r.id, f"{r.seed} {r.id}", "stop", 1, 1)


def run_sample(folder: Path, triples: Path) -> StageResult:
    asking = in_contexts(dict.fromkeys(("plain", "good", "bad"), "m"), Sampling())
    found, echo, how = stored_triples(triples), Echo(), Sampling(shard_size=SHARD)
    return asking.shards(found, folder / "s", lambda source: echo, how, seed=1, label="s")


def run_filter(folder: Path, triples: Path) -> StageResult:
    hygiene = Hygiene(max_length_ratio=9, match_lengths=True)
    return FilterTriples(Artifact(triples), POLICY, hygiene).run(RunFolder(folder))


def run_preferences(folder: Path, triples: Path) -> StageResult:
    return WritePairs(Artifact(triples), POLICY, Hygiene(), SHARD).run(RunFolder(folder))


def run_principles(folder: Path, triples: Path) -> StageResult:
    queries = ({"id": f"q{i:04d}", "prompt": f"Number {i}?"} for i in range(RECORDS))
    (folder / "q.jsonl").write_text("".join(map(dump_line, queries)))
    fixed = PrinciplesConfig(mode="fixed", good="Be true.", bad="Be false.", shard_size=SHARD)
    stage = WritePrinciples(Artifact(folder / "q.jsonl"), POLICY, fixed, EngineConfig())
    return stage.run(RunFolder(folder))


@pytest.mark.parametrize("stage", [run_sample, run_filter, run_preferences, run_principles])
def test_a_stage_holds_a_shard_of_its_records(
    tmp_path: Path,
    census: Census,
    monkeypatch: pytest.MonkeyPatch,
    stage: Callable[[Path, Path], StageResult],
) -> None:
    triples = write_shards(tmp_path / "triples")
    monkeypatch.setattr("selfsteer.stages.filter.TOGETHER", SHARD)
    result = stage(tmp_path, triples)
    assert result.n_out == RECORDS
    assert census.made >= RECORDS
    assert census.most <= 4 * SHARD + 4, "a shard in, a shard out, and what is being read"
