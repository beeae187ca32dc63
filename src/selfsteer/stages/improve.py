"""Queries to a better fixed good principle: answers are rated and the principle is rewritten."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from typing_extensions import override

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import batched, write_atomic
from selfsteer.data.records import Message, Principles, Query
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Advance, Engine, Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.base import ScoringJudge
from selfsteer.judges.load import load_judge
from selfsteer.judges.stats import known_interval
from selfsteer.principles.contexts import context_messages
from selfsteer.principles.improve import Path, Rated, improve, read_rewritten, rewrite_prompt
from selfsteer.recipe.sections import (
    Improvement,
    JudgeConfig,
    PrinciplesConfig,
    Sampling,
    WriterConfig,
)
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, by_reason
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import stored_queries
from selfsteer.stages.principles import kept_system
from selfsteer.stages.sample import check_sampler, check_writer, params_of, who_answers
from selfsteer.terminal import progress_bar, warn


@dataclass(frozen=True)
class ImprovePrinciple(Stage):
    """The best principle of a beam search, as a YAML file that a recipe can hold.

    Some queries are set aside. On them the start and the principles of the last beam are compared,
    and the best of these is what is written: the start, where no rewriting helped. What is asked
    is stored as it comes, so that a search which was killed asks for nothing twice.

    Args:
        queries: taken in a seeded order, none of them twice.
        policy: answers; rewrites where there is no writer.
        settings: the start and how to search.
        sampling: how the policy answers.
        judge: rates answers.
    """

    queries: Artifact
    policy: Artifact
    settings: Improvement
    sampling: Sampling
    judge: JudgeConfig

    title = "improved"
    makes = ("improved.yaml",)
    leaves = ("improved.answers.jsonl", "improved.written.jsonl", "judgements")

    @override
    def cost(self, scale: Scale) -> Cost:
        """How many principles are written is not known before."""
        return Cost(unknown=(self.name,))

    @override
    def check(self) -> Iterator[str]:
        yield from check_sampler(self.sampling, [self.policy], self.loading)
        budget = {"improve.max_new_tokens": self.settings.max_new_tokens}
        yield from check_writer(self.settings.writer, self.loading, budget)
        _scorer(self.judge, None)

    @override
    def run(self, run: RunFolder) -> StageResult:
        with Engines(run.path) as engines:
            stream, aside = _taken(self, list(stored_queries(self.queries.path)))
            with progress_bar("improve", len(stream) + 1) as bar:
                search = _Search(self, run, engines, lambda n, tokens: bar.advance(0, tokens))
                paths = improve(
                    self.settings.good,
                    stream,
                    rate=search.rate,
                    rewrite=search.rewrite,
                    beam=self.settings.beam,
                    good_enough=self.settings.good_enough,
                    done=lambda: bar.advance(1),
                )
                ends = [self.settings.good, *(p.texts[-1] for p in paths)]
                notes = search.compare(aside, list(dict.fromkeys(ends)))
                bar.advance(1)
        path = next((p for p in paths if p.texts[-1] == notes["best"]), Path(()))
        notes["path"] = [
            {"rating": r, "good": t} for t, r in zip(path.texts, path.ratings, strict=True)
        ]
        fixed = {"mode": "fixed", "good": notes["best"], "bad": self.settings.bad}
        held = {name: text for name, text in fixed.items() if text is not None}
        text = yaml.safe_dump({"principles": held}, sort_keys=False, allow_unicode=True, width=100)
        write_atomic(run / self.outputs[0], text)
        asked = sum(map(len, stream)) + len(aside)
        return StageResult(asked, asked, notes=notes | engines.notes)


def _scorer(settings: JudgeConfig, run: RunFolder | None) -> ScoringJudge:
    """The judge.

    Raises:
        ConfigError: it compares answers and rates none.
    """
    judge = load_judge(settings, run / "judgements" if run else None)
    if not isinstance(judge, ScoringJudge):
        raise ConfigError(
            f"A judge of kind {settings.kind} compares answers and rates none, so it cannot tell "
            "how good a principle is. Give one that scores: oracle, checks, reward or principles."
        )
    return judge


def _taken(
    stage: ImprovePrinciple, queries: list[Query]
) -> tuple[list[Sequence[Query]], list[Query]]:
    """The queries of each step, and those set aside.

    Raises:
        DataError: nothing is left for a first step.
    """
    s = stage.settings
    random.Random(derive_seed(stage.seed, "improve")).shuffle(queries)
    aside, rest = queries[: s.confirm], queries[s.confirm :]
    whole = len(rest) // s.queries_per_step
    if not whole:
        raise DataError(
            f"{len(queries):,} queries are too few: {s.confirm:,} are set aside (improve.confirm) "
            f"and each step takes {s.queries_per_step:,} (improve.queries_per_step). Give more "
            "queries, or lower one of these."
        )
    if whole < s.steps:
        warn(f"{len(queries):,} queries are enough for {whole:,} of {s.steps:,} steps")
    size = min(whole, s.steps) * s.queries_per_step
    return list(batched(rest[:size], s.queries_per_step)), aside


class _Search:
    """What a search asks of the policy, the writer and the judge; counts what was of no use."""

    def __init__(
        self, stage: ImprovePrinciple, run: RunFolder, engines: Engines, advance: Advance
    ) -> None:
        self.stage, self.engines, self.advance = stage, engines, advance
        self.said, self.new = (run / name for name in stage.leaves[:2])
        self.judge = _scorer(stage.judge, run)
        self.system = kept_system(PrinciplesConfig(), str(stage.policy.path), stage.loading)
        self.seed = derive_seed(stage.seed, stage.name)
        self.written, self.unrated = Counter[str](), Counter[str]()
        self.steps = 0

    def rate(self, queries: Sequence[Query], texts: Sequence[str]) -> dict[str, list[Rated]]:
        """Each query's answer under each principle; those without a rating are counted."""
        asked = {f"{digest(t)[:16]}/{q.id}": (t, q) for t in texts for q in queries}
        requests = [
            Request(name, self._prompt(q, t), derive_seed(self.seed, q.id))
            for name, (t, q) in asked.items()
        ]
        engine = self._engine(None)
        said = answers(
            engine, requests, params_of(self.stage.sampling), store=self.said, advance=self.advance
        )
        self.unrated.update(c.missing for c in said.values() if c.missing)
        there = {name: pair for name, pair in asked.items() if not said[name].missing}
        scores = self.judge.score_all(
            [(q, said[name].text) for name, (_, q) in there.items()],
            [said[name].finished for name in there],
        )
        self.unrated.update(["no_score"] * scores.count(None))
        found: dict[str, list[Rated]] = {t: [] for t in texts}
        for (name, (t, q)), score in zip(there.items(), scores, strict=True):
            if score is not None:
                found[t].append(Rated(q, said[name].text, score))
        return found

    def rewrite(self, paths: Sequence[tuple[Path, Rated]]) -> list[list[str]]:
        """New principles for each path; answers that are none are counted by reason."""
        s, tries = self.stage.settings, range(self.stage.settings.tries)
        self.steps += 1
        requests = [
            Request(
                f"{self.steps}/{i}/{k}",
                tuple(rewrite_prompt(path, worst, self.judge.scale)),
                derive_seed(self.seed, "rewrite", self.steps, i, k),
            )
            for i, (path, worst) in enumerate(paths)
            for k in tries
        ]
        params = SamplingParams(s.temperature, s.top_p, s.max_new_tokens)
        said = answers(
            self._engine(s.writer), requests, params, store=self.new, advance=self.advance
        )
        made: list[list[str]] = []
        for i, (path, _) in enumerate(paths):
            made.append([])
            for k in tries:
                answer = said[f"{self.steps}/{i}/{k}"]
                text, why = read_rewritten(
                    answer.text, answer.missing or answer.finish_reason, path
                )
                self.written[why] += 1
                made[i] += [text] if text else []
        return made

    def compare(self, queries: Sequence[Query], texts: Sequence[str]) -> dict[str, Any]:
        """The best of these on queries that the search has not seen; the start is the first.

        A principle with ratings on less than half of the start's queries is left out: compared on
        what it has, it would take most of the others' ratings away.

        Raises:
            DataError: the start has no rating, or no query one under all that are compared.
        """
        found = {
            t: {r.query.id: r.rating for r in own} for t, own in self.rate(queries, texts).items()
        }
        known = found[texts[0]].keys()
        left_out = [t for t in texts if known and 2 * len(found[t].keys() & known) < len(known)]
        if left_out:
            warn(
                f"{len(left_out)} of {len(texts)} principles are left out of the comparison: most "
                f"of their answers could not be rated ({by_reason(self.unrated)})"
            )
        texts = [t for t in texts if t not in left_out]
        found = {t: found[t] for t in texts}
        both = [q.id for q in queries if all(q.id in own for own in found.values())]
        if not both:
            raise DataError(
                f"No answer to the {len(queries):,} queries that were set aside could be rated "
                f"under every principle: {dict(self.unrated)}."
            )
        means = {t: fmean(own[i] for i in both) for t, own in found.items()}
        best, start = max(texts, key=lambda t: means[t]), texts[0]
        gains = [found[best][i] - found[start][i] for i in both]
        rng = np.random.default_rng(derive_seed(self.seed, "intervals"))
        return {
            "scale": self.judge.scale,
            "start": start,
            "best": best,
            "compared": len(both),
            "left_out": left_out,
            "ratings": {"start": means[start], "best": means[best]},
            "gain": known_interval(gains, rng),
            "written": dict(self.written),
            "unrated": dict(self.unrated),
        }

    def _prompt(self, query: Query, good: str) -> tuple[Message, ...]:
        """The query under a principle; no bad one is asked under."""
        principles = Principles(good, self.stage.settings.bad or good, system=self.system)
        return tuple(context_messages(query.messages, principles, "good"))

    def _engine(self, writer: WriterConfig | None) -> Engine:
        s, policy = self.stage.sampling, str(self.stage.policy.path)
        return who_answers(self.engines, s.engine, policy, self.stage.loading, s.batch_size, writer)
