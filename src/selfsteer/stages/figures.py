"""Pairs to the weight or margin that each is trained with, as the policy at the start has it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from selfsteer.data.jsonl import batched, write_atomic
from selfsteer.data.records import Dropped, Triple
from selfsteer.objectives import REJECTED, Objective
from selfsteer.run.cost import Cost, Scale, scoring
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage, identity
from selfsteer.stages.inputs import stored_pairs, stored_triples
from selfsteer.terminal import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from selfsteer.models.chat import EncodedSequence
    from selfsteer.models.load import LoadedModel


def _asked_of(objective: Objective) -> Any:
    """What of an objective the figures depend on; its base loss, for one, has no part in them."""
    return identity([objective.weighting == "dora", objective.margin, objective.noise])


@dataclass(frozen=True)
class FigurePairs(Stage):
    """`steering_loss`'s weights and margins, from what the start says of the answers.

    Dropped are pairs that do not fit the model's context beside a principle, or whose prompt leaves
    no room for a response, as ``prompt_too_long``. One line of the file::

        {"id": "q1", "margins": 3.25}

    Args:
        pairs: the preferences.
        principled: records of the same ids with principles; None where none count.
        policy: the frozen start, whose log-probs count.
        objective: which of them, and what they come to.
        max_length: of the training, which cuts responses at the same tokens.
    """

    pairs: Artifact
    principled: Artifact | None
    policy: Artifact
    objective: Objective = field(metadata={"identity": _asked_of})
    max_length: int

    title = "figures"
    makes = ("{name}.jsonl",)

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        scores = scoring(self.pairs.texts, self.objective.read, n)
        if self.objective.noise:  # collisions are no log-probs: no store has them
            scores |= scoring(f"{self.name}: collisions", [REJECTED], n)
        return Cost(records=n, scores=scores)

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.models.load import load_model
        from selfsteer.models.store import CHUNK, open_scores

        pairs, width = stored_pairs(self.pairs.path), len(self.objective.read)
        records = stored_triples(self.principled.path) if self.principled else ()
        principles = {t.id: t.principles for t in records}
        loaded = load_model(str(self.policy.path), self.loading)
        found: dict[str, dict[str, float]] = {}
        store = None
        with run.drops(self.name) as drops, progress_bar(self.title, width * len(pairs)) as bar:
            for number, part in enumerate(batched(pairs, CHUNK // width), 1):
                asked = {}
                for triple in part:
                    own = replace(triple, principles=principles.get(triple.id))
                    if loaded.chat.refuses(own, ("plain/good", *self.objective.read)):
                        drops.add(Dropped(triple.id, "template_refuses", triple))
                    elif sequences := self._sequences(loaded, own):
                        asked[triple.id] = sequences
                    else:
                        drops.add(Dropped(triple.id, "prompt_too_long", triple))
                if asked:
                    flat = [s for sequences in asked.values() for s in sequences]
                    store = store or open_scores(run / "scores", loaded, flat)
                    values = store.score(loaded, flat, advance=bar.advance)
                    figures = self._figures(loaded, flat, values)
                    found.update(zip(asked, figures, strict=True))
                # those dropped, or scored before
                bar.advance(min(number * CHUNK // width, len(pairs)) * width - bar.done)
        lines = (json.dumps({"id": k, **v}, allow_nan=False) + "\n" for k, v in found.items())
        write_atomic(run / self.outputs[0], lines)
        columns = next(iter(found.values()), {})
        means = {name: sum(f[name] for f in found.values()) / len(found) for name in columns}
        return StageResult(len(pairs), len(found), drops.counts, notes=means)

    def _sequences(self, loaded: "LoadedModel", pair: Triple) -> "list[EncodedSequence]":
        """The answers in the contexts that count; nothing where they do not fit."""
        prompt = loaded.chat.sequence(pair, "plain/good").prompt_ids
        room, limit = self.max_length - len(prompt), loaded.context_length
        if room < 1:
            return []
        whole = [loaded.chat.sequence(pair, name) for name in self.objective.read]
        cut = [replace(s, response_ids=s.response_ids[:room]) for s in whole]
        return [] if limit is not None and max(map(len, cut)) > limit else cut

    def _figures(
        self,
        loaded: "LoadedModel",
        sequences: "list[EncodedSequence]",
        logps: "list[Tensor]",
    ) -> list[dict[str, float]]:
        """Those of each pair, from what is read of it, one pair after the other."""
        import torch

        from selfsteer.models.score import score_sequences

        names, collisions = self.objective.read, None

        def by_name(numbers: list[float]) -> "dict[str, Tensor]":
            columns = torch.tensor(numbers, dtype=torch.float64).view(-1, len(names)).T
            return dict(zip(names, columns, strict=True))

        if self.objective.noise:
            rejected = sequences[names.index(REJECTED) :: len(names)]
            with loaded.evaluating():
                squares = score_sequences(
                    loaded.model, rejected, layout=loaded.layout, batch_size=32, collisions=True
                )
            collisions = torch.stack([v.double().sum() for v in squares])
        sums, lengths = [float(v.double().sum()) for v in logps], [float(len(v)) for v in logps]
        figures = self.objective.figures(by_name(sums), by_name(lengths), collisions)
        rows = zip(*(column.tolist() for column in figures.values()), strict=True)
        return [dict(zip(figures, row, strict=True)) for row in rows]


def stored_figures(path: Path) -> dict[str, dict[str, float]]:
    """The figures of each pair, by its id."""
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return {row.pop("id"): row for row in rows}
