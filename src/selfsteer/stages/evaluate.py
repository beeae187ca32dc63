"""What the models answer to held-out queries, and what the judge says of it."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from operator import sub
from typing import Any

import numpy as np
from typing_extensions import override

from selfsteer.data.curate import likeness
from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import dump_lines, read_jsonl, write_atomic
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Dropped, Query
from selfsteer.engines.answers import answers as ask
from selfsteer.engines.base import Completion, Request
from selfsteer.engines.load import Engines
from selfsteer.judges.base import Judge, Pair, ScoringJudge
from selfsteer.judges.checks import ChecksJudge
from selfsteer.judges.load import load_judge
from selfsteer.judges.stats import Interval, known_interval, verdict_counts, worth
from selfsteer.principles import writer
from selfsteer.principles.contexts import CONTEXTS, context_messages
from selfsteer.recipe.sections import Evaluation, JudgeConfig, PrinciplesConfig, Sampling
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage
from selfsteer.run.sums import REMOVED
from selfsteer.stages.inputs import stored_queries
from selfsteer.stages.principles import kept_system
from selfsteer.stages.queries import reading_notes
from selfsteer.stages.sample import check_sampler, params_of
from selfsteer.terminal import progress_bar, say, warn

#: What is kept of an answer beside its text.
COUNTS = ("finish_reason", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Exhibit:
    """What steering looks like: one query under all contexts, before and after the generator.

    Args:
        models: name → model; the policy and the generator trained from it.
        principles: whose specimen is shown.
    """

    models: Mapping[str, Artifact]
    principles: PrinciplesConfig


@dataclass(frozen=True)
class Evaluate(Stage):
    """Base, baseline and policies answer held-out queries; the judge compares them with the base.

    Writes ``evaluation.json`` and each model's answers under ``evaluation/``. A query that one of
    the models did not answer (its prompt is too long, or a request failed) has no answer to judge:
    it is dropped.

    Args:
        queries: those of the run, which the held-out ones should not be among.
        models: label → model; ``base`` first, then ``METHOD/iteration-K``.
        finals: method → the label of its last policy.
        settings: held-out queries, intervals.
        sampling: how the models answer.
        judge: who compares; None: no judge.
        exhibit: shown in ``exhibit.json``; may be None.
    """

    queries: Artifact
    models: Mapping[str, Artifact]
    finals: Mapping[str, str]
    settings: Evaluation
    sampling: Sampling
    judge: JudgeConfig | None
    exhibit: Exhibit | None = field(default=None, metadata={"costs_only": True})

    title = "evaluation"
    makes = ("evaluation.json", "evaluation")

    @override
    def records(self, scale: Scale) -> int:
        return scale.held_out

    @override
    def cost(self, scale: Scale) -> Cost:
        n, models = scale.held_out, len(self.models)
        judged = (models - 1) * n if self.judge else 0
        return Cost(n, answers=Counter(plain=models * n), judged=judged)

    @override
    def check(self) -> Iterator[str]:
        yield from check_sampler(self.sampling, self.models.values(), self.loading)
        if judge := load_judge(self.judge):
            judge.check(())

    @override
    def run(self, run: RunFolder) -> StageResult:
        found = load_queries(self.settings.queries)
        self._check_held_out(found.queries)
        notes: dict[str, Any] = reading_notes(found)
        said = {
            label: self._answers(run, label, model, found.queries, notes)
            for label, model in self.models.items()
        }
        rows = zip(*said.values(), strict=True)
        lost = [next((c.missing for c in row if c.missing), None) for row in rows]
        missed = [Dropped(q.id, why, q) for q, why in zip(found.queries, lost, strict=True) if why]
        kept = [why is None for why in lost]
        queries = list(compress(found.queries, kept))
        if queries:
            said = {label: list(compress(c, kept)) for label, c in said.items()}
            report = self._report(queries, said, load_judge(self.judge, run / "judgements"))
            text = json.dumps(report, indent=1, allow_nan=False) + "\n"
            write_atomic(run / "evaluation.json", text)
        if queries and self.exhibit and self._can_show(self.exhibit):
            example = report.get("example", {"id": queries[0].id})
            query = next(q for q in queries if q.id == example["id"])
            shown = self._show(query, self.exhibit, run)
            text = json.dumps(shown, indent=1, ensure_ascii=False) + "\n"
            write_atomic(run / "evaluation" / "exhibit.json", text)
        dropped = run.drop(self.name, [*found.left_out, *missed])
        n_in = len(found.queries) + len(found.left_out)
        return StageResult(n_in, len(queries), dropped, notes=notes)

    def _check_held_out(self, queries: Sequence[Query]) -> None:
        held_out = [likeness(q) for q in queries]
        seen = set(held_out).intersection(map(likeness, stored_queries(self.queries.path)))
        shared = sum(key in seen for key in held_out)
        if shared:
            warn(
                f"{shared} of {len(queries)} evaluation queries are also alignment queries: the "
                "evaluation is not held out"
            )

    def _answers(
        self,
        run: RunFolder,
        label: str,
        model: Artifact,
        queries: Sequence[Query],
        notes: dict[str, Any],
    ) -> list[Completion]:
        """A model's answers; those of an earlier try at this very stage are read again."""
        s, given = self.sampling, self.settings.temperature
        params = replace(params_of(s), temperature=s.temperature if given is None else given)
        path = run / "evaluation" / f"answers-{label.replace('/', '-')}.jsonl"
        store = path.with_suffix(".partial.jsonl")
        if not path.exists():
            # the same seeds for every model: what differs is the model
            seed = derive_seed(self.seed, "evaluation")
            asked = [Request(q.id, q.messages, derive_seed(seed, q.id)) for q in queries]
            with (
                Engines(run.path) as engines,
                progress_bar(label, len(queries), params.max_new_tokens) as bar,
            ):
                # without a name, so that one model leaves memory before the next comes
                found = ask(
                    engines.sampler(s.engine, str(model.path), self.loading, s.batch_size),
                    asked,
                    params,
                    store=store,
                    advance=bar.advance,
                )
            if engines.asked:
                notes.setdefault("asked", {})[label] = engines.asked
            lines = [
                {
                    **q.to_dict(),
                    "response": found[q.id].text,
                    **{name: getattr(found[q.id], name) for name in COUNTS},
                    **{
                        name: value
                        for name in ("reasoning", "missing")
                        if (value := getattr(found[q.id], name))
                    },
                }
                for q in queries
            ]
            write_atomic(path, dump_lines(lines))
        store.unlink(missing_ok=True)
        return [
            Completion(
                v["id"],
                v["response"],
                **{k: v[k] for k in COUNTS},
                reasoning=v.get("reasoning", ""),
            )
            for _, v in read_jsonl(path)
        ]

    def _report(
        self, queries: Sequence[Query], said: Mapping[str, list[Completion]], judge: Judge | None
    ) -> dict[str, Any]:
        scores: dict[str, list[float | None]] = {}
        if isinstance(judge, ScoringJudge):
            scores = {
                label: judge.score_all(
                    [(q, c.text) for q, c in zip(queries, found, strict=True)],
                    [c.finished for c in found],
                )
                for label, found in said.items()
            }
        report: dict[str, Any] = {
            "queries": len(queries),
            "judge": judge.name if judge else None,
            "score_scale": judge.scale if isinstance(judge, ScoringJudge) else None,
            "finals": dict(self.finals),
            "models": {
                label: self._figures(queries, found, said["base"], judge, scores.get(label))
                for label, found in said.items()
            },
        }
        if scores:
            report["differences"] = list(self._differences(scores))
            if example := self._clearest(queries, said, scores):
                report["example"] = example
        if isinstance(judge, ChecksJudge):
            report["rules"] = self._rules(judge, queries, said)
        return report

    def _rules(
        self, judge: ChecksJudge, queries: Sequence[Query], said: Mapping[str, list[Completion]]
    ) -> dict[str, Any]:
        """The share of each model's answers that keep a rule, and what it gained on the base."""
        texts = {label: [c.text for c in found] for label, found in said.items()}
        rng, out = np.random.default_rng(self.seed), {}
        for rule, kept in judge.by_rule(queries, texts).items():
            base = kept["base"]
            out[rule] = {
                "queries": len(base),
                "kept": {label: float(np.mean(own)) for label, own in kept.items()},
                "gained": {
                    label: self._interval(map(sub, own, base), rng)
                    for label, own in kept.items()
                    if own is not base
                },
            }
        return out

    def _clearest(
        self,
        queries: Sequence[Query],
        said: Mapping[str, list[Completion]],
        scores: Mapping[str, list[float | None]],
    ) -> dict[str, Any] | None:
        """The query whose score rose most from the base to the method's last policy.

        Of several, the one with the shortest answers; None if no score rose.
        """
        last = next(iter(self.finals.values()))
        found = []
        for i, (before, after) in enumerate(zip(scores["base"], scores[last], strict=True)):
            if before is not None and after is not None and after > before:
                length = len(said["base"][i].text) + len(said[last][i].text)
                found.append((before - after, length, i))
        if not found:
            return None
        _, _, i = min(found)
        query = queries[i]
        return {
            "id": query.id,
            "query": query.text,
            "answers": {label: said[label][i].text for label in ("base", last)},
            "scores": {label: scores[label][i] for label in ("base", last)},
        }

    def _differences(self, scores: Mapping[str, list[float | None]]) -> Iterator[dict[str, Any]]:
        """The method's last policy less each baseline's."""
        (own, mine), *others = self.finals.items()
        for method, theirs in others:
            both = zip(scores[mine], scores[theirs], strict=True)
            gaps = [None if a is None or b is None else a - b for a, b in both]
            if interval := self._interval(gaps, np.random.default_rng(self.seed)):
                yield {"of": f"{own} - {method}", "score": interval}

    def _figures(
        self,
        queries: Sequence[Query],
        found: Sequence[Completion],
        base: Sequence[Completion],
        judge: Judge | None,
        scores: Sequence[float | None] | None,
    ) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        out: dict[str, Any] = {
            "tokens": float(np.mean([c.completion_tokens for c in found])),
            "characters": float(np.mean([len(c.text) for c in found])),
            "unfinished": sum(c.finish_reason == "length" for c in found),
        }
        if scores is not None:
            out["unscored"] = scores.count(None)
            out["score"] = self._interval(scores, rng)
        if judge is not None and found is not base:
            pairs = [
                Pair(q, mine.text, theirs.text, (mine.finished, theirs.finished))
                for q, mine, theirs in zip(queries, found, base, strict=True)
            ]
            verdicts = [j.verdict for j in judge.compare_all(pairs)]
            out["verdicts"] = verdict_counts(verdicts)
            out["win_rate"] = self._interval(map(worth, verdicts), rng)
        return {name: figure for name, figure in out.items() if figure is not None}

    def _interval(
        self, values: Iterable[float | None], rng: np.random.Generator
    ) -> Interval | None:
        return known_interval(values, rng, self.settings.bootstrap)

    def _can_show(self, exhibit: Exhibit) -> bool:
        """Whether its models still have weights; none is trained again for an exhibit."""
        gone = [name for name, m in exhibit.models.items() if (m.path / REMOVED).exists()]
        if gone:
            say(f"  no exhibit: the weights of the {gone[0]} were removed (keep.{gone[0]})")
        return not gone

    def _show(self, query: Query, exhibit: Exhibit, run: RunFolder) -> dict[str, Any]:
        s, seed = self.sampling, derive_seed(self.seed, "exhibit")
        policy = str(next(iter(exhibit.models.values())).path)
        system = kept_system(exhibit.principles, policy, self.loading)
        principles = replace(writer.specimen(exhibit.principles), system=system)
        asked = [
            Request(c, tuple(context_messages(query.messages, principles, c)), derive_seed(seed, c))
            for c in CONTEXTS
        ]
        responses = {}
        for name, model in exhibit.models.items():
            with Engines(run.path) as engines:
                found = ask(
                    engines.sampler(s.engine, str(model.path), self.loading, s.batch_size),
                    asked,
                    params_of(s),
                )
            responses[name] = {c: found[c].text for c in CONTEXTS}
        return {"query": query.text, "principles": principles.to_dict(), "responses": responses}
