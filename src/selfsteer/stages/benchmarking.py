"""Benchmarks of several models: tasks of lm-evaluation-harness, and judged question sets.

What one model did on one benchmark is a file of its own in ``benchmarks/``, addressed by all that
it depends on. So a killed stage goes on behind the last finished one, and a benchmark that is added
later costs only itself. ``benchmarks.json`` and the table ``benchmarks.md`` are drawn from them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import dump_lines, read_jsonl, write_atomic
from selfsteer.engines.answers import answers as ask
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.errors import ConfigError
from selfsteer.evaluation.benchmark_table import markdown
from selfsteer.evaluation.harness import Harness, Unavailable
from selfsteer.evaluation.judged_sets import (
    Answered,
    Question,
    judge_set,
    read_baseline,
    read_questions,
)
from selfsteer.judges.base import load_judge
from selfsteer.judges.stats import mean_interval
from selfsteer.models.load import load_model
from selfsteer.recipe.sections import (
    Benchmarks,
    JudgeConfig,
    JudgedSet,
    Loading,
    Policy,
    Sampling,
    Section,
)
from selfsteer.run.folder import StageResult, versions
from selfsteer.terminal import progress_bar, say, warn


@dataclass(frozen=True)
class Contestant:
    """A row of the table: its name, where the model is, and what identifies it."""

    label: str
    source: str
    fingerprint: str


class Settings(Section):
    """What of a recipe bears on benchmarks of models that are there already."""

    seed: int = 0
    policy: Policy
    sampling: Sampling = Sampling()
    judge: JudgeConfig | None = None
    benchmarks: Benchmarks


@dataclass(frozen=True)
class Setup:
    """Which benchmarks, who judges them, and how models are loaded and answer."""

    settings: Benchmarks
    judge: JudgeConfig | None
    sampling: Sampling
    loading: Loading
    seed: int


def check_benchmarks(settings: Benchmarks, judge_settings: JudgeConfig | None) -> None:
    """Fails now, not after all trainings, if a benchmark cannot be run.

    Whether a task's data can be fetched is seen only when it is asked.

    Raises:
        SelfsteerError: a task or metric name, a question file, the judge.
    """
    if settings.tasks:
        Harness(settings).check()
    if find_spec("statsmodels") is None and any(s.style != "mt-bench" for s in settings.judged):
        raise ConfigError(
            "benchmarks.judged needs statsmodels for its length control: "
            "pip install 'selfsteer[eval]'."
        )
    judge = load_judge(judge_settings) if settings.judged else None
    for judged in settings.judged:
        questions = read_questions(judged, settings.limit)
        if judged.baseline is not None:
            read_baseline(judged, questions)
        if judge is not None:
            judge.check([q.query(()) for q in questions])


def benchmark(models: Sequence[Contestant], setup: Setup, home: Path) -> StageResult:
    """Writes ``benchmarks.json`` and ``benchmarks.md``, and what they are made of.

    Args:
        models: rows of the table; the first is what the others are held against, and the baseline
            of judged sets that name none.
        setup: which benchmarks, and how.
        home: the run folder, or any other.

    Raises:
        ConfigError: a judged set has nobody to be held against.
        Unavailable: after everything else: some tasks cannot be asked here.
    """
    settings = setup.settings
    for judged in settings.judged:
        if len(models) == 1 and judged.style != "mt-bench" and judged.baseline is None:
            raise ConfigError(
                f"benchmarks.judged: {judged.name} has no baseline, so the first model's answers "
                f"are the ones to beat, and there is no other model than {models[0].label}. Give "
                "the set a baseline, or name a second model."
            )
    columns: list[dict[str, Any]] = []
    unavailable: dict[str, Unavailable] = {}
    for name, cells in _run_tasks(models, setup, home, unavailable).items():
        columns.append({"name": name, "kind": "task", "models": cells})
    result = StageResult(len(models) * (len(settings.tasks) + len(settings.judged)), 0)
    judge = load_judge(setup.judge, home / "judgements") if settings.judged else None
    answered = [(s, *_answer_set(models, s, setup, home, result)) for s in settings.judged]
    for judged, questions, answers in answered:
        assert judge is not None
        say(f"  judging {judged.name} ({judged.style})")
        baseline: Mapping[str, str] = {}
        contestants: Mapping[str, Mapping[str, Answered]] = answers
        if judged.style != "mt-bench":
            if judged.baseline is not None:
                baseline = read_baseline(judged, questions)
            else:
                first = models[0].label
                baseline = {i: a.responses[0] for i, a in answers[first].items() if not a.missing}
                contestants = {m: found for m, found in answers.items() if m != first}
        seed = derive_seed(setup.seed, "benchmarks", judged.name)
        found = judge_set(judged, questions, contestants, baseline, judge, seed)
        columns.append(
            {
                "name": judged.name,
                "kind": judged.style,
                "judge": judge.name,
                "scale": getattr(judge, "scale", "1 to 10"),
                "against": judged.baseline or models[0].label,
                "models": found,
            }
        )
    report = {
        "models": {m.label: m.source for m in models},
        "limit": settings.limit,
        "benchmarks": columns,
        "differences": _differences(columns, [m.label for m in models], setup.seed),
        "versions": versions(),
    }
    _write(report, home)
    result.n_out = result.n_in - len(models) * len(unavailable)
    if unavailable:
        done = f"The other {result.n_out} of {result.n_in} are in {home / 'benchmarks.md'}."
        texts = [str(e) for e in unavailable.values()]
        raise Unavailable(" ".join([*texts, done]))
    return result


def _run_tasks(
    models: Sequence[Contestant],
    setup: Setup,
    home: Path,
    unavailable: dict[str, Unavailable],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Task → model → its figures; each model is loaded once, if at all."""
    settings = setup.settings
    if not settings.tasks:
        return {}
    harness = Harness(settings)
    found: dict[str, dict[str, dict[str, Any]]] = {t.name: {} for t in settings.tasks}
    for model in models:
        loaded = None
        for task in settings.tasks:
            if task.name in unavailable:
                continue
            identity = [
                model.fingerprint,
                setup.loading.model_dump(exclude={"threads", "layout"}),
                task.model_dump(),
                harness.identity,
                version("lm_eval"),
                setup.seed,
            ]
            path = _cell(home, model.label, task.name, identity)
            if not path.exists():
                say(f"  {model.label}: {task.name}")
                loaded = loaded or load_model(model.source, setup.loading, inference=True)
                seed = derive_seed(setup.seed, "benchmarks", task.name)
                try:
                    figures = harness.run(task, loaded, seed)
                except Unavailable as e:
                    unavailable[task.name] = e
                    warn(f"{task.name} is left out: its data or a package is missing")
                    continue
                write_atomic(path, json.dumps(figures, indent=1, allow_nan=False) + "\n")
            figures = json.loads(path.read_bytes())
            if figures["truncated"]:
                warn(
                    f"{model.label}, {task.name}: {figures['truncated']:,} requests were longer "
                    "than the model's context and lost their beginning"
                )
            found[task.name][model.label] = figures
    return {name: cells for name, cells in found.items() if cells}


def _cell(home: Path, label: str, name: str, identity: Any, suffix: str = ".json") -> Path:
    """The file of one model on one benchmark."""
    return _folder(home, label) / f"{_slug(name)}-{digest(identity)}{suffix}"


def _folder(home: Path, label: str) -> Path:
    return home / "benchmarks" / _slug(label)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


# -- answers to judged sets ------------------------------------------------------------------------


def _answer_set(
    models: Sequence[Contestant],
    judged: JudgedSet,
    setup: Setup,
    home: Path,
    result: StageResult,
) -> tuple[list[Question], dict[str, dict[str, Answered]]]:
    """The questions, and what each model answered, now or in an earlier try."""
    settings = setup.settings
    questions = read_questions(judged, settings.limit)
    params = SamplingParams(
        settings.temperature,
        setup.sampling.top_p,
        settings.max_new_tokens or setup.sampling.max_new_tokens,
    )
    answers: dict[str, dict[str, Answered]] = {}
    for model in models:
        identity = [
            model.fingerprint,
            setup.loading.model_dump(exclude={"threads", "layout"}),
            params.__dict__,
            setup.sampling.batch_size,
            setup.sampling.engine.identity,
            [[q.id, *q.start, *q.later] for q in questions],
            setup.seed,
        ]
        path = _cell(home, model.label, judged.name, identity, ".answers.jsonl")
        if not path.exists():
            seed = derive_seed(setup.seed, "benchmarks", judged.name)  # the same for every model
            with Engines(home) as engines:
                found = _ask(questions, engines, model, setup, params, seed, judged.name)
            if engines.asked:
                result.notes.setdefault("asked", {})[f"{model.label}: {judged.name}"] = (
                    engines.asked
                )
            lines = [
                {
                    **q.query(()).to_dict(),
                    "response": a.responses[0] if a.responses else "",
                    "responses": a.responses,
                    "finish_reasons": a.finish_reasons,
                    "missing": a.missing,
                }
                for q, a in zip(questions, found, strict=True)
            ]
            write_atomic(path, dump_lines(lines))
        answers[model.label] = {
            v["id"]: Answered(
                v["id"], tuple(v["responses"]), tuple(v["finish_reasons"]), v["missing"]
            )
            for _, v in read_jsonl(path)
        }
    return questions, answers


def _ask(
    questions: Sequence[Question],
    engines: Engines,
    model: Contestant,
    setup: Setup,
    params: SamplingParams,
    seed: int,
    name: str,
) -> list[Answered]:
    """Turn after turn; a model's own answers are part of what it is asked next."""
    s = setup.sampling
    engine = engines.sampler(s.engine, model.source, setup.loading, s.batch_size)
    responses: list[list[str]] = [[] for _ in questions]
    reasons: list[list[str]] = [[] for _ in questions]
    missing: dict[int, str] = {}
    total = sum(1 + len(q.later) for q in questions)
    with progress_bar(f"{model.label}: {name}", total) as bar:
        for turn in range(1 + max(len(q.later) for q in questions)):
            rows = [i for i, q in enumerate(questions) if turn <= len(q.later) and i not in missing]
            asked = [
                Request(
                    questions[i].id,
                    questions[i].query(responses[i]).messages,
                    derive_seed(seed, questions[i].id, turn),
                )
                for i in rows
            ]
            found = ask(engine, asked, params, advance=bar.advance)
            for i in rows:
                completion = found[questions[i].id]
                if completion.missing:
                    missing[i] = completion.missing
                else:
                    responses[i].append(completion.text)
                    reasons[i].append(completion.finish_reason)
    return [
        Answered(q.id, tuple(responses[i]), tuple(reasons[i]), missing.get(i))
        for i, q in enumerate(questions)
    ]


# -- the report ------------------------------------------------------------------------------------


def _scores(column: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, float]]]:
    """Figure → model → question → value, for figures that are means over questions."""
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for model, figures in column["models"].items():
        if figures.get("values"):
            found.setdefault("", {})[model] = figures["values"]
        controlled = figures.get("length_controlled", {})
        if controlled.get("values"):
            found.setdefault("LC", {})[model] = controlled["values"]
    return found


def _differences(
    columns: Sequence[Mapping[str, Any]], labels: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Each later model minus each earlier one, paired by question."""
    out = []
    for column in columns:
        for figure, values in _scores(column).items():
            for earlier, later in combinations([m for m in labels if m in values], 2):
                mine, theirs = values[later], values[earlier]
                both = sorted(mine.keys() & theirs.keys())
                if not both:
                    continue
                rng = np.random.default_rng(derive_seed(seed, "difference", column["name"]))
                gap = mean_interval([mine[i] - theirs[i] for i in both], rng)
                out.append(
                    {
                        "benchmark": column["name"],
                        "figure": figure,
                        "of": [later, earlier],
                        "questions": len(both),
                        "difference": gap,
                    }
                )
    return out


def _write(report: dict[str, Any], home: Path) -> None:
    """The report; what it has per question is in the files of the models."""
    columns = []
    for column in report["benchmarks"]:
        kept = {}
        for model, figures in column["models"].items():
            controlled = figures.get("length_controlled", {})
            kept[model] = {k: v for k, v in figures.items() if k not in ("values", "examples")}
            if controlled:
                slim = {k: v for k, v in controlled.items() if k != "values"}
                kept[model]["length_controlled"] = slim
            if column["kind"] != "task":
                lines = [
                    {"id": i, "value": v, "length_controlled": controlled["values"][i]}
                    if controlled.get("values")
                    else {"id": i, "value": v}
                    for i, v in figures.get("values", {}).items()
                ]
                path = _folder(home, model) / f"{_slug(column['name'])}.values.jsonl"
                write_atomic(path, dump_lines(lines))
        columns.append({**column, "models": kept})
    slim = {**report, "benchmarks": columns}
    write_atomic(home / "benchmarks.json", json.dumps(slim, indent=1, allow_nan=False) + "\n")
    write_atomic(home / "benchmarks.md", markdown(slim))
