"""Queries to principles: features chosen per query, p+ and p- picked, generated or given."""

import random
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, Stored, dump_line, write_atomic
from selfsteer.data.records import Message, Query, Triple, rules
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Completion, Engine, Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.principles import writer
from selfsteer.principles.catalogue import Catalogue, catalogue_of, catalogue_text
from selfsteer.principles.fixed import Fixed
from selfsteer.principles.lint import lint
from selfsteer.principles.writer import Outcome
from selfsteer.recipe.sections import EngineConfig, Loading, PrinciplesConfig, WriterConfig
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, run_shards
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import Share, stored_queries
from selfsteer.stages.sample import check_budget, check_writer, who_answers
from selfsteer.terminal import Bar, progress_bar, say, warn

#: The writer is asked again, once, where nothing of its first answer can be used.
TRIES = ("first_try", "retry")


@dataclass(frozen=True)
class WritePrinciples(Stage):
    """One triple without responses per query: its features, p+ and p-.

    Each line says where its principles come from. ``source`` is ``picked``, ``generated``,
    ``fixed`` (``fixed:default`` where the file of principles lacks the query), or
    ``fallback:REASON`` where no answer of the writer could be used; ``outcomes`` are those of all
    its answers.

    Args:
        queries: of the run.
        policy: names the features, and writes where the settings name no other writer.
        settings: how.
        engine: who answers for the policy.
        share: of the queries; None: all.
    """

    queries: Artifact
    policy: Artifact
    settings: PrinciplesConfig
    engine: EngineConfig
    share: Share | None = None

    title = "principles"
    makes = ("{name}.jsonl",)
    leaves = ("{name}",)

    @override
    def records(self, scale: Scale) -> int:
        n = self.queries.records(scale)
        return n if self.share is None else self.share.most(n)

    @override
    def cost(self, scale: Scale) -> Cost:
        n, s = self.records(scale), self.settings
        asked = Counter(features=n) if s.features == "model" and s.asks_a_model else Counter()
        if s.mode == "generated":
            asked["principles"] = n * s.candidates
        return Cost(records=n, principles=n, answers=asked)

    @override
    def check(self) -> Iterator[str]:
        if not self.settings.asks_a_model:
            return
        budget = {"principles.max_new_tokens": self.settings.max_new_tokens}
        if self.policy.maker is None:
            yield from check_budget(str(self.policy.path), self.loading, budget)
        if self.settings.mode == "generated":
            yield from check_writer(self.settings.writer, self.loading, budget)

    @override
    def run(self, run: RunFolder) -> StageResult:
        queries = stored_queries(self.queries.path)
        mine = queries if self.share is None else self.share.take(queries)
        return self.write(mine, run)

    def write(self, queries: Records[Query], run: RunFolder) -> StageResult:
        """Writes the principles of these queries, whatever the share is."""
        settings, folder, seed = self.settings, run / self.name, derive_seed(self.seed, self.name)
        notes: dict[str, Any] = {}
        with Engines(run.path) as engines:
            given = Fixed(settings) if settings.mode == "fixed" else None
            author = None if given else self._author(engines)
            if given:
                notes["unused_in_file"] = given.check(queries)
            passes = author.passes if author else 1
            with progress_bar("principles", len(queries) * passes) as bar:

                def work(store: Path, part: Sequence[Query]) -> list[Triple]:
                    if author:
                        return author.write(part, seed, store, bar)
                    assert given
                    return list(map(given.triple, part))

                result = run_shards(
                    folder,
                    queries,
                    settings.shard_size,
                    work,
                    lambda n: bar.skip(n * passes),
                    at_once=bool(author and author.together),
                )
            notes |= engines.notes
        seen, system = Tally(), kept_system(settings, str(self.policy.path), self.loading)
        lines = map(seen.note, with_system(Stored(folder, Triple.from_dict), system))
        write_atomic(run / self.outputs[0], map(dump_line, lines))
        shutil.rmtree(folder)
        result.notes = seen.counts(author.catalogue if author else None) | notes
        failed = sum(n for source, n in seen.sources.items() if source.startswith("fallback"))
        if failed:
            say(
                f"  {failed:,} of {result.n_out:,} written principles could not be used "
                "and fell back to the catalogue's text"
            )
        return result

    def _author(self, engines: Engines) -> "Author":
        """Who names the features (the policy), and who writes."""
        settings, policy = self.settings, str(self.policy.path)
        together = set[Engine]()

        def engine(writer: WriterConfig | None) -> Engine:
            size = settings.batch_size
            found = who_answers(engines, self.engine, policy, self.loading, size, writer)
            if (writer or self.engine).batch:
                together.add(found)
            return found

        return Author(
            settings,
            engine(None) if settings.features == "model" else None,
            engine(settings.writer) if settings.mode == "generated" else None,
            together,
        )


def kept_system(settings: PrinciplesConfig, policy: str, loading: Loading) -> str:
    """The system prompt that the policy's chat template gives, where principles are to follow it.

    Raises:
        ArtifactError: the policy's tokenizer cannot be loaded.
    """
    from selfsteer.models.load import load_chat

    return load_chat(policy, loading).default_system if settings.system == "keep" else ""


def with_system(triples: Iterable[Triple], system: str) -> Iterator[Triple]:
    """The triples, their principles with the chat template's system prompt."""
    for t in triples:
        yield replace(t, principles=t.principles and replace(t.principles, system=system))


class Tally:
    """What the principles of a stage are, counted as they pass."""

    def __init__(self) -> None:
        self.sources: Counter[str] = Counter()
        self._outcomes: dict[str, Counter[str]] = {name: Counter() for name in TRIES}
        self._features: Counter[str] = Counter()
        self._by_model = 0

    def note(self, line: Triple) -> Triple:
        """Counts one and gives it back."""
        self.sources[line.extra["source"]] += 1
        for name, outcomes in line.extra.get("outcomes", {}).items():
            self._outcomes[name].update(outcomes)
        self._features.update(line.principles.features if line.principles else ())
        self._by_model += line.extra.get("features_by_model", 0)
        return line

    def counts(self, catalogue: Catalogue | None) -> dict[str, Any]:
        """How many of each source, and of each outcome by try (an answer counts once).

        With a catalogue also how often each of its features was used, and who named it.
        """
        counted = {"sources": self.sources, **self._outcomes}
        notes: dict[str, Any] = {n: dict(sorted(c.items())) for n, c in counted.items() if c}
        if catalogue is None:
            return notes
        found, by_model = self._features, self._by_model
        return notes | {
            "features": {name: found[name] for name in catalogue.by_name if found[name]},
            "features_named_by_model": by_model,
            "features_filled_at_random": sum(found[n] for n in catalogue.choosable) - by_model,
            "features_appended": sum(found[name] for name in catalogue.appended),
        }


@dataclass
class Draft:
    """What is known of one query's principles so far."""

    query: Query
    features: tuple[str, ...]
    named: int
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    best: tuple[str, str] | None = None

    def take(self, name: str, answers: Sequence[tuple[Outcome, str, str]]) -> None:
        """Keeps the usable answer whose guidelines share the fewest words; the first of equals."""
        self.outcomes[name] = [outcome for outcome, _, _ in answers]
        usable = [(good, bad) for outcome, good, bad in answers if outcome is Outcome.OK]
        self.best = min(usable, key=lambda pair: writer.overlap(*pair), default=self.best)

    @property
    def open(self) -> bool:
        """Whether asking again may help."""
        seen = {outcome for found in self.outcomes.values() for outcome in found}
        return self.best is None and Outcome.PROMPT_TOO_LONG not in seen


class Author:
    """Chooses features and writes principles.

    Args:
        settings: how.
        chooser: who names the features; None: they are filled at random.
        author: who writes; None: the catalogue's texts are picked.
        together: those of them that are asked for all shards at once; others one by one.
    """

    def __init__(
        self,
        settings: PrinciplesConfig,
        chooser: Engine | None,
        author: Engine | None,
        together: Collection[Engine] = (),
    ) -> None:
        self.settings, self.chooser, self.author = settings, chooser, author
        self.together = together
        self.catalogue = catalogue_of(settings)
        if findings := lint(catalogue_text(settings.catalogue)):
            warn(
                f"{settings.catalogue}, {findings[0]}; {len(findings)} in all, see: "
                f"selfsteer principles lint {settings.catalogue}"
            )

    @property
    def passes(self) -> int:
        """How many answers are asked for per query, retries aside."""
        return (self.chooser is not None) + (self.author is not None) * self.settings.candidates

    def write(self, part: Sequence[Query], seed: int, store: Path, bar: Bar) -> list[Triple]:
        """Principles for queries; equal arguments give equal principles.

        Args:
            part: the queries of one shard or of several.
            seed: of the stage.
            store: where answers wait until the shards are written; this name in front.
            bar: told the answers as they finish.
        """
        s, catalogue = self.settings, self.catalogue
        shard_of = {q.id: number // s.shard_size for number, q in enumerate(part)}

        def ask(
            engine: Engine, kind: str, prompts: Mapping[str, list[Message]], count: int
        ) -> dict[str, list[Completion]]:
            found: dict[str, Completion] = {}
            # what an engine in process computes together is the same, whatever another one does
            for _, ids in groupby(prompts, lambda i: engine not in self.together and shard_of[i]):
                asked = [
                    Request(f"{i}/{k}", tuple(prompts[i]), derive_seed(seed, i, kind, k))
                    for i in ids
                    for k in range(count)
                ]
                found |= answers(
                    engine,
                    asked,
                    SamplingParams(s.temperature, s.top_p, s.max_new_tokens),
                    store=store.with_name(f"{store.name}.{kind}.jsonl"),
                    # the number of retries is not known in advance
                    advance=lambda items, tokens: bar.advance(items * (kind != TRIES[1]), tokens),
                )
            return {i: [found[f"{i}/{k}"] for k in range(count)] for i in prompts}

        said: dict[str, list[Completion]] = {}
        if self.chooser is not None:
            count = s.features_per_query
            prompts = {q.id: writer.feature_prompt(q, count, catalogue) for q in part}
            said = ask(self.chooser, "features", prompts, 1)
        drafts = [self._draft(q, derive_seed(seed, q.id), said.get(q.id, ())) for q in part]
        todo = drafts
        for name in TRIES if self.author is not None else ():
            assert self.author is not None
            prompts = {d.query.id: self._prompt(d) for d in todo}
            said = ask(self.author, name, prompts, s.candidates)
            for d in todo:
                found = said[d.query.id]
                d.take(
                    name, [writer.read_answer(c.text, c.finish_reason, s.examples) for c in found]
                )
            # a greedy writer would give the same answer again
            todo = [d for d in todo if d.open and s.temperature > 0]
        return [self._triple(d) for d in drafts]

    def _draft(self, query: Query, seed: int, said: Sequence[Completion]) -> Draft:
        count, rng = self.settings.features_per_query, random.Random(seed)
        text = "".join(c.text for c in said)
        named = writer.parse_features(text, self.catalogue)[:count]
        features = writer.complete_features(named, count, rng, self.catalogue)
        return Draft(query, features, len(named))

    def _prompt(self, draft: Draft) -> list[Message]:
        s = self.settings
        features = draft.features if s.written_from == "features" else ()
        return writer.principle_prompt(draft.query, features, self.catalogue, s.examples)

    def _triple(self, draft: Draft) -> Triple:
        """The principles: written where an answer could be used, the catalogue's text elsewhere."""
        features, extra = draft.features, rules(draft.query.extra)
        if draft.best is not None:
            features = features if self.settings.features != "none" else ()
            principles = writer.written(features, *draft.best, self.catalogue)
            extra["source"] = "generated"
        else:
            principles = writer.picked(features, self.catalogue)
            last = [found[0] for found in draft.outcomes.values()][-1:]
            extra["source"] = f"fallback:{last[0]}" if last else "picked"
        extra["features_by_model"] = draft.named
        if draft.outcomes:
            extra["outcomes"] = draft.outcomes
        return Triple(draft.query.id, draft.query.messages, principles, extra=extra)
