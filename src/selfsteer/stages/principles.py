"""Queries to principles: features chosen per query, p+ and p- picked, generated or given."""

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, dump_line, write_atomic
from selfsteer.data.records import Query, Triple
from selfsteer.data.stored import Stored
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Engine, Request, SamplingParams
from selfsteer.engines.load import Engines, writer_source
from selfsteer.principles import writer
from selfsteer.principles.catalogue import Catalogue, catalogue_of, catalogue_text
from selfsteer.principles.fixed import Fixed
from selfsteer.principles.lint import lint
from selfsteer.principles.writer import Outcome
from selfsteer.recipe.sections import Recipe
from selfsteer.run.folder import StageResult, run_shards, scratch_of
from selfsteer.terminal import Bar, progress_bar, say, warn

#: The writer is asked again, once, where nothing of its first answer can be used.
TRIES = ("first_try", "retry")


def write_principles(
    queries: Records[Query],
    recipe: Recipe,
    policy: str,
    folder: Path,
    stage: str,
    *,
    home: Path | None = None,
) -> StageResult:
    """Writes ``principles.jsonl``: one triple without responses per query.

    Each line says where its principles come from. ``source`` is ``picked``, ``generated``,
    ``fixed`` (``fixed:default`` where the file of principles lacks the query), or
    ``fallback:REASON`` where no answer of the writer could be used; ``outcomes`` are those of all
    its answers. What was asked of servers is counted in ``home``, the run folder.
    """
    with Engines(home) as engines:
        result = _write(queries, recipe, policy, folder, stage, engines)
        result.notes |= engines.notes
    return result


def _write(
    queries: Records[Query],
    recipe: Recipe,
    policy: str,
    folder: Path,
    stage: str,
    engines: Engines,
) -> StageResult:
    settings, seed = recipe.principles, derive_seed(recipe.seed, stage)
    notes: dict[str, Any] = {}
    author: Author | None = None
    given: Fixed | None = None
    if settings.mode == "fixed":
        given = Fixed(settings)
        notes["unused_in_file"] = given.check(queries)
    else:
        author = Author(recipe, policy, engines)
    passes = author.passes if author else 1
    with progress_bar("principles", len(queries) * passes) as bar:

        def work(shard: int, part: Sequence[Query]) -> tuple[list[Triple], Counter[str]]:
            if author:
                store = scratch_of(folder / "principles", shard)
                return author.write(part, seed, bar, store), Counter()
            assert given
            return [given.triple(q) for q in part], Counter()

        result = run_shards(
            folder / "principles",
            queries,
            settings.shard_size,
            work,
            lambda n: bar.skip(n * passes),
        )
    seen = Tally()
    lines = map(seen.note, Stored(folder / "principles", Triple.from_dict))
    write_atomic(folder / "principles.jsonl", map(dump_line, lines))
    shutil.rmtree(folder / "principles")
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
    """Chooses features and writes principles with the recipe's models, loaded once."""

    def __init__(self, recipe: Recipe, policy: str, engines: Engines) -> None:
        self.settings = recipe.principles
        self.catalogue = catalogue_of(self.settings)
        findings = lint(catalogue_text(self.settings.catalogue))
        if findings:
            warn(
                f"{self.settings.catalogue}, {findings[0]}; {len(findings)} in all, see: "
                f"selfsteer principles lint {self.settings.catalogue}"
            )
        self.params = SamplingParams(
            self.settings.temperature, self.settings.top_p, self.settings.max_new_tokens
        )
        self.chooser, self.writer = _engines(recipe, policy, engines)

    @property
    def passes(self) -> int:
        """How many answers are asked for per query, retries aside."""
        return (self.chooser is not None) + (self.writer is not None) * self.settings.candidates

    def write(self, part: Sequence[Query], seed: int, bar: Bar, store: Path) -> list[Triple]:
        """Principles of some queries; ``store`` is a folder that keeps answers as they come."""
        drafts = self._choose(part, seed, bar, store)
        if self.writer is not None:
            for name in TRIES:
                todo = [d for d in drafts if name == TRIES[0] or d.open]
                if todo:
                    self._ask(self.writer, todo, name, seed, bar, store)
                if self.params.temperature == 0:  # the same answer again
                    break
        return [self._triple(d, seed) for d in drafts]

    def _choose(self, part: Sequence[Query], seed: int, bar: Bar, store: Path) -> list[Draft]:
        count = self.settings.features_per_query
        texts: dict[str, str] = {}
        if self.chooser is not None:
            asked = [
                Request(
                    q.id,
                    tuple(writer.feature_prompt(q, count, self.catalogue)),
                    derive_seed(seed, q.id, "features", 0),
                )
                for q in part
            ]
            kept = store / "features.jsonl"
            found = answers(self.chooser, asked, self.params, store=kept, advance=bar.advance)
            texts = {i: c.text for i, c in found.items()}
        drafts = []
        for query in part:
            named = writer.parse_features(texts.get(query.id, ""), self.catalogue)[:count]
            features = self._complete(query, named, seed)
            drafts.append(Draft(query, features, len(named)))
        return drafts

    def _complete(self, query: Query, named: tuple[str, ...], seed: int) -> tuple[str, ...]:
        rng = random.Random(derive_seed(seed, query.id))
        count = self.settings.features_per_query
        return writer.complete_features(named, count, rng, self.catalogue)

    def _ask(
        self,
        engine: Engine,
        drafts: Sequence[Draft],
        name: str,
        seed: int,
        bar: Bar,
        store: Path,
    ) -> None:
        settings, first = self.settings, name == TRIES[0]
        asked = []
        for d in drafts:
            prompt = writer.principle_prompt(
                d.query,
                d.features if settings.written_from == "features" else (),
                self.catalogue,
                settings.examples,
            )
            asked += [
                Request(f"{d.query.id}/{i}", tuple(prompt), derive_seed(seed, d.query.id, name, i))
                for i in range(settings.candidates)
            ]
        found = answers(
            engine,
            asked,
            self.params,
            store=store / f"{name}.jsonl",
            advance=lambda items, tokens: bar.advance(items if first else 0, tokens),
        )
        for draft in drafts:
            said = [found[f"{draft.query.id}/{i}"] for i in range(settings.candidates)]
            draft.take(
                name, [writer.read_answer(c.text, c.finish_reason, settings.examples) for c in said]
            )

    def _triple(self, draft: Draft, seed: int) -> Triple:
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


def _engines(recipe: Recipe, policy: str, engines: Engines) -> tuple[Engine | None, Engine | None]:
    """Who names the features (the policy), and who writes; None where nobody is asked."""
    settings, size = recipe.principles, recipe.principles.batch_size

    def own() -> Engine:
        batch_size = size or recipe.sampling.batch_size
        return engines.sampler(recipe.sampling.engine, policy, recipe.policy, batch_size)

    chooser = own() if settings.features == "model" else None
    if settings.mode != "generated":
        return chooser, None
    writer = settings.writer
    if writer is not None:
        return chooser, engines.get(writer, writer_source(writer), recipe.policy, size)
    return chooser, chooser or own()
