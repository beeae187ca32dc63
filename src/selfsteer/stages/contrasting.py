"""Principled answers to those whose order the principles themselves confirm."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from typing_extensions import override

from selfsteer.data.jsonl import batched, dump_line, write_atomic
from selfsteer.data.records import Dropped, Query, Triple
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.judges.quality import GAP_SEQUENCES
from selfsteer.run.cost import Cost, Scale, scoring
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_triples
from selfsteer.terminal import progress_bar

#: c of `PrincipleContrast`, as where it ranks answers.
CLIP = 0.2

#: Triples that are scored together.
TOGETHER = 256


@dataclass(frozen=True)
class KeepContrasting(Stage):
    """Keeps what the policy finds better by its principles, too, whoever wrote it.

    A response written under the good principle need not be better than the other one. The lead is
    r(good) − r(bad), or r(good) − r(plain) where there is no bad one, with r of
    `PrincipleContrast`. Dropped are ``low_contrast`` and ``prompt_too_long`` (no score).

    Args:
        samples: triples or pairs of them, with their principles.
        policy: under which they are scored.
        least: the lead, nats per token.
    """

    samples: Artifact
    policy: Artifact
    least: float

    title = "contrasting"
    makes = ("{name}.jsonl",)
    passes_on = True

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        return Cost(n, scores=scoring(self.samples.texts, GAP_SEQUENCES, n))

    @override
    def run(self, run: RunFolder) -> StageResult:
        """The notes have the mean lead, and the share of pairs that the good response leads."""
        triples, policy = stored_triples(self.samples.path), str(self.policy.path)
        ranker = PrincipleContrast(policy, self.loading, clip=CLIP, folder=run / "scores")
        leads: list[float] = []

        def left() -> Iterator[str]:
            with progress_bar(self.title, len(triples)) as bar:
                for part in batched(triples, TOGETHER):
                    found = leads_of(ranker, part)
                    for triple, its_lead in zip(part, found, strict=True):
                        if its_lead is None:
                            drops.add(Dropped(triple.id, "prompt_too_long", triple))
                            continue
                        leads.append(its_lead)
                        if its_lead < self.least:
                            drops.add(Dropped(triple.id, "low_contrast", triple))
                        else:
                            yield dump_line(triple)
                    bar.advance(len(part))

        with run.drops(self.name) as drops:
            write_atomic(run / self.outputs[0], left())
        notes = {"lead": fmean(leads), "leads": fmean(v > 0 for v in leads)} if leads else {}
        n_out = len(triples) - drops.counts.total()
        return StageResult(len(triples), n_out, drops.counts, notes=notes)


def leads_of(ranker: PrincipleContrast, triples: Sequence[Triple]) -> list[float | None]:
    """By how much the good response of each leads the other one; None without a score."""
    asked = []
    for t in triples:
        assert t.principles is not None
        query = Query(t.id, t.messages, {"principles": t.principles.to_dict()})
        other = "bad" if "bad" in t.responses else "plain"
        asked += [(query, t.responses[name]) for name in ("good", other)]
    scores = iter(ranker.score_all(asked))
    return [
        None if good is None or other is None else good - other
        for good, other in zip(scores, scores, strict=True)
    ]
