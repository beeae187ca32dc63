"""Principled answers to those that the principles themselves find apart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import chain, groupby
from operator import attrgetter
from statistics import fmean

from typing_extensions import override

from selfsteer.data.jsonl import batched, dump_line, write_atomic
from selfsteer.data.records import Dropped, Preference, Query, Triple
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.judges.quality import GAP_SEQUENCES
from selfsteer.models.chat import ChatFormat
from selfsteer.run.cost import Cost, Scale, scoring
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.filter import rejected_by, to_preference
from selfsteer.stages.inputs import as_pair, renamed, stored_triples
from selfsteer.terminal import progress_bar

#: c of `PrincipleContrast`, as where it ranks answers.
CLIP = 0.2

#: Scores of a triple's two responses; None where one has none.
Sides = tuple[float | None, float | None]

#: Triples that are scored together.
TOGETHER = 256


@dataclass(frozen=True)
class KeepContrasting(Stage):
    """Keeps what the policy finds better by its principles, too, whoever wrote it.

    A response written under the good principle need not be better than the other one. The lead is
    r(good) − r(bad), or r(good) − r(plain) where the plain response is rejected, with r of
    `PrincipleContrast`. Dropped are ``low_contrast`` and, without a score, ``prompt_too_long``,
    ``template_refuses``, or ``empty``: cut off before the first token.

    Args:
        samples: triples or pairs of them, with their principles.
        policy: under which they are scored.
        least: the lead, nats per token.
        plain: as in `WritePairs`, which makes pairs of what is kept.
    """

    samples: Artifact
    policy: Artifact
    least: float
    plain: float = 0.0

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
        rejected = rejected_by(self.seed, self.plain)

        def left() -> Iterator[str]:
            with progress_bar(self.title, len(triples)) as bar:
                for part in batched(triples, TOGETHER):
                    found = leads_of(ranker, part, rejected)
                    for triple, its_lead in zip(part, found, strict=True):
                        if its_lead is None:
                            drops.add(_without_score(triple, ranker.loaded.chat))
                            continue
                        leads.append(its_lead)
                        if its_lead < self.least:
                            lost: Triple | Preference = triple
                            if (other := rejected(triple.id)) != "bad":
                                lost = to_preference(as_pair(triple, other))
                            drops.add(Dropped(triple.id, "low_contrast", lost))
                        else:
                            yield dump_line(triple)
                    bar.advance(len(part))

        with run.drops(self.name) as drops:
            write_atomic(run / self.outputs[0], left())
        notes = {"lead": fmean(leads), "leads": fmean(v > 0 for v in leads)} if leads else {}
        n_out = len(triples) - drops.counts.total()
        return StageResult(len(triples), n_out, drops.counts, notes=notes)


def leads_of(
    ranker: PrincipleContrast, triples: Sequence[Triple], rejected: Callable[[str], str]
) -> list[float | None]:
    """By how much the good response of each leads the rejected one; None without a score."""
    return [
        None if good is None or other is None else good - other
        for good, other in sides_of(ranker, triples, rejected)
    ]


def sides_of(
    ranker: PrincipleContrast, triples: Sequence[Triple], rejected: Callable[[str], str]
) -> list[Sides]:
    """The scores of the good response of each, and of the rejected one."""
    asked: list[tuple[Query, str]] = []
    finished: list[bool] = []
    for t in triples:
        assert t.principles is not None
        query = Query(t.id, t.messages, {"principles": t.principles.to_dict()})
        names = ("good", rejected(t.id))
        asked += [(query, t.responses[name]) for name in names]
        finished += map(t.finished, names)
    scores = iter(ranker.score_all(asked, finished))
    return list(zip(scores, scores, strict=True))


def _without_score(triple: Triple, chat: ChatFormat) -> Dropped:
    if not all(triple.responses.values()):
        return Dropped(triple.id, "empty", triple)
    refused = chat.refuses(triple, GAP_SEQUENCES)
    return Dropped(triple.id, "template_refuses" if refused else "prompt_too_long", triple)


@dataclass(frozen=True)
class PickFurthest(Stage):
    """Of several answers under each principle, the good and the bad one furthest apart.

    Chosen are the good response with the highest r and the bad one with the lowest, with r of
    `PrincipleContrast`; they may be of different triples. Dropped are ``prompt_too_long``,
    ``template_refuses`` and ``empty`` (no score on one of the sides).

    Args:
        samples: sets of triples with a good and a bad response and their principles, each in id
            order; a query need not be in all of them.
        policy: under which they are scored.
        clip: c of `PrincipleContrast`, nats.
    """

    samples: tuple[Artifact, ...]
    policy: Artifact
    clip: float

    title = "samples"
    passes_on = True

    @property
    @override
    def read(self) -> Artifact:
        return self.samples[0]

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        each = [scoring(samples.texts, GAP_SEQUENCES, n) for samples in self.samples]
        return Cost(n, scores=dict(chain.from_iterable(s.items() for s in each)))

    @override
    def run(self, run: RunFolder) -> StageResult:
        sets, by_id = [stored_triples(s.path) for s in self.samples], attrgetter("id")
        policy = str(self.policy.path)
        ranker = PrincipleContrast(policy, self.loading, clip=self.clip, folder=run / "scores")
        kept = 0

        def picked() -> Iterator[str]:
            nonlocal kept
            same = (list(g) for _, g in groupby(merge(*sets, key=by_id), by_id))
            with progress_bar(f"{self.title}: picking", sum(map(len, sets))) as bar:
                for part in batched(same, TOGETHER):
                    sides = iter(sides_of(ranker, list(chain.from_iterable(part)), lambda _: "bad"))
                    for triples in part:
                        made = furthest(triples, [next(sides) for _ in triples])
                        if made is None:
                            drops.add(_without_score(triples[0], ranker.loaded.chat))
                        else:
                            kept += 1
                            yield dump_line(made)
                    bar.advance(sum(map(len, part)))

        with run.drops(self.name) as drops:
            write_atomic(run / self.name / "shard-00000.jsonl", picked())
        return StageResult(kept + drops.counts.total(), kept, drops.counts)


def furthest(triples: Sequence[Triple], sides: Sequence[Sides]) -> Triple | None:
    """The best good and the worst bad response among triples of one query, the first of equals.

    None where one of the sides has no score at all.
    """
    good = {i: score for i, (score, _) in enumerate(sides) if score is not None}
    bad = {i: score for i, (_, score) in enumerate(sides) if score is not None}
    if not good or not bad:
        return None
    best, worst = triples[max(good, key=good.__getitem__)], triples[min(bad, key=bad.__getitem__)]
    responses, reasons, thoughts = (
        {**renamed(b, {"good": "good"}), **renamed(w, {"bad": "bad"})}
        for b, w in (
            (best.responses, worst.responses),
            (best.finish_reasons, worst.finish_reasons),
            (best.reasoning, worst.reasoning),
        )
    )
    return replace(best, responses=responses, finish_reasons=reasons, reasoning=thoughts)
