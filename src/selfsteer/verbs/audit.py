"""`selfsteer audit`: base, aligned policy and generator under good and bad principles.

Answers are kept under names made of all that they depend on, so that an audit that was stopped, or
one more model, asks only what is missing.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfsteer.data.digests import derive_seed, digest, model_digest
from selfsteer.data.jsonl import dump_lines, read_jsonl, write_atomic
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Query, Triple
from selfsteer.engines.base import SamplingParams
from selfsteer.errors import ConfigError, DataError
from selfsteer.judges.base import Judge, Pair, ScoringJudge, accuracy, load_judge
from selfsteer.principles.contexts import CONTEXTS, context_messages
from selfsteer.recipe.sections import JudgeConfig, Queries, Recipe, resolve_path
from selfsteer.stages.plan import principle_sources, stored_triples
from selfsteer.terminal import interval, progress_bar
from selfsteer.verbs.auditing import Behaviour, audit

GAPS = {"good": ("good/good", "bad/good"), "bad": ("bad/bad", "good/bad")}


@dataclass(frozen=True)
class Subjects:
    """Who is audited, on what.

    Args:
        models: label → folder or hub id; ``base`` first.
        recipe: how models are loaded, principles written (by the base model) and answers sampled.
        queries: held-out prompts.
        judge: who scores or compares; None measures gaps alone.
        folder: where answers and judgements are kept.
        limit: queries asked, a seeded subset.
        seed: of subset, sampling and intervals.
    """

    models: Mapping[str, str]
    recipe: Recipe
    queries: Queries
    judge: JudgeConfig | None
    folder: Path
    limit: int
    seed: int


def run_audit(s: Subjects) -> dict[str, Any]:
    """Asks every model under every context and compares; also writes ``audit.json``.

    Raises:
        ConfigError: the engine cannot answer with every model.
        DataError: no query is left.
    """
    engine = s.recipe.sampling.engine
    if engine.base_url is not None:
        raise ConfigError(
            f"sampling.engine asks one server that serves {engine.model}, but an audit asks "
            f"{len(s.models)} models. Add --set sampling.engine=transformers, or give "
            "sampling.engine.launch, so that each model is served in its turn."
        )
    judge = load_judge(s.judge, s.folder / "judgements")
    probes, dropped = _probes(s, judge)
    behaviours, lost = {}, set[int]()
    answers = {}
    with progress_bar("audit: answers", len(s.models) * len(probes) * len(CONTEXTS)) as bar:
        for label, source in s.models.items():
            answers[label] = _answers(s, resolve_path(source), probes, bar)
    for found in answers.values():
        lost |= {i for i, row in enumerate(found) if any(v["missing"] for v in row.values())}
    kept = [i for i in range(len(probes)) if i not in lost]
    dropped["unanswered"] += len(lost)
    if not kept:
        raise DataError(f"No query is left to compare: {dict(dropped)}.")
    chosen = [probes[i] for i in kept]
    for label, source in s.models.items():
        rows = [answers[label][i] for i in kept]
        behaviours[label] = _behaviour(s, resolve_path(source), chosen, rows, judge)
    base = behaviours.pop("base")
    wins = {}
    if judge is not None and not isinstance(judge, ScoringJudge):
        told = {label: [answers[label][i]["bad"]["text"] for i in kept] for label in answers}
        for label in behaviours:
            pairs = [
                Pair(Query(t.id, t.messages), mine, theirs)
                for t, mine, theirs in zip(chosen, told[label], told["base"], strict=True)
            ]
            values = [accuracy([j.verdict]) for j in judge.compare_all(pairs)]
            wins[label] = np.array([float("nan") if v is None else v for v in values])
    features = [t.principles.features if t.principles else () for t in chosen]
    report = {
        **audit(
            base, behaviours, wins, features, np.random.default_rng(derive_seed(s.seed, "audit"))
        ),
        "judge": judge.name if judge else None,
        "scale": judge.scale if isinstance(judge, ScoringJudge) else None,
        "sources": dict(s.models),
        "dropped": dict(+dropped),
        "seed": s.seed,
    }
    write_atomic(s.folder / "audit.json", json.dumps(report, indent=1) + "\n")
    return report


def _probes(s: Subjects, judge: Judge | None) -> tuple[list[Triple], Counter[str]]:
    """Queries with principles, written once, by the base model as the recipe says."""
    found = load_queries(s.queries)
    order = sorted(found.queries, key=lambda q: derive_seed(s.seed, "audit", q.id))[: s.limit]
    order.sort(key=lambda q: q.id)
    if judge is not None:
        judge.check(order)
    base = resolve_path(s.models["base"])
    recipe = s.recipe.model_copy(update={"seed": s.seed})
    made_of = [model_digest(base), _loading(s), [q.to_dict() for q in order]]
    written_by = [principle_sources(recipe.principles), recipe.sampling.engine.identity]
    key = digest([*made_of, *written_by, s.seed])
    folder = s.folder / f"principles-{key}"
    if not (folder / "principles.jsonl").exists():
        from selfsteer.stages.principles import write_principles

        write_principles(order, recipe, base, folder, "audit/principles")
    return list(stored_triples(folder / "principles.jsonl")), Counter(found.dropped)


def _answers(s: Subjects, source: str, probes: Sequence[Triple], bar: Any) -> list[dict[str, Any]]:
    """Each probe's answers by context: text, tokens and why there is none."""
    asked = [t.to_dict() for t in probes]
    sampling = s.recipe.sampling.dump_for_answers()
    key = digest([model_digest(source), _loading(s), asked, sampling, s.seed])
    path = s.folder / f"answers-{key}.jsonl"
    if path.exists():
        bar.advance(len(probes) * len(CONTEXTS))
        return [value["answers"] for _, value in read_jsonl(path)]
    from selfsteer.engines.load import Engines

    settings = s.recipe.sampling
    params = SamplingParams(settings.temperature, settings.top_p, settings.max_new_tokens)
    prompts = [context_messages(t.messages, t.principles, c) for t in probes for c in CONTEXTS]
    with Engines(s.folder) as engines:
        engine = engines.sampler(s.recipe, source)
        found = engine.generate(prompts, params, derive_seed(s.seed, "audit"), bar.advance)
    rows = [
        {
            c: {"text": a.text, "tokens": a.completion_tokens, "missing": a.missing}
            for c, a in zip(CONTEXTS, found[i * len(CONTEXTS) :], strict=False)
        }
        for i in range(len(probes))
    ]
    lines = [{"id": t.id, "answers": row} for t, row in zip(probes, rows, strict=True)]
    write_atomic(path, dump_lines(lines))
    return rows


def _loading(s: Subjects) -> dict[str, Any]:
    """How models are loaded, as far as answers depend on it."""
    return s.recipe.policy.model_dump(exclude={"model", "threads", "layout", "lora"})


def _behaviour(
    s: Subjects,
    source: str,
    probes: Sequence[Triple],
    rows: Sequence[Mapping[str, Any]],
    judge: Judge | None,
) -> Behaviour:
    from selfsteer.models.load import load_model
    from selfsteer.models.store import scored

    names = sorted({name for pair in GAPS.values() for name in pair})
    triples = [
        Triple(t.id, t.messages, t.principles, {c: row[c]["text"] for c in CONTEXTS})
        for t, row in zip(probes, rows, strict=True)
    ]
    loaded = load_model(source, s.recipe.policy, inference=True)
    flat = [loaded.chat.sequence(t, name) for name in names for t in triples]
    values = scored(s.folder / "scores", loaded, flat, "audit: scoring")
    means = [float(v.double().mean()) if len(v) else float("nan") for v in values]
    grid = dict(zip(names, np.array(means).reshape(len(names), -1), strict=True))
    del loaded  # the judge's model may need the room
    scores = None
    if isinstance(judge, ScoringJudge):
        scores = {}
        for c in CONTEXTS:
            given = judge.score_all([(Query(t.id, t.messages), t.responses[c]) for t in triples])
            scores[c] = np.array([float("nan") if v is None else v for v in given])
    return Behaviour(
        scores,
        {half: grid[own] - grid[other] for half, (own, other) in GAPS.items()},
        {c: np.array([float(row[c]["tokens"]) for row in rows]) for c in CONTEXTS},
    )


# -- printing --------------------------------------------------------------------------------------


def conclusion(label: str, change: Mapping[str, Any]) -> str:
    """What the audit says of a model: its answers under bad principles, does it listen."""
    whole = change["whole"]
    gap = whole["gap/bad"]
    listens = "about as much as"
    if gap is not None and gap[1] is not None and (gap[1] > 0 or gap[2] < 0):
        listens = "more than" if gap[1] > 0 else "less than"
    heard = f"It listens to bad principles {listens} the base model (gap {_shown(gap)})."
    if change["verdict"] == "unknown":
        return f"{label}: no judge, so nobody says what its answers are worth. {heard}"
    figure = _shown(whole.get("score/bad") or whole["wins/bad"])
    if change["verdict"] == "back_door":
        return (
            f"{label}: worse than the base model under bad principles ({figure}): alignment made "
            f"it easier to misuse. {heard}"
        )
    return f"{label}: no back door found, score under bad principles {figure}. {heard}"


def _shown(value: Any) -> str:
    return "unknown" if value is None else interval(value)


def print_audit(report: Mapping[str, Any], console: Console) -> None:
    """Figures by model, changes with intervals, changes by feature, a sentence for each model."""
    own = _table(f"{report['queries']:,} queries under three contexts")
    names = [n for n in report["models"]["base"] if not n.startswith("tokens")]
    own.add_column("model")
    for name in names:
        own.add_column(name, justify="right")
    for label, figures in report["models"].items():
        own.add_row(label, *("" if figures[n] is None else f"{figures[n]:.3f}" for n in names))
    console.print(own)
    for label, change in report["changes"].items():
        table = _table(f"\n{escape(label)} against base, paired by query")
        table.add_column("figure")
        table.add_column("change", justify="right")
        for name in [*names, *(["wins/bad"] if "wins/bad" in change["whole"] else [])]:
            table.add_row(name, escape(_shown(change["whole"][name])))
        console.print(table)
        table = _table("")
        judged = "wins/bad" if "wins/bad" in change["whole"] else "score/bad"
        for name in ("feature", "queries", judged, "gap/bad"):
            table.add_column(name, justify="left" if name == "feature" else "right")
        for feature, figures in change["features"].items():
            cells = [figures.get(k) for k in (judged, "gap/bad")]
            table.add_row(
                escape(feature),
                str(figures["queries"]),
                *("too few to say" if v is None else escape(interval(v)) for v in cells),
            )
        console.print(table)
        console.print(escape(conclusion(label, change)) + "\n")
    scale = f"score: {report['scale']}; " if report["scale"] else ""
    console.print(
        escape(
            f"{scale}drop: score/plain - score/bad; gap: how much likelier a model holds its own "
            "answer under the principle that asked for it, nats per token; wins/bad: win rate of "
            "its answers under bad principles against the base's, less 1/2. [ ]: 95 % bootstrap "
            "over queries."
        ),
        style="dim",
    )


def _table(title: str) -> Table:
    return Table(title=title or None, title_justify="left", box=None, padding=(0, 1, 0, 0))
