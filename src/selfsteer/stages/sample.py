"""Queries to responses: each is answered by its own model in its own context."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records
from selfsteer.data.records import Dropped, Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Advance, Completion, Engine, Request, SamplingParams
from selfsteer.errors import ConfigError
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Loading, Sampling
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, run_shards
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_triples, subset
from selfsteer.terminal import progress_bar


@dataclass(frozen=True)
class Sample(Stage):
    """Answers to every query, each response by its own model, in its own context.

    A triple with a response cut off by the budget is dropped as ``unfinished`` unless the settings
    keep it, one whose prompt leaves no room for the budget as ``prompt_too_long``, one whose
    request failed for good as ``request_failed:REASON``.

    Args:
        queries: records; with principles where a context needs them.
        writers: response name → the model that writes it.
        sampling: how.
        limit: a seeded subset of so many queries; None: all.
        title: its name within its round.
    """

    queries: Artifact
    writers: Mapping[str, Artifact]
    sampling: Sampling
    limit: int | None = None
    title: str = field(default="samples", kw_only=True)

    @override
    def records(self, scale: Scale) -> int:
        n = self.queries.records(scale)
        return n if self.limit is None else min(n, self.limit)

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        return Cost(records=n, answers=Counter(dict.fromkeys(self.writers, n)))

    @override
    def check(self) -> Iterator[str]:
        yield from check_sampler(self.sampling, self.writers.values(), self.loading)

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.engines.load import Engines

        triples, s = subset(stored_triples(self.queries.path), self.limit, self.seed), self.sampling
        with Engines(run.path) as engines:
            result = sample(
                triples,
                {name: str(model.path) for name, model in self.writers.items()},
                lambda source: engines.sampler(s.engine, source, self.loading, s.batch_size),
                s,
                run / self.name,
                seed=derive_seed(self.seed, self.name),
                label=self.title,
            )
        result.notes |= engines.notes
        return result


def sample(
    triples: Records[Triple],
    models: Mapping[str, str],
    engine: Callable[[str], Engine],
    sampling: Sampling,
    folder: Path,
    *,
    seed: int,
    label: str,
) -> StageResult:
    """Writes shards of triples with the responses asked for; see `Sample`.

    Args:
        triples: queries with principles, in a fixed order.
        models: response name → the model that writes it.
        engine: the engine of a model.
        sampling: how.
        folder: where the shards go.
        seed: of the stage.
        label: of the progress bar.
    """
    names = tuple(models)
    with progress_bar(label, len(triples) * len(names)) as bar:

        def work(shard: int, part: Sequence[Triple]) -> tuple[list[Triple], list[Dropped]]:
            found = answer(
                part,
                models,
                engine,
                params_of(sampling),
                seed=seed,
                store=folder / f"answers-{shard:05d}",
                advance=bar.advance,
            )
            return collect(part, names, found, keep_unfinished=sampling.keep_unfinished)

        return run_shards(
            folder, triples, sampling.shard_size, work, lambda n: bar.skip(n * len(names))
        )


def params_of(sampling: Sampling) -> SamplingParams:
    """What an engine needs to know of how to sample."""
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)


def answer(
    part: Sequence[Triple],
    models: Mapping[str, str],
    engine: Callable[[str], Engine],
    params: SamplingParams,
    *,
    seed: int,
    store: Path | None,
    advance: Advance,
) -> dict[tuple[str, str], Completion]:
    """(triple id, response name) → the answer of its model in its context.

    Args:
        part: queries with principles.
        models: response name → model; the responses of one model are asked for together.
        engine: the engine of a model.
        params: how to sample.
        seed: of the stage; every request's own follows from it, the query and the response.
        store: where answers wait until all of them are there: one file a model, this name in front.
        advance: told (answers, new tokens) as they finish.
    """
    found: dict[tuple[str, str], Completion] = {}
    for source in dict.fromkeys(models.values()):
        keys = {
            f"{name}/{t.id}": (t, name)
            for name, model in models.items()
            if model == source
            for t in part
        }
        asked = [
            Request(
                key,
                tuple(context_messages(t.messages, t.principles, name)),
                derive_seed(seed, t.id, name, 0),
            )
            for key, (t, name) in keys.items()
        ]
        names = "-".join(name for name, model in models.items() if model == source)
        waiting = store and store.with_name(f"{store.name}.{names}.jsonl")
        said = answers(engine(source), asked, params, store=waiting, advance=advance)
        found.update({(t.id, name): said[key] for key, (t, name) in keys.items()})
    return found


def collect(
    part: Sequence[Triple],
    names: tuple[str, ...],
    found: Mapping[tuple[str, str], Completion],
    *,
    keep_unfinished: bool,
) -> tuple[list[Triple], list[Dropped]]:
    """The triples with their answers, and those that are dropped; see `Sample`."""
    kept, dropped = [], []
    for triple in part:
        said = {n: found[triple.id, n] for n in names}
        made = replace(
            triple,
            responses={n: c.text for n, c in said.items()},
            finish_reasons={n: c.finish_reason for n, c in said.items() if not c.missing},
        )
        missing = next((c.missing for c in said.values() if c.missing), None)
        cut_off = any(c.finish_reason == "length" for c in said.values())
        if missing:
            dropped.append(Dropped(triple.id, missing, made))
        elif cut_off and not keep_unfinished:
            dropped.append(Dropped(triple.id, "unfinished", made))
        else:
            kept.append(made)
    return kept, dropped


def check_sampler(
    sampling: Sampling, models: Iterable[Artifact], loading: Loading
) -> Iterator[str]:
    """Fails now if the engine cannot be asked, or a given model has no room for the budget.

    Yields:
        What is odd about the models but works.
    """
    from selfsteer.engines.load import check_engine

    check_engine(sampling.engine)
    for model in models:
        if model.maker is None:
            budget = {"sampling.max_new_tokens": sampling.max_new_tokens}
            yield from check_budget(str(model.path), loading, budget)


def check_budget(source: str, loading: Loading, budgets: Mapping[str, int]) -> Iterator[str]:
    """Fails now if a model cannot be loaded, or its context leaves no room for a prompt.

    Args:
        source: folder or hub id.
        loading: how it would be loaded.
        budgets: setting → new tokens.

    Yields:
        What is odd about it but works.

    Raises:
        ArtifactError: no such model, or a chat template is missing.
        ConfigError: a budget exceeds the model's context.
    """
    from selfsteer.models.load import load_chat, load_context_length

    chat = load_chat(source, loading)
    if not chat.has_system_role:
        yield f"{source} has no system role: principles go in front of the first user turn"
    limit = load_context_length(source, loading)
    for key, budget in budgets.items():
        if limit is not None and budget >= limit:
            raise ConfigError(
                f"{key} {budget} leaves no room for a prompt: {source} has a context of {limit} "
                f"tokens. Lower it, for example: {key}={limit // 2}."
            )
