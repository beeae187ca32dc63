"""`selfsteer bench sampling`: an engine asked directly, and through the pipeline's sample stage.

Both answer the same prompts with the same seeds, interleaved. What the stage adds is its shards
(each waits for its longest answer), the joining of answers to records, and the files.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Triple
from selfsteer.engines.base import Completion, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.engines.shards import Ask, ShardEngine, Work, at_once
from selfsteer.principles.catalogue import catalogue_of
from selfsteer.principles.contexts import context_messages
from selfsteer.principles.writer import complete_features, picked
from selfsteer.recipe.sections import Recipe, resolve_path
from selfsteer.stages.sample import sample
from selfsteer.terminal import progress_bar

#: What is sampled of each query, as the stage ``samples`` does.
NAMES = ("good", "bad")


class Watched:
    """An engine that counts what it said, whoever asks."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.tokens = 0

    def generate(self, *args: Any, **options: Any) -> Any:
        """See `Engine.generate`."""
        found = self._engine.generate(*args, **options)
        self.tokens += sum(c.completion_tokens for c in found)
        return found


class WatchedShards(Watched):
    """One that answers many shards at once."""

    def generate_shards(self, asks: Sequence[Ask]) -> Iterator[tuple[int, list[Completion]]]:
        """See `ShardEngine.generate_shards`."""
        for place, found in self._engine.generate_shards(asks):
            self.tokens += sum(c.completion_tokens for c in found)
            yield place, found


def bench(
    recipe: Recipe, count: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Tokens per second both ways, the model loaded or the server started beforehand.

    Args:
        recipe: queries, model, engine and sampling.
        count: queries asked, two answers each.
        repeats: of each way; the median counts.
        clock: seconds; on a busy machine those of the process say more of an engine in process.

    Returns:
        ``direct`` and ``pipeline``: tokens per second of every repeat and their ``median``;
        ``kept``: the pipeline's share.
    """
    catalogue = catalogue_of(recipe.principles)
    triples = []
    for query in load_queries(recipe.queries).queries[:count]:
        rng = random.Random(derive_seed(recipe.seed, "bench", query.id))
        features = complete_features((), recipe.principles.features_per_query, rng, catalogue)
        triples.append(Triple(query.id, query.messages, picked(features, catalogue)))
    s, source = recipe.sampling, resolve_path(recipe.policy.model)
    params = SamplingParams(s.temperature, s.top_p, s.max_new_tokens)
    prompts = [context_messages(t.messages, t.principles, n) for n in NAMES for t in triples]
    rates: dict[str, list[float]] = {"direct": [], "pipeline": []}
    with (
        Engines(None) as engines,
        tempfile.TemporaryDirectory(prefix="selfsteer-bench-") as scratch,
    ):
        asked = engines.sampler(recipe, source)
        engine = (WatchedShards if isinstance(asked, ShardEngine) else Watched)(asked)
        engine.generate(prompts[:2], params, 0)  # the first words take longer
        # all at once, unless the engine wants them in parts
        size = 2 * s.shard_size if isinstance(asked, ShardEngine) else len(prompts)

        def direct(number: int) -> None:
            def work(part: int, some: Sequence[Any]) -> Work[None]:
                seed = derive_seed(recipe.seed, "bench", number, part)
                yield Ask(engine, some, params, seed)

            parts = (prompts[i : i + size] for i in range(0, len(prompts), size))
            for _ in at_once(work, enumerate(parts)):
                pass

        def pipeline(number: int) -> None:
            folder = Path(scratch) / str(number)
            sample(triples, recipe, dict.fromkeys(NAMES, source), folder, "bench", lambda _: engine)

        ways: tuple[tuple[str, Callable[[int], None]], ...] = (
            ("direct", direct),
            ("pipeline", pipeline),
        )
        with progress_bar("bench", 2 * repeats) as bar:
            for number in range(repeats):
                for name, way in ways if number % 2 == 0 else ways[::-1]:
                    before, start = engine.tokens, clock()
                    way(number)
                    seconds = clock() - start
                    rates[name].append((engine.tokens - before) / seconds)
                    bar.advance(1)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "engine": s.engine.kind,
        "queries": len(triples),
        "answers": len(prompts),
        "shard_size": s.shard_size,
        "batch_size": s.batch_size,
        **{name: {"tokens_per_second": r, "median": medians[name]} for name, r in rates.items()},
        "kept": medians["pipeline"] / medians["direct"],
    }
