"""Quality of each preference set, measured every time."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, at, write_atomic
from selfsteer.data.records import Triple
from selfsteer.judges.load import load_judge
from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES, quality
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.run.cost import Cost, Scale, scoring, total
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_preferences, stored_triples

#: Pairs measured; a seeded subset of larger sets, whose figures it gives to about one percent.
QUALITY_PAIRS = 4000


@dataclass(frozen=True)
class MeasureQuality(Stage):
    """Accuracy, on-policyness, steering gap and lengths of what the policy will be trained on.

    Args:
        pairs: the preferences.
        policy: at the start of the iteration; everything is scored under it.
        judge: who says which response is better; None: no judge.
        principled: records of the same ids with principles, for the steering gap; None where the
            method has no principles.
        triples: the policy's own, measured beside, plain responses included.
    """

    pairs: Artifact
    policy: Artifact
    judge: JudgeConfig | None
    principled: Artifact | None = None
    triples: Artifact | None = None

    title = "quality"
    makes = ("{name}.json",)

    @property
    def _sequences(self) -> tuple[str, ...]:
        """Of a pair; without principles there is no steering gap."""
        return (*PLAIN_SEQUENCES, *(GAP_SEQUENCES if self.principled else ()))

    @override
    def cost(self, scale: Scale) -> Cost:
        n = min(self.records(scale), QUALITY_PAIRS)
        costs = [Cost(self.records(scale), scores=scoring(self.pairs.texts, self._sequences, n))]
        judged = n
        if self.triples is not None:
            n = min(self.triples.records(scale), QUALITY_PAIRS)
            own = (*self._sequences, "plain/plain")
            costs.append(Cost(scores=scoring(self.triples.texts, own, n)))
            judged += n
        return total([*costs, Cost(judged=judged if self.judge else 0)])

    @override
    def check(self) -> Iterator[str]:
        if judge := load_judge(self.judge):
            judge.check(())
        yield from ()

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.models.load import load_model
        from selfsteer.models.store import scored

        rng = np.random.default_rng(derive_seed(self.seed, self.name))
        preferences = stored_preferences(self.pairs.path)
        pairs = {p.id: p.to_triple() for p in at(preferences, _places(len(preferences), rng))}
        for t in stored_triples(self.principled.path) if self.principled else ():
            if t.id in pairs:
                pairs[t.id] = replace(pairs[t.id], principles=t.principles)
        triples: Records[Triple] = stored_triples(self.triples.path) if self.triples else ()
        own = list(at(triples, _places(len(triples), rng)))
        loaded = load_model(str(self.policy.path), self.loading)
        measured = []
        for name, size, picked, sequences in (
            ("preferences", len(preferences), list(pairs.values()), self._sequences),
            ("triples", len(triples), own, (*PLAIN_SEQUENCES, "plain/plain", *GAP_SEQUENCES)),
        ):
            chosen = [t for t in picked if not loaded.chat.refuses(t, sequences)]
            if not chosen:
                continue
            flat = [loaded.chat.sequence(t, s) for s in sequences for t in chosen]
            values = scored(run / "scores", loaded, flat, f"quality: scoring {name}")
            grid = np.array([float(v.double().sum()) for v in values]).reshape(len(sequences), -1)
            tokens = np.array([len(v) for v in values]).reshape(len(sequences), -1)
            sums, lengths = (dict(zip(sequences, x, strict=True)) for x in (grid, tokens))
            measured.append((name, size, chosen, sums, lengths))
        del loaded  # the judge's model may need the room
        judge = load_judge(self.judge, run / "judgements")
        report: dict[str, Any] = {
            "scored_under": "policy at the start of the iteration",
            "judge": judge.name if judge else None,
        }
        for name, size, chosen, sums, lengths in measured:
            report[name] = {"of": size, **quality(chosen, sums, lengths, judge)}
        write_atomic(run / self.outputs[0], json.dumps(report, indent=1, allow_nan=False) + "\n")
        return StageResult(len(preferences), len(preferences))


def _places(count: int, rng: np.random.Generator) -> Iterable[int]:
    """Of the records that are measured."""
    if count <= QUALITY_PAIRS:
        return range(count)
    chosen: list[int] = np.sort(rng.choice(count, QUALITY_PAIRS, replace=False)).tolist()
    return chosen
