"""Queries to principles: features chosen per query, p+ and p- picked or generated."""

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsteer.config import Recipe, resolve_path
from selfsteer.engines.base import PROMPT_TOO_LONG, Completion, SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.models.loading import load_model
from selfsteer.principles import writer
from selfsteer.records import Query, Triple, dump_lines
from selfsteer.runs import StageResult, derive_seed, read_shards, run_shards, write_atomic
from selfsteer.terminal import progress_bar, say


def write_principles(
    queries: Sequence[Query], recipe: Recipe, policy: str, folder: Path, stage: str
) -> StageResult:
    """Writes ``principles.jsonl``: one triple without responses per query.

    Each line says where its principles come from: ``source`` is ``picked``, ``generated``, or
    ``fallback:REASON`` where the writer's answer could not be used.
    """
    seed = derive_seed(recipe.seed, stage)
    engines = _engines(recipe, policy)
    outcomes: Counter[str] = Counter()
    features_by_model = 0

    with progress_bar("principles", len(queries)) as bar:

        def work(shard: int, part: Sequence[Query]) -> tuple[list[Triple], Counter[str]]:
            shard_seed = derive_seed(seed, shard)
            chosen = _choose(part, recipe, engines.get("policy"), shard_seed)
            written = _write(part, chosen, recipe, engines.get("writer"), shard_seed)
            bar.advance(len(part))
            return written, Counter()

        result = run_shards(
            folder / "principles", queries, recipe.sampling.shard_size, work, bar.advance
        )
    lines = [Triple.from_dict(v) for v in read_shards(folder / "principles")]
    for triple in lines:
        outcomes[triple.extra["source"]] += 1
        features_by_model += triple.extra["features_by_model"]
    write_atomic(folder / "principles.jsonl", dump_lines(lines))
    shutil.rmtree(folder / "principles")
    result.notes = {
        "sources": dict(sorted(outcomes.items())),
        "features_named_by_model": features_by_model,
        "features_filled_at_random": sum(
            len(t.principles.features) - t.extra["features_by_model"]
            for t in lines
            if t.principles is not None
        ),
    }
    failed = sum(n for source, n in outcomes.items() if source.startswith("fallback"))
    if failed:
        say(
            f"  {failed:,} of {len(lines):,} written principles could not be used "
            "and fell back to the built-in text"
        )
    return result


def _engines(recipe: Recipe, policy: str) -> dict[str, TransformersEngine]:
    settings, size = recipe.principles, recipe.sampling.batch_size
    engines = {}
    own_writer = settings.mode == "generated" and settings.writer is not None
    if settings.features == "model" or (settings.mode == "generated" and not own_writer):
        engines["policy"] = TransformersEngine(
            load_model(policy, recipe.policy, inference=True), size
        )
        engines["writer"] = engines["policy"]
    if own_writer:
        source = resolve_path(str(settings.writer))
        engines["writer"] = TransformersEngine(
            load_model(source, recipe.policy, inference=True), size
        )
    return engines


def _params(recipe: Recipe) -> SamplingParams:
    p = recipe.principles
    return SamplingParams(p.temperature, p.top_p, p.max_new_tokens)


def _choose(
    part: Sequence[Query], recipe: Recipe, engine: TransformersEngine | None, seed: int
) -> list[tuple[tuple[str, ...], int]]:
    """Per query: its features, and how many of them the model named."""
    settings = recipe.principles
    count = settings.features_per_query
    answers = [""] * len(part)
    if settings.features == "model":
        assert engine is not None
        prompts = [writer.feature_prompt(q, count) for q in part]
        found = engine.generate(prompts, _params(recipe), derive_seed(seed, "features"))
        answers = [c.text for c in found]
    chosen = []
    for query, answer in zip(part, answers, strict=True):
        named = writer.parse_features(answer)[:count]
        rng = random.Random(derive_seed(seed, query.id))
        chosen.append((writer.complete_features(named, count, settings.concision, rng), len(named)))
    return chosen


def _write(
    part: Sequence[Query],
    chosen: Sequence[tuple[tuple[str, ...], int]],
    recipe: Recipe,
    engine: TransformersEngine | None,
    seed: int,
) -> list[Triple]:
    answers: list[Completion | None] = [None] * len(part)
    if recipe.principles.mode == "generated":
        assert engine is not None
        prompts = [writer.principle_prompt(q, f) for q, (f, _) in zip(part, chosen, strict=True)]
        found = engine.generate(prompts, _params(recipe), derive_seed(seed, "principles"))
        answers = list(found)
    triples = []
    for query, (features, named), answer in zip(part, chosen, answers, strict=True):
        principles, source = writer.picked(features), "picked"
        if answer is not None:
            outcome, good, bad = writer.parse_principles(answer.text)
            if answer.finish_reason == PROMPT_TOO_LONG:
                source = f"fallback:{PROMPT_TOO_LONG}"
            elif outcome is writer.Outcome.OK:
                principles, source = writer.written(features, good, bad), "generated"
            else:
                source = f"fallback:{outcome.value}"
        extra: dict[str, Any] = {"source": source, "features_by_model": named}
        triples.append(Triple(query.id, query.messages, principles, extra=extra))
    return triples
