"""Queries to responses: each is answered by its own model in its own context.

Every stage that asks models shard by shard does so by an `Asking`: which answers it wants to each
record, in which words it asks, and what it makes of the record and its answers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Record, Records, batched
from selfsteer.data.records import Dropped, Message, Query, Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import (
    Advance,
    Completion,
    Contrast,
    Engine,
    Request,
    SamplingParams,
    no_news,
)
from selfsteer.engines.collapse import Said, collapsed, signs
from selfsteer.engines.load import Engines, check_engine
from selfsteer.errors import ConfigError
from selfsteer.principles.contexts import OPPOSITE, context_messages
from selfsteer.recipe.sections import (
    EngineConfig,
    Loading,
    PrincipledSampling,
    Sampling,
    WriterConfig,
    resolve_path,
)
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, run_shards
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import Share, stored_triples, subset
from selfsteer.terminal import progress_bar, warn

R = TypeVar("R", Query, Triple)


class Wanted(NamedTuple):
    """An answer that is wanted to each record."""

    response: str
    #: who writes it: folder or hub id
    model: str
    #: which one, where several of the kind are wanted
    number: int = 0


@dataclass(frozen=True)
class Asking(Generic[R]):
    """What is asked for every record, and what becomes of it.

    Args:
        wanted: the answers; those of one model are asked for together.
        prompt: the conversation that a response of this name answers.
        make: of a record and its answers, in the order of ``wanted``: what goes on, or `Dropped`.
        contrast: what a response of this name is pushed away from; None: nothing.
    """

    wanted: Sequence[Wanted]
    prompt: Callable[[R, str], Sequence[Message]]
    make: Callable[[R, Sequence[Completion]], Record]
    contrast: Callable[[R, str], Contrast | None] = lambda record, response: None

    def answers(
        self,
        part: Sequence[R],
        engine: Callable[[str], Engine],
        params: SamplingParams,
        *,
        seed: int,
        store: Path | None = None,
        advance: Advance = no_news,
    ) -> list[list[Completion]]:
        """The answers to each record.

        Args:
            part: the records.
            engine: the engine of a model.
            params: how to sample.
            seed: of the stage; every request's own follows from it, the record and the response.
            store: where answers wait until all of them are there: one file a model, this name in
                front.
            advance: told (answers, new tokens) as they finish.
        """
        found: dict[str, Completion] = {}
        for number, model in enumerate(dict.fromkeys(w.model for w in self.wanted)):
            asked = [
                Request(
                    f"{w.response}/{w.number}/{record.id}",
                    tuple(self.prompt(record, w.response)),
                    derive_seed(seed, record.id, w.response, w.number),
                    self.contrast(record, w.response),
                )
                for w in self.wanted
                if w.model == model
                for record in part
            ]
            waiting = store and store.with_name(f"{store.name}.{number}.jsonl")
            found |= answers(engine(model), asked, params, store=waiting, advance=advance)
        return [
            [found[f"{w.response}/{w.number}/{record.id}"] for w in self.wanted] for record in part
        ]

    def shards(
        self,
        records: Records[R],
        folder: Path,
        engine: Callable[[str], Engine],
        sampling: Sampling,
        *,
        seed: int,
        label: str,
        at_once: bool = False,
    ) -> StageResult:
        """Writes what is made of all records; warns once where the answers say nothing.

        Args:
            records: in a fixed order.
            folder: where the shards go.
            engine: the engine of a model.
            sampling: how.
            seed: of the stage.
            label: of the progress bar.
            at_once: whether all are asked for together; see `run_shards`.
        """
        params, each, sampled = params_of(sampling), len(self.wanted), Counter[str]()
        warned = False

        def noticed() -> str:
            # where unfinished answers are kept, to be cut off is no fault
            return collapsed(sampled, unfinished_count=not sampling.keep_unfinished)

        with progress_bar(label, len(records) * each, params.max_new_tokens) as bar:

            def work(store: Path, part: Sequence[R]) -> Iterator[Record]:
                nonlocal warned
                answered = self.answers(
                    part, engine, params, seed=seed, store=store, advance=bar.advance
                )
                for shard in batched(zip(part, answered, strict=True), sampling.shard_size):
                    found = [row for _, row in shard]
                    sampled.update(tokens_kept(answer for row in found for answer in row))
                    for response in dict.fromkeys(w.response for w in self.wanted):
                        sampled.update(signs(response, self._said(response, found)))
                    if not warned and (text := noticed()):  # while there is time to stop
                        warned = True
                        warn(f"{label}: {text}")
                    yield from (self.make(record, row) for record, row in shard)

            result = run_shards(
                folder,
                records,
                sampling.shard_size,
                work,
                lambda n: bar.skip(n * each),
                sampled,
                at_once=at_once,
            )
        if text := noticed():
            result.notes["warnings"] = [text]
            if not warned:
                warn(f"{label}: {text}")
        if known := sampled["answers"]:
            result.notes["sampled"] = {
                "answers": known,
                "retokenised": sampled["retokenised"] / known,
                "special_tokens": sampled["special_tokens"] / known,
            }
        return result

    def _said(self, response: str, found: Iterable[Sequence[Completion]]) -> Iterator[list[Said]]:
        """The answers of this name to each record, as far as there are any."""
        for row in found:
            named = [c for w, c in zip(self.wanted, row, strict=True) if w.response == response]
            yield [Said(c.text, c.finish_reason == "length") for c in named if not c.missing]

    def of_stage(
        self,
        stage: Stage,
        run: RunFolder,
        records: Records[R],
        sampling: Sampling,
        *,
        writer: WriterConfig | None = None,
        folder: str | None = None,
    ) -> StageResult:
        """`shards` as a stage's work.

        Args:
            stage: whose name, seed and model settings hold.
            run: where.
            records: in a fixed order.
            sampling: how.
            writer: who answers in place of the models.
            folder: in the run folder; None: that of the stage's name.
        """
        with Engines(run.path) as engines:

            def engine(source: str) -> Engine:
                loading, size = stage.loading, sampling.batch_size
                return who_answers(engines, sampling.engine, source, loading, size, writer)

            result = self.shards(
                records,
                run / (folder or stage.name),
                engine,
                sampling,
                seed=derive_seed(stage.seed, stage.name),
                label=stage.title,
                at_once=(writer or sampling.engine).batch,
            )
        result.notes |= engines.notes
        return result


def tokens_kept(found: Iterable[Completion]) -> Counter[str]:
    """Answers whose tokens are known, and those that are trained on as other tokens."""
    counts = Counter[str]()
    for answer in found:
        if answer.missing is None and answer.retokenised is not None:
            counts["answers"] += 1
            counts["retokenised"] += answer.retokenised
            counts["special_tokens"] += answer.special_tokens
    return counts


def params_of(sampling: Sampling) -> SamplingParams:
    """What an engine needs to know of how to sample."""
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)


def source_of(writer: WriterConfig) -> str:
    """The model of a writer: as its server calls it, or a folder or hub id."""
    return str(writer.model) if writer.base_url else resolve_path(str(writer.model))


def who_answers(
    engines: Engines,
    settings: EngineConfig,
    policy: str,
    loading: Loading,
    batch_size: int,
    writer: WriterConfig | None,
) -> Engine:
    """The engine of a writer; where there is none, that of the policy."""
    if writer is None:
        return engines.sampler(settings, policy, loading, batch_size)
    return engines.get(writer, source_of(writer), writer.loading(loading), batch_size)


def in_contexts(models: Mapping[str, str], sampling: Sampling) -> Asking[Triple]:
    """Response name → model: each response in the context of its name; see `Sample`."""
    ratios = sampling.ratios if isinstance(sampling, PrincipledSampling) else {}

    def prompt(triple: Triple, response: str) -> list[Message]:
        return context_messages(triple.messages, triple.principles, response)

    def contrast(triple: Triple, response: str) -> Contrast | None:
        if response not in ratios:
            return None
        return Contrast(tuple(prompt(triple, OPPOSITE[response])), ratios[response])

    def make(triple: Triple, said: Sequence[Completion]) -> Triple | Dropped:
        by_name = dict(zip(models, said, strict=True))
        bare = replace(triple, responses={}, finish_reasons={}, reasoning={})
        return with_answers(bare, by_name, sampling)

    return Asking([Wanted(*item) for item in models.items()], prompt, make, contrast)


def thoughts_kept(said: Mapping[str, Completion], sampling: Sampling) -> dict[str, str]:
    """The thoughts that are trained on with each answer that has any."""
    kept = said if sampling.reasoning == "keep" else {}
    return {name: c.reasoning for name, c in kept.items() if c.reasoning}


def with_answers(
    triple: Triple, said: Mapping[str, Completion], sampling: Sampling
) -> Triple | Dropped:
    """The triple with these answers as well; dropped where one of them is missing or cut off."""
    ended = {n: c.finish_reason for n, c in said.items() if not c.missing}
    made = replace(
        triple,
        responses={**{n: c.text for n, c in said.items()}, **triple.responses},
        finish_reasons={**triple.finish_reasons, **ended},
        reasoning={**triple.reasoning, **thoughts_kept(said, sampling)},
    )
    missing = next((c.missing for c in said.values() if c.missing), None)
    cut_off = "length" in ended.values() and not sampling.keep_unfinished
    reason = missing or ("unfinished" if cut_off else None)
    return Dropped(made.id, reason, made) if reason else made


@dataclass(frozen=True)
class Sample(Stage):
    """Answers to every query, each response by its own model, in its own context.

    A triple with a response cut off by the budget is dropped as ``unfinished`` unless the settings
    keep it, one whose prompt leaves no room for the budget as ``prompt_too_long``, one whose
    request failed for good as ``request_failed:REASON``, one whose thoughts did not end within the
    budget as ``unfinished_reasoning``, one that has thoughts and no answer as ``no_answer``.

    Args:
        queries: records; with principles where a context needs them.
        writers: response name → the model that writes it.
        sampling: how.
        limit: a seeded subset of so many queries; None: all.
        share: of the queries; None: all.
        title: its name within its round.
    """

    queries: Artifact
    writers: Mapping[str, Artifact]
    sampling: Sampling
    limit: int | None = None
    share: Share | None = None
    title: str = field(default="samples", kw_only=True)

    @override
    def records(self, scale: Scale) -> int:
        n = self.queries.records(scale)
        n = n if self.share is None else self.share.most(n)
        return n if self.limit is None else min(n, self.limit)

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        answers = Counter(dict.fromkeys(self.writers, n))
        if isinstance(self.sampling, PrincipledSampling):
            answers["contrast"] = n * len(self.sampling.ratios.keys() & self.writers.keys())
        return Cost(records=n, answers=+answers)

    @override
    def check(self) -> Iterator[str]:
        yield from check_sampler(self.sampling, self.writers.values(), self.loading)

    @override
    def run(self, run: RunFolder) -> StageResult:
        triples = stored_triples(self.queries.path)
        triples = triples if self.share is None else self.share.take(triples)
        triples = subset(triples, self.limit, self.seed)
        models = {name: str(model.path) for name, model in self.writers.items()}
        asking = in_contexts(models, self.sampling)
        return asking.of_stage(self, run, triples, self.sampling)


# -- what is checked before ------------------------------------------------------------------------


def check_sampler(
    sampling: Sampling, models: Iterable[Artifact], loading: Loading
) -> Iterator[str]:
    """Fails now if the engine cannot be asked, or a given model has no room for the budget.

    Yields:
        What is odd about the models but works.
    """
    check_engine(sampling.engine)
    for model in models:
        if model.maker is None:
            budget = {"sampling.max_new_tokens": sampling.max_new_tokens}
            yield from check_budget(str(model.path), loading, budget)


def check_writer(
    writer: WriterConfig | None, loading: Loading, budget: Mapping[str, int]
) -> Iterator[str]:
    """`check_budget` of a writer, if there is one; of one behind a server, whether it answers."""
    if writer is not None:
        check_engine(writer)
        if not writer.base_url:
            yield from check_budget(source_of(writer), writer.loading(loading), budget)


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
    from selfsteer.models.load import load_chat, load_context_length, serving_notes

    chat = load_chat(source, loading)
    yield from (*chat.notes, *serving_notes(source, loading))
    limit = load_context_length(source, loading)
    for key, budget in budgets.items():
        if limit is not None and budget >= limit:
            raise ConfigError(
                f"{key} {budget} leaves no room for a prompt: {source} has a context of {limit} "
                f"tokens. Lower it, for example: {key}={limit // 2}."
            )
