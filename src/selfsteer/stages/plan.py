"""Each arrow of the data flow as a fingerprinted stage; `selfsteer.run.execute` puts them in order.

Nothing heavy is imported before a stage works.
"""

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed, digest, digest_path, model_digest
from selfsteer.data.jsonl import Records, dump_line, dump_lines, write_atomic
from selfsteer.data.queries import Loaded, load_queries, queries_digest
from selfsteer.data.records import Preference, Query, Triple
from selfsteer.data.stored import Stored
from selfsteer.engines.base import Engine
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.evaluation.harness import benchmark_inputs
from selfsteer.judges.base import judge_inputs
from selfsteer.principles.catalogue import catalogue_of
from selfsteer.principles.fixed import read_fixed
from selfsteer.recipe.sections import (
    NOT_RESULTS,
    EngineConfig,
    PrinciplesConfig,
    Recipe,
    Selection,
    resolve_path,
)
from selfsteer.run.folder import RunFolder, Stage, StageResult
from selfsteer.terminal import warn

#: Settings of a query set that decide which of its queries are taken.
CURATION = {"limit", "min_chars", "max_chars", "scripts", "near_duplicates", "ngram"}


@dataclass(frozen=True)
class Made:
    """Something a stage made: where it is, and the fingerprint of its maker."""

    path: Path
    fingerprint: str


class Plan:
    """Lists the stages of a recipe, each fingerprinted with all that its result depends on."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        self.recipe, self.run = recipe, run
        self.stages: list[Stage] = []
        self.base = Made(
            Path(resolve_path(recipe.policy.model)),
            model_digest(resolve_path(recipe.policy.model)),
        )
        self.judge = judge_inputs(recipe.judge)
        #: The newest preferences of the plan.
        self.pairs: Made | None = None
        if recipe.method == "reward":
            return
        self.queries = self._queries()
        if recipe.queries.augment is not None:
            self.queries = self._augment(self.queries)

    def add(
        self,
        name: str,
        outputs: Sequence[str],
        inputs: dict[str, Any],
        work: Callable[[], StageResult],
        scratch: tuple[str, ...] = (),
        *,
        on_ranks: bool = False,
    ) -> str:
        """Appends a stage and returns its fingerprint."""
        shared = {"seed": self.recipe.seed, "policy": self._model_settings()}
        stage = Stage(name, tuple(outputs), {**shared, **inputs}, work, scratch, on_ranks)
        self.stages.append(stage)
        return stage.fingerprint

    def _model_settings(self) -> dict[str, Any]:
        return self.recipe.policy.model_dump(exclude={"model", "threads"})

    # -- the stages -----------------------------------------------------------------------------

    def _queries(self) -> Made:
        settings, path = self.recipe.queries, self.run / "queries.jsonl"

        recipe = self.recipe

        def work() -> StageResult:
            from selfsteer.judges.base import load_judges
            from selfsteer.stages.rivals import given_answers

            found = load_queries(settings, self.run.path)
            for judge in load_judges(recipe.judges):
                judge.check(found.queries)
            if recipe.method == "spin":
                given_answers(settings.path)
            if settings.against:
                write_atomic(self.run / "contaminated.jsonl", dump_lines(found.overlaps))
            write_atomic(path, map(dump_line, found.queries))
            n_in = len(found.queries) + sum(found.dropped.values())
            return StageResult(n_in, len(found.queries), found.dropped, notes=reading_notes(found))

        inputs = {
            "queries": queries_digest(settings),
            "curation": settings.model_dump(include=CURATION),
        }
        outputs = ["queries.jsonl", *(["contaminated.jsonl"] if settings.against else [])]
        return Made(path, self.add("queries", outputs, inputs, work))

    def _augment(self, queries: Made) -> Made:
        """The queries and what the policy adds to them."""
        recipe, path = self.recipe, self.run / "augmented.jsonl"
        held_out = recipe.evaluation.queries if recipe.evaluation else None

        def work() -> StageResult:
            from selfsteer.engines.load import Engines
            from selfsteer.judges.base import load_judges
            from selfsteer.stages.augment import augment

            judges = load_judges(recipe.judges)

            def check(query: Query) -> None:
                for judge in judges:
                    judge.check([query])

            with Engines(self.run.path) as engines:
                result = augment(
                    list(stored_queries(queries.path)),
                    recipe.queries,
                    engines.sampler(recipe, str(self.base.path)),
                    path,
                    seed=derive_seed(recipe.seed, "augment"),
                    shard_size=recipe.sampling.shard_size,
                    evaluation=load_queries(held_out).queries if held_out else (),
                    check=check,
                )
                result.notes |= engines.notes
            return result

        inputs = {
            "queries": queries.fingerprint,
            "augment": recipe.queries.model_dump(include={"augment"}),
            "evaluation": queries_digest(held_out) if held_out else None,
            "evaluation_curation": held_out.model_dump(include=CURATION) if held_out else None,
            "judges": [j.kind for j in recipe.judges],  # they may have no use for some queries
            "batch": [recipe.sampling.batch_size, recipe.sampling.shard_size],
            "policy_model": self.base.fingerprint,
            "engine": recipe.sampling.engine.identity,
        }
        return Made(path, self.add("augment", [path.name], inputs, work, ("augment",)))

    def principles(self, where: str, iteration: int, policy: Made) -> Made:
        """Features and p+, p- for the queries of this iteration."""
        recipe, folder = self.recipe, self.run / where
        stage = f"{where}/principles"

        def work() -> StageResult:
            from selfsteer.stages.principles import write_principles

            queries = self._iteration_queries(iteration)
            source = str(policy.path)
            return write_principles(queries, recipe, source, folder, stage, home=self.run.path)

        inputs = {
            "queries": self.queries.fingerprint,
            "share": self._share(iteration),
            "policy_model": policy.fingerprint,
            "engine": recipe.sampling.engine.identity if recipe.principles.asks_a_model else None,
            **principle_sources(recipe.principles),
        }
        outputs, scratch = [f"{where}/principles.jsonl"], (f"{where}/principles",)
        return Made(folder / "principles.jsonl", self.add(stage, outputs, inputs, work, scratch))

    def sample(
        self,
        where: str,
        name: str,
        principles: Made,
        models: dict[str, Made],
        limit: int | None = None,
    ) -> Made:
        """Responses to every query, or to a seeded subset, each by its own model."""
        recipe, folder, stage = self.recipe, self.run / where / name, f"{where}/{name}"

        def work() -> StageResult:
            from selfsteer.engines.load import Engines
            from selfsteer.stages.sample import sample

            triples = subset(stored_triples(principles.path), limit, recipe.seed)
            sources = {response: str(m.path) for response, m in models.items()}
            with Engines(self.run.path) as engines:
                result = sample(
                    triples,
                    recipe,
                    sources,
                    folder,
                    stage,
                    lambda source: engines.sampler(recipe, source),
                )
                result.notes |= engines.notes
            return result

        inputs = {
            "principles": principles.fingerprint,
            "models": {response: m.fingerprint for response, m in models.items()},
            "sampling": recipe.sampling.dump_for_answers(),
            "limit": limit,
        }
        return Made(folder, self.add(stage, [stage], inputs, work))

    def ranked(self, where: str, policy: Made) -> Made:
        """Several plain answers to each query, the best and the worst of them as a pair."""
        recipe, stage = self.recipe, f"{where}/ranked"
        by_policy = recipe.method == "self-rewarding"

        def work() -> StageResult:
            from selfsteer.stages.rank import best_of_n
            from selfsteer.stages.rivals import policy_as_judge, ranker

            settings = policy_as_judge(recipe, str(policy.path)) if by_policy else recipe.ranker
            assert settings is not None
            return best_of_n(
                stored_queries(self.queries.path),
                recipe.ranking.samples,
                recipe,
                str(policy.path),
                lambda: ranker(settings, self.run / "judgements"),
                self.run / stage,
                stage,
                self.run.path,
                settings.tie_margin,
            )

        inputs = {
            "queries": self.queries.fingerprint,
            "samples": recipe.ranking.samples,
            "judge": "policy" if by_policy else judge_inputs(recipe.ranker),
            "policy_model": policy.fingerprint,
            "sampling": recipe.sampling.dump_for_answers(),
        }
        return Made(self.run / stage, self.add(stage, [stage], inputs, work))

    def opponents(self, where: str, policy: Made) -> Made:
        """Given answers against the policy's own (SPIN)."""
        recipe, stage = self.recipe, f"{where}/opponents"
        samples = self.sample(where, "samples", self.queries, {"plain": policy})
        output = self.run / where / "opponents.jsonl"

        def work() -> StageResult:
            from selfsteer.stages.rivals import against_given

            return against_given(stored_triples(samples.path), recipe, output)

        inputs = {"samples": samples.fingerprint}  # the file of answers is that of the queries
        return Made(output, self.add(stage, [f"{where}/{output.name}"], inputs, work))

    def improved(self, where: str, policy: Made) -> Made:
        """The policy's answers, written again, against what they were (SGPO)."""
        recipe, stage = self.recipe, f"{where}/improved"
        samples = self.sample(where, "samples", self.queries, {"plain": policy})

        def work() -> StageResult:
            from selfsteer.engines.load import Engines, writer_source
            from selfsteer.stages.rivals import improve

            found, improver = stored_triples(samples.path), recipe.improver
            size = recipe.sampling.batch_size
            with Engines(self.run.path) as engines:

                def engine() -> Engine:
                    if improver is None:
                        return engines.sampler(recipe, str(policy.path))
                    return engines.get(improver, writer_source(improver), recipe.policy, size)

                result = improve(found, recipe, engine, self.run / stage, stage)
                result.notes |= engines.notes
            return result

        inputs = {
            "samples": samples.fingerprint,
            "improver": recipe.improver and writer_inputs(recipe.improver),
            "policy_model": policy.fingerprint,
            "sampling": recipe.sampling.dump_for_answers(),
        }
        return Made(self.run / stage, self.add(stage, [stage], inputs, work))

    def filter(self, where: str, triples: Made, policy: Made, *, trained_on: bool = False) -> Made:
        """Hygiene, and v1's filter where the recipe asks for it."""
        recipe, folder = self.recipe, self.run / where

        def work() -> StageResult:
            from selfsteer.stages.filter import filter_triples

            found = stored_triples(triples.path)
            scores = self.run / "scores"
            return filter_triples(
                found, recipe, str(policy.path), folder, scores, trained_on=trained_on
            )

        inputs = {
            "triples": triples.fingerprint,
            "hygiene": recipe.hygiene.dump_for_pairs(),
            "filter": recipe.active_filter and recipe.active_filter.model_dump(),
            "policy_model": policy.fingerprint,
        }
        stage = f"{where}/filter"
        return Made(
            folder / "filtered.jsonl", self.add(stage, [f"{where}/filtered.jsonl"], inputs, work)
        )

    def generator(self, where: str, triples: Made, policy: Made, half: str | None = None) -> Made:
        """The data generator, or one half of it, trained from the policy."""
        recipe = self.recipe
        stage = f"{where}/generator/{half}" if half else f"{where}/generator"

        def work() -> StageResult:
            from selfsteer.stages.train import objective_from, train_on

            name = f"sso-{half}-only" if half else recipe.generator.objective

            return train_on(
                list(stored_triples(triples.path)),
                objective_from(name, recipe.generator),
                recipe.generator,
                **self._for_training(),
                sampling=recipe.sampling,
                judge=recipe.judge,
                contexts={"plus": ("good",), "minus": ("bad",)}.get(half or "", ("good", "bad")),
                start=str(policy.path),
                reference=str(self._reference(recipe.generator.reference, policy).path),
                output=self.run / stage,
                scores=self.run / "scores",
                stage=stage,
                run=self.run,
            )[0]

        inputs = {
            "triples": triples.fingerprint,
            "generator": recipe.generator.model_dump(exclude={"queries", *NOT_RESULTS}),
            "start": policy.fingerprint,
            "reference": self._reference(recipe.generator.reference, policy).fingerprint,
            **self._selected_by(recipe.generator.selection),
        }
        return self._training(stage, inputs, work)

    def preferences(self, where: str, samples: Made, *, cleaned: bool = False) -> Made:
        """The plain pairs (x; y+ ≻ y-)."""
        recipe, stage = self.recipe, f"{where}/preferences"

        def work() -> StageResult:
            from selfsteer.stages.filter import to_preferences

            found = stored_pairs(samples.path)
            return to_preferences(found, recipe, self.run / stage, cleaned=cleaned)

        inputs = {
            "samples": samples.fingerprint,
            "hygiene": recipe.hygiene.dump_for_pairs(),
            "shard_size": recipe.sampling.shard_size,
        }
        self.pairs = Made(self.run / stage, self.add(stage, [stage], inputs, work))
        return self.pairs

    def train_reward(self, own: Made | None) -> None:
        """The reward model, on the run's own preferences and the recipe's other sets."""
        recipe, settings = self.recipe, self.recipe.reward
        assert settings is not None
        start = resolve_path(settings.model or recipe.policy.model)
        given = [(d.label, preferences_of(d.path), d.weight) for d in settings.data]
        mine = [(recipe.own_set, own.path, settings.own_weight)] if own else []

        def work() -> StageResult:
            from selfsteer.stages.train_reward import train_reward

            return train_reward(
                [*mine, *given], start, settings, **self._for_training(), run=self.run
            )[0]

        ignored = {"model", "data", "own_weight", "save_every_steps", "gradient_checkpointing"}
        inputs = {
            "reward": settings.model_dump(exclude=ignored),
            "weights": [(label, weight) for label, _, weight in [*mine, *given]],
            "own": own and own.fingerprint,
            "data": [digest_path(path) for _, path, _ in given],
            "start": model_digest(start),
        }
        self.add("train_reward", ["reward", "reward.json"], inputs, work, ("reward.partial",))

    def quality(
        self,
        where: str,
        preferences: Made,
        principles: Made | None,
        policy: Made,
        triples: Made | None,
    ) -> None:
        """Accuracy, on-policyness, steering gap and lengths of what the policy will see."""
        recipe, stage = self.recipe, f"{where}/quality"
        output = self.run / where / "quality.json"

        def work() -> StageResult:
            from selfsteer.stages.measure import measure_quality

            return measure_quality(
                stored_preferences(preferences.path),
                stored_triples(principles.path) if principles else (),
                recipe,
                str(policy.path),
                output,
                self.run.path,
                stage,
                stored_triples(triples.path) if triples else (),
            )

        inputs = {
            "preferences": preferences.fingerprint,
            "triples": triples.fingerprint if triples else None,
            "judge": self.judge,
            "policy_model": policy.fingerprint,
        }
        self.add(stage, [f"{where}/quality.json"], inputs, work)

    def policy(self, where: str, method: str, data: Made, policy: Made) -> Made:
        """The policy of the next iteration."""
        recipe, stage = self.recipe, f"{where}/policy"

        def work() -> StageResult:
            from selfsteer.stages.train import objective_from, train_on

            triples = (
                list(stored_triples(data.path))
                if method == "sso-online"
                else [p.to_triple() for p in stored_preferences(data.path)]
            )
            return train_on(
                triples,
                objective_from(method, recipe.training),
                recipe.training,
                **self._for_training(),
                sampling=recipe.sampling,
                judge=recipe.judge,
                contexts=("plain",),
                start=str(policy.path),
                reference=str(self._reference(recipe.training.reference, policy).path),
                output=self.run / stage,
                scores=self.run / "scores",
                stage=stage,
                run=self.run,
            )[0]

        inputs = {
            "data": data.fingerprint,
            "method": method,
            "training": recipe.training.model_dump(exclude=NOT_RESULTS),
            "start": policy.fingerprint,
            "reference": self._reference(recipe.training.reference, policy).fingerprint,
            **self._selected_by(recipe.training.selection),
        }
        return self._training(stage, inputs, work)

    def evaluation(self, policies: dict[str, list[Made]], exhibit: dict[str, Made]) -> None:
        """Base, baseline and policy on held-out queries."""
        recipe = self.recipe
        if recipe.evaluation is None:
            return
        settings = recipe.evaluation
        models = {"base": self.base}
        finals = {}
        for method, made in policies.items():
            for k, policy in enumerate(made, 1):
                finals[method] = f"{method}/iteration-{k}"
                models[finals[method]] = policy

        def work() -> StageResult:
            from selfsteer.stages.measure import evaluate

            found = load_queries(settings.queries)
            self._check_held_out(found.queries)
            result = evaluate(
                found.queries,
                {label: str(m.path) for label, m in models.items()},
                finals,
                {name: str(m.path) for name, m in exhibit.items()},
                recipe,
                self.run.path,
            )
            result.n_in += found.dropped.total()
            result.dropped.update(found.dropped)
            result.notes |= reading_notes(found)
            return result

        inputs = {
            "queries": queries_digest(settings.queries),
            "evaluation": settings.model_dump(exclude={"queries"}),
            "curation": settings.queries.model_dump(include=CURATION),
            "sampling": recipe.sampling.dump_for_answers(),
            "judge": self.judge,
            "models": {label: m.fingerprint for label, m in models.items()},
        }
        self.add("evaluation", ["evaluation.json", "evaluation"], inputs, work)

    def _training(
        self, stage: str, inputs: dict[str, Any], work: Callable[[], StageResult]
    ) -> Made:
        made = self.add(stage, [stage], inputs, work, _scratch(stage), on_ranks=True)
        return Made(self.run / stage, made)

    def benchmarks(self, policies: dict[str, list[Made]]) -> None:
        """Base, baseline and policy on benchmarks; of several iterations the last."""
        recipe = self.recipe
        if recipe.benchmarks is None:
            return
        last = {method: made[-1] for method, made in reversed(policies.items())}
        models = {"base": self.base, **last}

        def work() -> StageResult:
            from selfsteer.stages.benchmark import Contestant, benchmark

            # by content: on a GPU the same recipe need not train the same model twice
            rows = [
                Contestant(n, str(m.path), model_digest(str(m.path))) for n, m in models.items()
            ]
            return benchmark(rows, recipe, self.run.path)

        inputs = {
            **benchmark_inputs(recipe.benchmarks),
            "sampling": recipe.sampling.dump_for_answers(),
            "judge": judge_inputs(recipe.benchmark_judge),
            "models": {label: m.fingerprint for label, m in models.items()},
        }
        self.add("benchmarks", ["benchmarks.json", "benchmarks.md"], inputs, work)

    # -- helpers --------------------------------------------------------------------------------

    def _reference(self, which: str, policy: Made) -> Made:
        return self.base if which == "first" else policy

    def _for_training(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "loading": recipe.policy.loading,
            "lora": recipe.policy.lora,
            "seed": recipe.seed,
            "keep_checkpoints": recipe.keep.checkpoints,
        }

    def _selected_by(self, selection: Selection) -> dict[str, Any]:
        """What decides which step is kept, beside the selection's own settings."""
        if not selection.points:
            return {}
        # candidates answer in process, whoever else samples
        sampling = self.recipe.sampling.model_dump(exclude={"engine"})
        return {"sampling": sampling, "judge": self.judge}

    def _share(self, iteration: int) -> dict[str, Any] | None:
        """Which slice of the queries an iteration takes; None is all of them."""
        if self.recipe.method != "sso-online":
            return None
        size = self.recipe.queries.per_iteration
        # with a size of its own, a run can be given more iterations later
        return {
            "iteration": iteration,
            "size": size,
            "of": None if size else self.recipe.iterations,
        }

    def _iteration_queries(self, iteration: int) -> Records[Query]:
        queries = stored_queries(self.queries.path)
        share = self._share(iteration)
        if share is None:
            return queries
        if share["size"]:
            start, size = (iteration - 1) * share["size"], share["size"]
        else:  # slices of nearly equal size that leave no query out
            start, end = (len(queries) * k // share["of"] for k in (iteration - 1, iteration))
            size = max(end - start, 1)
        if start + size > len(queries):
            warn(
                f"iteration {iteration} needs queries {start + 1:,} to {start + size:,} of "
                f"{len(queries):,}; earlier ones are used again"
            )
        # the file is in id order
        places = ((start + i) % len(queries) for i in range(min(size, len(queries))))
        return queries.take(sorted(places))

    def _check_held_out(self, queries: Sequence[Query]) -> None:
        held_out = {q.messages for q in queries}
        seen = {q.messages for q in stored_queries(self.queries.path) if q.messages in held_out}
        shared = sum(q.messages in seen for q in queries)
        if shared:
            warn(
                f"{shared} of {len(queries)} evaluation queries are also alignment queries: the "
                "evaluation is not held out"
            )


def _scratch(stage: str) -> tuple[str, ...]:
    """What a training leaves beside its model: checkpoints while it works, then its candidates."""
    return (f"{stage}.partial", f"{stage}.selection.json")


def reading_notes(found: Loaded) -> dict[str, Any]:
    """What else is worth knowing of how a query set was read."""
    notes = {"answers_cut": found.answers_cut, "not_compared": dict(found.not_compared)}
    return {name: value for name, value in notes.items() if value}


def principle_sources(settings: PrinciplesConfig) -> dict[str, Any]:
    """What principles are made from, files and models by content."""
    own = {"principles": settings.model_dump(exclude={"path", "catalogue", "writer"})}
    if settings.mode == "fixed":
        given = read_fixed(settings.path) if settings.path else {}
        return {**own, "given": digest({i: p.to_dict() for i, p in given.items()})}
    writer = settings.writer and writer_inputs(settings.writer)
    return {**own, "catalogue": catalogue_of(settings).model_dump(), "writer": writer}


def writer_inputs(writer: EngineConfig) -> dict[str, Any]:
    """What the answers of a writer depend on."""
    assert writer.model is not None
    if writer.base_url is not None:
        return writer.identity
    return {**writer.identity, "model": model_digest(resolve_path(writer.model))}


def subset(triples: Stored[Triple], limit: int | None, seed: int) -> Stored[Triple]:
    """A seeded subset that does not depend on the order of the rest, in the given order."""
    if limit is None or len(triples) <= limit:
        return triples
    hashes = ((derive_seed(seed, "subset", t.id), i) for i, t in enumerate(triples))
    return triples.take(sorted(i for _, i in heapq.nsmallest(limit, hashes)))


def preferences_of(source: str) -> Path:
    """Where a preference set is: a file or folder, or the last preferences of a run folder.

    Raises:
        ConfigError: there is nothing.
        ArtifactError: the run has not come that far.
    """
    path = Path(resolve_path(source))
    if (path / "resolved.json").is_file():
        run = RunFolder(path)
        last = json.loads((path / "resolved.json").read_text("utf-8"))["iterations"]
        path = run.iteration(last, baseline=False) / "preferences"
        entry = run.last(f"iteration-{last}/preferences")
        if path.exists() and (entry is None or entry["event"] != "finish"):
            raise ArtifactError(
                f"{path} is not finished, so some of its preferences are missing. Let the run "
                f"{source} come that far first."
            )
    if not path.exists():
        raise ConfigError(f"There are no preferences at {path}; give a file or a run folder.")
    return path


def stored_queries(path: Path) -> Stored[Query]:
    """Queries of a JSONL file."""
    return Stored(path, Query.from_dict)


def stored_triples(path: Path) -> Stored[Triple]:
    """Triples of a JSONL file or of a folder of shards."""
    return Stored(path, Triple.from_dict)


def stored_pairs(path: Path) -> Stored[Triple]:
    """Good and bad response of each query: of triples, or of ranked preferences."""
    return Stored(path, _pair)


def _pair(row: Mapping[str, Any]) -> Triple:
    return Preference.from_dict(row).to_triple() if "chosen" in row else Triple.from_dict(row)


def stored_preferences(folder: Path) -> Stored[Preference]:
    """Preferences of a folder of shards."""
    return Stored(folder, Preference.from_dict)
