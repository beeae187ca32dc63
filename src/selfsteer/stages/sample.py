"""Principles to triples: an engine answers each query in the contexts that are asked for."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records
from selfsteer.data.records import Triple
from selfsteer.engines.base import Advance, Completion, Engine, SamplingParams
from selfsteer.engines.shards import Ask, Work, at_once
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Recipe
from selfsteer.run.folder import StageResult, run_shards
from selfsteer.terminal import progress_bar


def sample(
    triples: Records[Triple],
    recipe: Recipe,
    models: dict[str, str],
    folder: Path,
    stage: str,
    engine: Callable[[str], Engine],
) -> StageResult:
    """Writes shards of triples whose responses are those asked for.

    Args:
        triples: queries with principles, in a fixed order.
        recipe: sampling settings and seed.
        models: response name → model that writes it, in its own context: ``{"good": A, "bad": A,
            "plain": A}``; two generators give two different models.
        folder: where the shards go.
        stage: the stage's name, part of every seed.
        engine: the engine of a model.

    Returns:
        Counts; a triple with a response cut off by the budget is dropped as ``unfinished`` unless
        the recipe keeps it, one whose prompt leaves no room for the budget as ``prompt_too_long``,
        one whose request failed for good as ``request_failed:REASON``.
    """
    settings = recipe.sampling

    with progress_bar(stage.rpartition("/")[2], len(triples) * len(models)) as bar:

        def work(shard: int, part: Sequence[Triple]) -> Work[tuple[list[Triple], Counter[str]]]:
            found = yield from answer(part, models, engine, recipe, stage, shard, bar.advance)
            return collect(part, tuple(models), found, settings.keep_unfinished)

        return run_shards(
            folder,
            triples,
            settings.shard_size,
            work,
            lambda n: bar.skip(n * len(models)),
            at_once,
        )


def answer(
    part: Sequence[Triple],
    models: Mapping[str, str],
    engine: Callable[[str], Engine],
    recipe: Recipe,
    stage: str,
    shard: int,
    advance: Advance,
) -> Work[dict[tuple[str, str], Completion]]:
    """(triple id, response name) → the answer of its model in its context.

    Args:
        part: queries with principles.
        models: response name → model; the responses of one model are decoded together.
        engine: the engine of a model.
        recipe: sampling settings and seed.
        stage: part of the seed.
        shard: part of the seed.
        advance: told (answers, new tokens) as they finish.
    """
    s = recipe.sampling
    params = SamplingParams(s.temperature, s.top_p, s.max_new_tokens)
    found: dict[tuple[str, str], Completion] = {}
    for source in dict.fromkeys(models.values()):
        names = [n for n, m in models.items() if m == source]
        keys = [(t.id, n) for n in names for t in part]
        prompts = [context_messages(t.messages, t.principles, n) for n in names for t in part]
        seed = derive_seed(recipe.seed, stage, shard, *names)
        answers = yield Ask(engine(source), prompts, params, seed, advance)
        found.update(zip(keys, answers, strict=True))
    return found


def collect(
    part: Sequence[Triple],
    names: tuple[str, ...],
    found: Mapping[tuple[str, str], Completion],
    keep_unfinished: bool,
) -> tuple[list[Triple], Counter[str]]:
    """The triples with their answers, and drops by reason; see `sample`."""
    kept, dropped = [], Counter[str]()
    for triple in part:
        answers = {n: found[triple.id, n] for n in names}
        missing = next((c.missing for c in answers.values() if c.missing), None)
        if missing:
            dropped[missing] += 1
            continue
        if not keep_unfinished and any(c.finish_reason == "length" for c in answers.values()):
            dropped["unfinished"] += 1
            continue
        kept.append(
            replace(
                triple,
                responses={n: c.text for n, c in answers.items()},
                finish_reasons={n: c.finish_reason for n, c in answers.items()},
            )
        )
    return kept, dropped
