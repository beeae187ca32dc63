"""Quality of each preference set, and what the models answer to held-out queries."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, at, dump_lines, read_jsonl, write_atomic
from selfsteer.data.records import Preference, Query, Triple, Verdict
from selfsteer.engines.answers import answers as ask
from selfsteer.engines.base import Completion, Engine, Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.judges.base import Judge, Pair, ScoringJudge, accuracy, load_judge, verdict_counts
from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES, quality
from selfsteer.judges.stats import mean_interval
from selfsteer.models.load import load_model
from selfsteer.models.store import scored
from selfsteer.principles import writer
from selfsteer.principles.contexts import CONTEXTS, context_messages
from selfsteer.recipe.sections import Evaluation, Recipe
from selfsteer.run.folder import StageResult
from selfsteer.terminal import progress_bar

#: Pairs measured; a seeded subset of larger sets, whose figures it gives to about one percent.
QUALITY_PAIRS = 4000

#: What is kept of an answer beside its text.
COUNTS = ("finish_reason", "prompt_tokens", "completion_tokens")


def measure_quality(
    preferences: Records[Preference],
    principled: Records[Triple],
    recipe: Recipe,
    policy: str,
    output: Path,
    run: Path,
    stage: str,
    triples: Records[Triple] = (),
) -> StageResult:
    """Writes ``quality.json``: figures of the preferences and, where given, of the triples.

    Args:
        preferences: the set that the policy is trained on.
        principled: records of the same ids with principles, for the steering gap; none where
            the method has no principles.
        recipe: names the judge.
        policy: the policy at the start of the iteration; scores everything.
        output: the JSON file.
        run: the run folder, with the shared log-probs and the judge's answers.
        stage: the stage's name, part of the seed.
        triples: the policy's own triples, measured beside, plain responses included.
    """
    rng = np.random.default_rng(derive_seed(recipe.seed, stage))
    pairs = {p.id: p.to_triple() for p in at(preferences, _places(len(preferences), rng))}
    for t in principled:
        if t.id in pairs:
            pairs[t.id] = replace(pairs[t.id], principles=t.principles)
    own = list(at(triples, _places(len(triples), rng)))
    loaded = load_model(policy, recipe.policy)
    measured = []
    for name, size, chosen, sequences in (
        (
            "preferences",
            len(preferences),
            list(pairs.values()),
            (*PLAIN_SEQUENCES, *(GAP_SEQUENCES if principled else ())),
        ),
        ("triples", len(triples), own, (*PLAIN_SEQUENCES, "plain/plain", *GAP_SEQUENCES)),
    ):
        if not chosen:
            continue
        flat = [loaded.chat.sequence(t, s) for s in sequences for t in chosen]
        values = scored(run / "scores", loaded, flat, f"quality: scoring {name}")
        grid = np.array([float(v.double().sum()) for v in values]).reshape(len(sequences), -1)
        tokens = np.array([len(v) for v in values]).reshape(len(sequences), -1)
        sums, lengths = (dict(zip(sequences, x, strict=True)) for x in (grid, tokens))
        measured.append((name, size, chosen, sums, lengths))
    del loaded  # the judge's model may need the room
    judge = load_judge(recipe.judge, run / "judgements")
    report: dict[str, Any] = {
        "scored_under": "policy at the start of the iteration",
        "judge": judge.name if judge else None,
    }
    for name, size, chosen, sums, lengths in measured:
        report[name] = {"of": size, **quality(chosen, sums, lengths, judge)}
    write_atomic(output, json.dumps(report, indent=1, allow_nan=False) + "\n")
    return StageResult(len(preferences), len(preferences))


def _places(count: int, rng: np.random.Generator) -> Iterable[int]:
    """Of the records that are measured."""
    if count <= QUALITY_PAIRS:
        return range(count)
    chosen: list[int] = np.sort(rng.choice(count, QUALITY_PAIRS, replace=False)).tolist()
    return chosen


def evaluate(
    queries: Sequence[Query],
    models: dict[str, str],
    finals: dict[str, str],
    exhibit: dict[str, str],
    recipe: Recipe,
    run: Path,
) -> StageResult:
    """Writes ``evaluation.json`` and each model's answers under ``evaluation/``.

    A query that one of the models did not answer (its prompt is too long, or a request failed) has
    no answer to judge: it is dropped.

    Args:
        queries: held out from everything above.
        models: label → model folder; ``base`` first, then ``METHOD/iteration-K``.
        finals: method → the label of its last policy.
        exhibit: the last generator and the policy it was trained from, shown side by side in
            ``exhibit.json``; may be empty.
        recipe: judge, sampling, intervals.
        run: the run folder.
    """
    settings = recipe.evaluation
    assert settings is not None
    judge = load_judge(recipe.judge, run / "judgements")
    params = SamplingParams(
        recipe.sampling.temperature if settings.temperature is None else settings.temperature,
        recipe.sampling.top_p,
        recipe.sampling.max_new_tokens,
    )
    answers: dict[str, list[Completion]] = {}
    notes: dict[str, Any] = {}
    # the same seeds for every model: what differs is the model
    asked = [
        Request(q.id, q.messages, derive_seed(recipe.seed, "evaluation", q.id)) for q in queries
    ]
    with progress_bar("evaluation", len(models) * len(queries)) as bar:
        for label, source in models.items():
            path = run / "evaluation" / f"answers-{label.replace('/', '-')}.jsonl"
            store = path.with_suffix(".partial")
            if not path.exists():  # an earlier try at this very stage may have come this far
                with Engines(run) as engines:
                    # without a name, so that one model leaves memory before the next comes
                    found = ask(
                        _sampler(engines, recipe, source),
                        asked,
                        params,
                        store=store,
                        advance=bar.advance,
                    )
                if engines.asked:
                    notes.setdefault("asked", {})[label] = engines.asked
                lines = [
                    {**q.to_dict(), "response": c.text, **_counts(c)}
                    for q, c in zip(queries, found.values(), strict=True)
                ]
                write_atomic(path, dump_lines(lines))
                store.unlink(missing_ok=True)
            answers[label] = [
                Completion(v["id"], v["response"], **{k: v[k] for k in COUNTS})
                for _, v in read_jsonl(path)
            ]
    lost = {i: c.missing for found in answers.values() for i, c in enumerate(found) if c.missing}
    dropped = Counter(lost.values())
    result = StageResult(len(queries), len(queries) - len(lost), dropped, notes=notes)
    if not result.n_out:
        return result
    kept = [i not in lost for i in range(len(queries))]
    queries = list(compress(queries, kept))
    answers = {label: list(compress(found, kept)) for label, found in answers.items()}
    report: dict[str, Any] = {
        "queries": len(queries),
        "judge": judge.name if judge else None,
        "score_scale": judge.scale if isinstance(judge, ScoringJudge) else None,
        "finals": finals,
    }
    report["models"] = {
        label: _figures(queries, found, answers["base"], judge, settings, recipe.seed)
        for label, found in answers.items()
    }
    if isinstance(judge, ScoringJudge) and len(finals) == 2:
        difference = _difference(queries, answers, finals, judge, settings, recipe.seed)
        if difference:
            report["difference"] = difference
    write_atomic(run / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    if exhibit:
        shown = _exhibit(queries[0], exhibit, recipe, run)
        text = json.dumps(shown, indent=1, ensure_ascii=False) + "\n"
        write_atomic(run / "evaluation" / "exhibit.json", text)
    return result


def _sampler(engines: Engines, recipe: Recipe, source: str) -> Engine:
    s = recipe.sampling
    return engines.sampler(s.engine, source, recipe.policy, s.batch_size)


def _counts(completion: Completion) -> dict[str, Any]:
    return {name: getattr(completion, name) for name in COUNTS}


def _figures(
    queries: Sequence[Query],
    found: Sequence[Completion],
    base: Sequence[Completion],
    judge: Judge | None,
    settings: Evaluation,
    seed: int,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {
        "tokens": float(np.mean([c.completion_tokens for c in found])),
        "characters": float(np.mean([len(c.text) for c in found])),
        "unfinished": sum(c.finish_reason == "length" for c in found),
    }
    if isinstance(judge, ScoringJudge):
        scores = judge.score_all([(q, c.text) for q, c in zip(queries, found, strict=True)])
        given = [s for s in scores if s is not None]
        out["unscored"] = len(scores) - len(given)
        if given:
            out["score"] = mean_interval(given, rng, settings.bootstrap)
    if judge is not None and found is not base:
        pairs = [
            Pair(q, mine.text, theirs.text)
            for q, mine, theirs in zip(queries, found, base, strict=True)
        ]
        verdicts = [j.verdict for j in judge.compare_all(pairs)]
        out["verdicts"] = verdict_counts(verdicts)
        judged = [v for v in verdicts if v is not Verdict.UNPARSEABLE]
        if judged:
            wins = [accuracy([v]) or 0.0 for v in judged]
            out["win_rate"] = mean_interval(wins, rng, settings.bootstrap)
    return out


def _difference(
    queries: Sequence[Query],
    answers: dict[str, list[Completion]],
    finals: dict[str, str],
    judge: ScoringJudge,
    settings: Evaluation,
    seed: int,
) -> dict[str, Any] | None:
    """Score of the first method minus the second, paired by query; None without such pairs."""
    (mine, mine_label), (theirs, their_label) = finals.items()
    both = [
        judge.score_all([(q, c.text) for q, c in zip(queries, answers[label], strict=True)])
        for label in (mine_label, their_label)
    ]
    gaps = [a - b for a, b in zip(*both, strict=True) if a is not None and b is not None]
    if not gaps:
        return None
    interval = mean_interval(gaps, np.random.default_rng(seed), settings.bootstrap)
    return {"of": f"{mine} - {theirs}", "score": interval}


def _exhibit(query: Query, models: dict[str, str], recipe: Recipe, run: Path) -> dict[str, Any]:
    """One query, three contexts, policy and generator: what steering looks like."""
    s = recipe.sampling
    params = SamplingParams(s.temperature, s.top_p, s.max_new_tokens)
    principles = writer.specimen(recipe.principles)
    asked = [
        Request(
            c,
            tuple(context_messages(query.messages, principles, c)),
            derive_seed(recipe.seed, "exhibit", query.id, c),
        )
        for c in CONTEXTS
    ]
    responses = {}
    for name, source in models.items():
        with Engines(run) as engines:
            found = ask(_sampler(engines, recipe, source), asked, params)
        responses[name] = {c: answer.text for c, answer in found.items()}
    return {"query": query.text, "principles": principles.to_dict(), "responses": responses}
