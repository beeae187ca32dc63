"""Best of n: sample n answers per query, score them, keep the best and the worst as a pair.

Ranking is apart from sampling: `rank` scores answers that exist, `to_preference` makes a pair of
them. The sampled answers are kept beside the pairs. One candidates record::

    {"id": "q1", "messages": [{"role": "user", "content": "What does the bee eat?"}],
     "answers": ["The bee eats nectar.", "Nectar.", "The bee eats bricks."]}

and the preference made of it carries ``"scores": [1.9, 0.4, -2.1]``, one per answer.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records
from selfsteer.data.records import Preference, Query
from selfsteer.data.stored import Stored
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.errors import ConfigError
from selfsteer.judges.base import Scorer
from selfsteer.recipe.sections import Recipe
from selfsteer.run.folder import StageResult, run_shards, scratch_of
from selfsteer.terminal import progress_bar

#: Sums of the same parts in another order differ by this at most.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidates:
    """A query and the answers that compete; equal answers stand once."""

    query: Query
    answers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSONL line."""
        return {**self.query.to_dict(), "answers": list(self.answers)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Candidates":
        """Reads the JSONL form."""
        rest = {k: v for k, v in value.items() if k != "answers"}
        return cls(Query.from_dict(rest), tuple(value["answers"]))


def rank(judge: Scorer, query: Query, answers: Sequence[str]) -> list[float | None]:
    """One score per answer, higher is better; None where the judge has none (too long)."""
    return judge.score_all([(query, answer) for answer in answers])


def rank_all(judge: Scorer, found: Sequence[Candidates]) -> list[list[float | None]]:
    """`rank` of many queries in one go, so that a model's batches are full."""
    scores = iter(judge.score_all([(c.query, a) for c in found for a in c.answers]))
    return [[next(scores) for _ in c.answers] for c in found]


def best_and_worst(
    scores: Sequence[float | None], tie_margin: float = 0.0
) -> tuple[int, int] | None:
    """Places of the highest and the lowest score, the first of equals; None if all are equal.

    Scores that differ by no more than ``tie_margin`` or rounding are equal.

    >>> best_and_worst([0.1, None, 0.9, -2.0, 0.9])
    (2, 3)
    >>> best_and_worst([0.5, 0.5]) is None
    True
    """
    known = [(s, i) for i, s in enumerate(scores) if s is not None]
    if len(known) < 2 or max(known)[0] - min(known)[0] <= max(tie_margin, ROUNDING):
        return None
    best = max(known, key=lambda pair: (pair[0], -pair[1]))
    return best[1], min(known)[1]


def to_preference(
    found: Candidates, scores: Sequence[float | None], tie_margin: float = 0.0
) -> Preference | str:
    """Best over worst, all scores beside them; or why there is no pair.

    Returns:
        The preference, or ``no_score`` (fewer than two answers have one) or ``all_equal``.
    """
    places = best_and_worst(scores, tie_margin)
    if places is None:
        return "all_equal" if sum(s is not None for s in scores) > 1 else "no_score"
    chosen, rejected = (found.answers[i] for i in places)
    extra = {**found.query.extra, "scores": list(scores)}
    return Preference(found.query.id, found.query.messages, chosen, rejected, extra=extra)


def best_of_n(
    queries: Records[Query],
    n: int,
    recipe: Recipe,
    source: str,
    judge: Callable[[], Scorer],
    folder: Path,
    stage: str,
    home: Path,
    tie_margin: float = 0.0,
) -> StageResult:
    """Samples n answers per query and writes shards of preferences, best over worst.

    The answers come first, into ``folder``/candidates, so that the sampling model has left memory
    when the judge's is loaded. Both halves go on behind their last finished shard.

    Args:
        queries: in a fixed order.
        n: answers per query, 2 or more.
        recipe: sampling settings and seed.
        source: the model that answers.
        judge: makes who scores; called once all answers are there.
        folder: where the shards of preferences go.
        stage: the stage's name, part of every seed.
        home: the run folder, for counts and logs of engines.
        tie_margin: scores that differ by no more are equal.

    Returns:
        Counts; dropped are ``too_few_answers`` (fewer than two different answers that ended by
        themselves), ``prompt_too_long`` and ``request_failed:REASON`` where that is for want of
        answers, ``no_score`` and ``all_equal``.

    Raises:
        ConfigError: n answers would be the same answer.
    """
    if n < 2 or recipe.sampling.temperature == 0:
        raise ConfigError(
            f"Best of n needs n answers that differ; with n {n} and sampling.temperature "
            f"{recipe.sampling.temperature:g} there is only one. Raise them."
        )
    label = stage.rpartition("/")[2]
    with Engines(home) as engines:
        sampled = _sample(queries, n, recipe, source, folder / "candidates", stage, engines)
    found = Stored(folder / "candidates", Candidates.from_dict)
    if not len(found):
        return StageResult(len(queries), 0, sampled.dropped, notes=sampled.notes)
    scoring = judge()

    with progress_bar(f"{label}: ranking", len(found)) as bar:

        def work(shard: int, part: Sequence[Candidates]) -> tuple[list[Preference], Counter[str]]:
            scores = rank_all(scoring, part)
            made = [to_preference(c, s, tie_margin) for c, s in zip(part, scores, strict=True)]
            bar.advance(len(part))
            kept = [p for p in made if isinstance(p, Preference)]
            return kept, Counter(p for p in made if isinstance(p, str))

        ranked = run_shards(folder, found, recipe.sampling.shard_size, work, bar.skip)
    notes = {**sampled.notes, "answers": sum(len(c.answers) for c in found)}
    return StageResult(len(queries), ranked.n_out, sampled.dropped + ranked.dropped, notes=notes)


def _sample(
    queries: Records[Query],
    n: int,
    recipe: Recipe,
    source: str,
    folder: Path,
    stage: str,
    engines: Engines,
) -> StageResult:
    """Shards of candidates; the n answers of a query are decoded together."""
    s = recipe.sampling
    params = SamplingParams(s.temperature, s.top_p, s.max_new_tokens)
    with progress_bar(stage.rpartition("/")[2], len(queries) * n) as bar:

        def work(shard: int, part: Sequence[Query]) -> tuple[list[Candidates], Counter[str]]:
            engine = engines.sampler(s.engine, source, recipe.policy, s.batch_size)
            asked = [
                Request(
                    f"{q.id}/{i}",
                    q.messages,
                    derive_seed(recipe.seed, stage, q.id, "candidates", i),
                )
                for q in part
                for i in range(n)
            ]
            store = scratch_of(folder, shard) / "candidates.jsonl"
            said = answers(engine, asked, params, store=store, advance=bar.advance)
            kept, dropped = [], Counter[str]()
            for query in part:
                mine = [said[f"{query.id}/{i}"] for i in range(n)]
                texts = dict.fromkeys(c.text for c in mine if c.finish_reason == "stop")
                if len(texts) > 1:
                    kept.append(Candidates(query, tuple(texts)))
                else:
                    missing = next((c.missing for c in mine if c.missing), None)
                    dropped[missing or "too_few_answers"] += 1
            return kept, dropped

        done = run_shards(folder, queries, s.shard_size, work, lambda m: bar.skip(m * n))
    done.notes |= engines.notes
    return done
