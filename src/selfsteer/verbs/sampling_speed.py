"""`selfsteer bench sampling`: an engine asked directly, and through the pipeline's sample stage.

Both answer the same prompts, interleaved. What the stage adds is its shards (each waits for its
longest answer), the joining of answers to records, and the files.
"""

import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import (
    Advance,
    Completion,
    Engine,
    Request,
    SamplingParams,
    no_news,
)
from selfsteer.engines.load import Engines
from selfsteer.methods import Aligning, Principled
from selfsteer.principles.catalogue import catalogue_of
from selfsteer.principles.contexts import context_messages
from selfsteer.principles.writer import complete_features, picked
from selfsteer.recipe.sections import PrinciplesConfig, resolve_path
from selfsteer.stages.sample import in_contexts, params_of
from selfsteer.terminal import progress_bar

#: What is sampled of each query, as the stage ``samples`` does.
NAMES = ("good", "bad")


class Watched:
    """An engine that counts the tokens of its answers, whoever asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.batch_size = engine, engine.batch_size
        self.tokens = 0

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance = no_news
    ) -> Iterator[Completion]:
        """See `Engine.generate`."""
        for answer in self._engine.generate(requests, sampling, advance):
            self.tokens += answer.completion_tokens
            yield answer


def bench(
    recipe: Aligning, count: int, repeats: int, clock: Callable[[], float] = time.perf_counter
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
    settings = recipe.principles if isinstance(recipe, Principled) else PrinciplesConfig()
    catalogue = catalogue_of(settings)
    triples = []
    for query in load_queries(recipe.queries).queries[:count]:
        rng = random.Random(derive_seed(recipe.seed, "bench", query.id))
        features = complete_features((), settings.features_per_query, rng, catalogue)
        triples.append(Triple(query.id, query.messages, picked(features, catalogue)))
    s, source = recipe.sampling, resolve_path(recipe.policy.model)
    params, asking = params_of(s), in_contexts(dict.fromkeys(NAMES, source), s)
    requests = [
        Request(
            f"{t.id}/{n}",
            tuple(context_messages(t.messages, t.principles, n)),
            derive_seed(recipe.seed, "bench", t.id, n, 0),
            asking.contrast(t, n),
        )
        for n in NAMES
        for t in triples
    ]
    rates = defaultdict[str, list[float]](list)
    with (
        Engines(None) as engines,
        tempfile.TemporaryDirectory(prefix="selfsteer-bench-") as scratch,
    ):
        engine = Watched(engines.sampler(s.engine, source, recipe.policy.loading, s.batch_size))
        answers(engine, requests[:2], params)  # the first words take longer
        ways: dict[str, Callable[[Path], Any]] = {
            "direct": lambda folder: answers(engine, requests, params),
            "pipeline": lambda folder: asking.shards(
                triples, folder, lambda _: engine, s, seed=recipe.seed, label="bench"
            ),
        }
        with progress_bar("bench", 2 * repeats) as bar:
            for number in range(repeats):
                for name in sorted(ways, reverse=number % 2 == 1):
                    before, start = engine.tokens, clock()
                    ways[name](Path(scratch) / str(number))
                    seconds = clock() - start
                    rates[name].append((engine.tokens - before) / seconds)
                    bar.advance(1)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "engine": s.engine.kind,
        "queries": len(triples),
        "answers": len(requests),
        "shard_size": s.shard_size,
        "batch_size": s.batch_size,
        **{name: {"tokens_per_second": r, "median": medians[name]} for name, r in rates.items()},
        "kept": medians["pipeline"] / medians["direct"],
    }
