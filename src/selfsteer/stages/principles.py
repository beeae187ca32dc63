"""Queries to principles: features chosen per query, p+ and p- picked, generated or given."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, Stored, dump_line, write_atomic
from selfsteer.data.records import Dropped, Message, Query, Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Completion, Engine, Request, SamplingParams
from selfsteer.principles import writer
from selfsteer.principles.catalogue import Catalogue, catalogue_of, catalogue_text
from selfsteer.principles.fixed import Fixed
from selfsteer.principles.lint import lint
from selfsteer.principles.writer import Outcome
from selfsteer.recipe.sections import EngineConfig, PrinciplesConfig, resolve_path
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, run_shards
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_queries
from selfsteer.stages.sample import check_budget
from selfsteer.terminal import Bar, progress_bar, say, warn

#: The writer is asked again, once, where nothing of its first answer can be used.
TRIES = ("first_try", "retry")


class Share(NamedTuple):
    """A slice of the queries: that of an iteration, of a fixed size or one of equal ones."""

    iteration: int
    #: queries per iteration; None: an equal share of all iterations
    size: int | None
    #: iterations that share; None with a size, so that a run can be given more of them later
    of: int | None

    def bounds(self, count: int) -> tuple[int, int]:
        """Start and size among ``count`` queries in id order; it may reach beyond the last."""
        if self.size is not None:
            return (self.iteration - 1) * self.size, self.size
        assert self.of is not None
        start, end = (count * k // self.of for k in (self.iteration - 1, self.iteration))
        return start, max(end - start, 1)

    def take(self, queries: Stored[Query]) -> Records[Query]:
        """The slice; queries are used again where there are too few."""
        start, size = self.bounds(len(queries))
        if start + size > len(queries):
            warn(
                f"iteration {self.iteration} needs queries {start + 1:,} to {start + size:,} of "
                f"{len(queries):,}; earlier ones are used again"
            )
        places = ((start + i) % len(queries) for i in range(min(size, len(queries))))
        return queries.take(sorted(places))


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
        if self.share is None:
            return n
        return min(self.share.size or -(-n // (self.share.of or 1)), n)

    @override
    def cost(self, scale: Scale) -> Cost:
        n, s = self.records(scale), self.settings
        asked = Counter(features=n) if s.features == "model" and s.asks_a_model else Counter()
        if s.mode == "generated":
            asked["principles"] = n * s.candidates
        return Cost(records=n, principles=n, answers=asked)

    @override
    def check(self) -> Iterator[str]:
        from selfsteer.engines.load import check_engine

        if not self.settings.asks_a_model:
            return
        budget = {"principles.max_new_tokens": self.settings.max_new_tokens}
        if self.policy.maker is None:
            yield from check_budget(str(self.policy.path), self.loading, budget)
        author = self.settings.writer
        if self.settings.mode == "generated" and author is not None:
            check_engine(author)
            if author.base_url is None:
                yield from check_budget(resolve_path(str(author.model)), self.loading, budget)

    @override
    def run(self, run: RunFolder) -> StageResult:
        queries = stored_queries(self.queries.path)
        mine = queries if self.share is None else self.share.take(queries)
        return self.write(mine, run)

    def write(self, queries: Records[Query], run: RunFolder) -> StageResult:
        """Writes the principles of these queries, whatever the share is."""
        from selfsteer.engines.load import Engines

        settings, folder, seed = self.settings, run / self.name, derive_seed(self.seed, self.name)
        notes: dict[str, Any] = {}
        author: Author | None = None
        given: Fixed | None = None
        with Engines(run.path) as engines:
            if settings.mode == "fixed":
                given = Fixed(settings)
                notes["unused_in_file"] = given.check(queries)
            else:
                author = self._author(engines)
            passes = author.passes if author else 1
            with progress_bar("principles", len(queries) * passes) as bar:

                def work(shard: int, part: Sequence[Query]) -> tuple[list[Triple], list[Dropped]]:
                    if author:
                        return author.write(part, seed, folder / f"answers-{shard:05d}", bar), []
                    assert given
                    return [given.triple(q) for q in part], []

                result = run_shards(
                    folder, queries, settings.shard_size, work, lambda n: bar.skip(n * passes)
                )
            notes |= engines.notes
        seen = Tally()
        lines = map(seen.note, Stored(folder, Triple.from_dict))
        write_atomic(run / self.outputs[0], map(dump_line, lines))
        shutil.rmtree(folder)
        result.notes = {**seen.counts(), **notes}
        if author:
            result.notes |= seen.feature_counts(author.catalogue)
        sources: Counter[str] = Counter(result.notes["sources"])
        failed = sum(n for source, n in sources.items() if source.startswith("fallback"))
        if failed:
            say(
                f"  {failed:,} of {result.n_out:,} written principles could not be used "
                "and fell back to the catalogue's text"
            )
        return result

    def _author(self, engines: Any) -> "Author":
        """Who names the features (the policy), and who writes; None where no model is asked."""
        settings, size = self.settings, self.settings.batch_size

        def policy() -> Engine:
            found: Engine = engines.sampler(self.engine, str(self.policy.path), self.loading, size)
            return found

        chooser = policy() if settings.features == "model" else None
        if settings.mode != "generated":
            return Author(settings, chooser, None)
        own = settings.writer
        if own is not None:
            source = str(own.model) if own.base_url else resolve_path(str(own.model))
            return Author(settings, chooser, engines.get(own, source, self.loading, size))
        return Author(settings, chooser, chooser or policy())


class Tally:
    """What the principles of a stage are, counted as they pass."""

    def __init__(self) -> None:
        self._by_name: dict[str, Counter[str]] = {n: Counter() for n in ("sources", *TRIES)}
        self._features: Counter[str] = Counter()
        self._by_model = 0

    def note(self, line: Triple) -> Triple:
        """Counts one and gives it back."""
        self._by_name["sources"][line.extra["source"]] += 1
        for name, outcomes in line.extra.get("outcomes", {}).items():
            self._by_name[name].update(outcomes)
        if line.principles is not None:
            self._features.update(line.principles.features)
        self._by_model += line.extra.get("features_by_model", 0)
        return line

    def counts(self) -> dict[str, Any]:
        """How many of each source, and of each outcome by try (an answer counts once)."""
        return {name: dict(sorted(found.items())) for name, found in self._by_name.items() if found}

    def feature_counts(self, catalogue: Catalogue) -> dict[str, Any]:
        """How often each feature was used, and who named it."""
        found, by_model = self._features, self._by_model
        at_random = sum(found[name] for name in catalogue.choosable) - by_model
        return {
            "features": {name: found[name] for name in catalogue.by_name if found[name]},
            "features_named_by_model": by_model,
            "features_filled_at_random": at_random,
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
        if usable:
            self.best = min(usable, key=lambda pair: writer.overlap(*pair))

    @property
    def open(self) -> bool:
        """Whether asking again may help."""
        last = [o for found in self.outcomes.values() for o in found]
        return self.best is None and Outcome.PROMPT_TOO_LONG not in last


class Author:
    """Chooses features and writes principles.

    Args:
        settings: how.
        chooser: who names the features; None: they are filled at random.
        author: who writes; None: the catalogue's texts are picked.
    """

    def __init__(
        self, settings: PrinciplesConfig, chooser: Engine | None, author: Engine | None
    ) -> None:
        self.settings, self.chooser, self.author = settings, chooser, author
        self.catalogue = catalogue_of(settings)
        findings = lint(catalogue_text(settings.catalogue))
        if findings:
            warn(
                f"{settings.catalogue}, {findings[0]}; {len(findings)} in all, see: "
                f"selfsteer principles lint {settings.catalogue}"
            )
        self.params = SamplingParams(settings.temperature, settings.top_p, settings.max_new_tokens)

    @property
    def passes(self) -> int:
        """How many answers are asked for per query, retries aside."""
        return (self.chooser is not None) + (self.author is not None) * self.settings.candidates

    def write(self, part: Sequence[Query], seed: int, store: Path, bar: Bar) -> list[Triple]:
        """Principles for one shard of queries; equal arguments give equal principles.

        Args:
            part: the queries.
            seed: of the stage.
            store: where answers wait until the shard is written; this name in front.
            bar: told the answers as they finish.
        """
        drafts = self._choose(part, seed, store, bar)
        if self.author is not None:
            for name in TRIES:
                todo = [d for d in drafts if name == TRIES[0] or d.open]
                if todo:
                    self._ask(todo, name, seed, store, bar)
                if self.params.temperature == 0:  # the same answer again
                    break
        return [self._triple(d) for d in drafts]

    def _answers(
        self, engine: Engine, asked: list[Request], store: Path, kind: str, bar: Bar, counted: bool
    ) -> dict[str, Completion]:
        return answers(
            engine,
            asked,
            self.params,
            store=store.with_name(f"{store.name}.{kind}.jsonl"),
            advance=lambda items, tokens: bar.advance(items * counted, tokens),
        )

    def _choose(self, part: Sequence[Query], seed: int, store: Path, bar: Bar) -> list[Draft]:
        count, found = self.settings.features_per_query, {}
        if self.chooser is not None:
            asked = [
                _request(
                    q.id,
                    writer.feature_prompt(q, count, self.catalogue),
                    derive_seed(seed, q.id, "features", 0),
                )
                for q in part
            ]
            found = self._answers(self.chooser, asked, store, "features", bar, True)
        drafts = []
        for query in part:
            said = found[query.id].text if found else ""
            named = writer.parse_features(said, self.catalogue)[:count]
            rng = random.Random(derive_seed(seed, query.id))
            features = writer.complete_features(named, count, rng, self.catalogue)
            drafts.append(Draft(query, features, len(named)))
        return drafts

    def _ask(self, drafts: Sequence[Draft], name: str, seed: int, store: Path, bar: Bar) -> None:
        assert self.author is not None
        settings = self.settings
        asked = []
        for d in drafts:
            prompt = writer.principle_prompt(
                d.query,
                d.features if settings.written_from == "features" else (),
                self.catalogue,
                settings.examples,
            )
            asked += [
                _request(f"{d.query.id}/{k}", prompt, derive_seed(seed, d.query.id, name, k))
                for k in range(settings.candidates)
            ]
        found = self._answers(self.author, asked, store, name, bar, name == TRIES[0])
        for d in drafts:
            said = [found[f"{d.query.id}/{k}"] for k in range(settings.candidates)]
            d.take(
                name,
                [writer.read_answer(c.text, c.finish_reason, settings.examples) for c in said],
            )

    def _triple(self, draft: Draft) -> Triple:
        """The principles: written where an answer could be used, the catalogue's text elsewhere."""
        features = draft.features
        if draft.best is not None:
            if self.settings.features == "none":
                features = ()
            principles = writer.written(features, *draft.best, self.catalogue)
            source = "generated"
        else:
            principles, source = writer.picked(features, self.catalogue), "picked"
            if draft.outcomes:
                *_, last = draft.outcomes.values()
                source = f"fallback:{last[0]}"
        extra: dict[str, Any] = {"source": source, "features_by_model": draft.named}
        if draft.outcomes:
            extra["outcomes"] = draft.outcomes
        return Triple(draft.query.id, draft.query.messages, principles, extra=extra)


def _request(identity: str, messages: Sequence[Message], seed: int) -> Request:
    return Request(identity, tuple(messages), seed)
