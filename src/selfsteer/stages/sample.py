"""Principles to triples: an engine answers each query in the contexts that are asked for."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records
from selfsteer.data.records import Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Advance, Completion, Engine, Request, SamplingParams
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Recipe
from selfsteer.run.folder import StageResult, run_shards, scratch_of
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

        def work(shard: int, part: Sequence[Triple]) -> tuple[list[Triple], Counter[str]]:
            store = scratch_of(folder, shard)
            found = answer(part, models, engine, recipe, stage, bar.advance, store)
            return collect(part, tuple(models), found, settings.keep_unfinished)

        return run_shards(
            folder, triples, settings.shard_size, work, lambda n: bar.skip(n * len(models))
        )


def answer(
    part: Sequence[Triple],
    models: Mapping[str, str],
    engine: Callable[[str], Engine],
    recipe: Recipe,
    stage: str,
    advance: Advance,
    store: Path | None = None,
) -> dict[tuple[str, str], Completion]:
    """(triple id, response name) → the answer of its model in its context.

    Args:
        part: queries with principles.
        models: response name → model; the responses of one model are decoded together.
        engine: the engine of a model.
        recipe: sampling settings and seed.
        stage: part of the seed.
        advance: told (answers, new tokens) as they finish.
        store: folder that keeps the answers as they come.
    """
    s = recipe.sampling
    params = SamplingParams(s.temperature, s.top_p, s.max_new_tokens)
    found: dict[tuple[str, str], Completion] = {}
    for source in dict.fromkeys(models.values()):
        names = [n for n, m in models.items() if m == source]
        asked = [
            Request(
                f"{t.id}/{n}",
                tuple(context_messages(t.messages, t.principles, n)),
                derive_seed(recipe.seed, stage, t.id, n, 0),
            )
            for n in names
            for t in part
        ]
        kept = store / f"{'+'.join(names)}.jsonl" if store else None
        said = answers(engine(source), asked, params, store=kept, advance=advance)
        found |= {(t.id, n): said[f"{t.id}/{n}"] for n in names for t in part}
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
        said = {n: found[triple.id, n] for n in names}
        missing = next((c.missing for c in said.values() if c.missing), None)
        if missing:
            dropped[missing] += 1
            continue
        if not keep_unfinished and any(c.finish_reason == "length" for c in said.values()):
            dropped["unfinished"] += 1
            continue
        kept.append(
            replace(
                triple,
                responses={n: c.text for n, c in said.items()},
                finish_reasons={n: c.finish_reason for n, c in said.items()},
            )
        )
    return kept, dropped
