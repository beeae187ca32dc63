"""Benchmarks of several models: tasks of lm-evaluation-harness, and judged question sets.

What one model did on one benchmark is a file of its own in ``benchmarks/``, addressed by all that
it depends on. So a killed stage resumes after the last finished one, and a benchmark that is added
later costs only itself. ``benchmarks.json`` and the table ``benchmarks.md`` are drawn from them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import dump_lines, read_jsonl, write_atomic
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.errors import ConfigError
from selfsteer.evaluation.benchmark_table import markdown
from selfsteer.evaluation.harness import Unavailable, check_tasks, harness_identity, run_task
from selfsteer.evaluation.judged_sets import judge_set
from selfsteer.evaluation.questions import Answered, Question, read_baseline, read_questions
from selfsteer.judges.base import Judge, load_judge
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
from selfsteer.run.stage import identity
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


def check_benchmarks(settings: Benchmarks, judge: JudgeConfig | None) -> None:
    """Fails now, not after all trainings, if a benchmark cannot be run.

    Whether a task's data can be fetched shows only when it is asked.

    Raises:
        SelfsteerError: a task or metric name, a question file, the judge.
    """
    for fault in settings.judge_faults(judge):
        raise ConfigError(f"{fault}.")
    if settings.tasks:
        check_tasks(settings)
    if find_spec("statsmodels") is None and any(s.style != "mt-bench" for s in settings.judged):
        raise ConfigError(
            "benchmarks.judged needs statsmodels for its length control: "
            "pip install 'selfsteer[eval]'."
        )
    judging = load_judge(judge) if settings.judged else None
    for judged in settings.judged:
        questions = read_questions(judged, settings.limit)
        if judged.baseline is not None:
            read_baseline(judged, questions)
        if judging is not None:
            judging.check([q.query() for q in questions])


def benchmark(models: Sequence[Contestant], setup: Setup, home: Path) -> StageResult:
    """Writes ``benchmarks.json`` and ``benchmarks.md``, and what they are made of.

    Args:
        models: rows of the table; the first is what the others are held against, and the baseline
            of judged sets that name none.
        setup: which benchmarks, and how.
        home: the run folder, or any other.

    Raises:
        ConfigError: a judged set has nothing to be held against.
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
    contest = Contest(models, setup, home)
    columns, unavailable = contest.run_tasks()
    judging = load_judge(setup.judge, home / "judgements") if settings.judged else None
    notes: dict[str, Any] = {}
    answered = {s.name: contest.answers(s, notes) for s in settings.judged}
    for judged in settings.judged:
        assert judging is not None
        say(f"  judging {judged.name} ({judged.style})")
        columns.append(contest.judge(judged, *answered[judged.name], judging))
    report = {
        "models": {m.label: m.source for m in models},
        "limit": settings.limit,
        "differences": _differences(columns, [m.label for m in models], setup.seed),
        "benchmarks": [_slim(column, home) for column in columns],
        "versions": versions(),
    }
    write_atomic(home / "benchmarks.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_atomic(home / "benchmarks.md", markdown(report))
    asked = len(models) * (len(settings.tasks) + len(settings.judged))
    result = StageResult(asked, asked - len(models) * len(unavailable), notes=notes)
    if unavailable:
        done = f"The other {result.n_out} of {result.n_in} are in {home / 'benchmarks.md'}."
        raise Unavailable(" ".join([*map(str, unavailable.values()), done]))
    return result


@dataclass(frozen=True)
class Contest:
    """Several models, all asked in the same way; the fields are the arguments of `benchmark`."""

    models: Sequence[Contestant]
    setup: Setup
    home: Path

    def run_tasks(self) -> tuple[list[dict[str, Any]], dict[str, Unavailable]]:
        """The columns of the tasks, and those that cannot be asked; a model is loaded once."""
        found: dict[str, dict[str, Any]] = {t.name: {} for t in self.setup.settings.tasks}
        unavailable: dict[str, Unavailable] = {}
        for model in self.models:
            loaded = None
            for task in self.setup.settings.tasks:
                if task.name in unavailable:
                    continue
                made_of = [task, harness_identity(self.setup.settings), version("lm_eval")]
                path = self._cell(model, task.name, made_of, ".json")
                if not path.exists():
                    say(f"  {model.label}: {task.name}")
                    loaded = loaded or load_model(model.source, self.setup.loading, inference=True)
                    seed = derive_seed(self.setup.seed, "benchmarks", task.name)
                    try:
                        figures = run_task(task, self.setup.settings, loaded, seed)
                    except Unavailable as e:
                        unavailable[task.name] = e
                        warn(f"{task.name} is left out: its data or a package is missing")
                        continue
                    write_atomic(path, json.dumps(figures, indent=1, allow_nan=False) + "\n")
                figures = found[task.name][model.label] = json.loads(path.read_bytes())
                if figures["truncated"]:
                    warn(
                        f"{model.label}, {task.name}: {figures['truncated']:,} requests were "
                        "longer than the model's context and lost their beginning"
                    )
        columns = [{"name": n, "kind": "task", "models": cells} for n, cells in found.items()]
        return [column for column in columns if column["models"]], unavailable

    def answers(
        self, judged: JudgedSet, notes: dict[str, Any]
    ) -> tuple[list[Question], dict[str, dict[str, Answered]]]:
        """The questions of a set, and what each model answered, now or in an earlier try.

        Args:
            judged: the set.
            notes: what servers were asked now is added under ``asked``.
        """
        questions = read_questions(judged, self.setup.settings.limit)
        params = SamplingParams(
            self.setup.settings.temperature,
            self.setup.sampling.top_p,
            self.setup.settings.max_new_tokens or self.setup.sampling.max_new_tokens,
        )
        made_of = [params, self.setup.sampling.engine, questions]
        found: dict[str, dict[str, Answered]] = {}
        for model in self.models:
            path = self._cell(model, judged.name, made_of, ".answers.jsonl")
            if not path.exists():
                with Engines(self.home) as engines:
                    given = self._ask(questions, engines, model, params, judged.name)
                if engines.asked:
                    notes.setdefault("asked", {})[f"{model.label}: {judged.name}"] = engines.asked
                lines = [
                    {
                        **q.query().to_dict(),
                        "response": a.responses[0] if a.responses else "",
                        **asdict(a),
                    }
                    for q, a in zip(questions, given, strict=True)
                ]
                write_atomic(path, dump_lines(lines))
            found[model.label] = {
                v["id"]: Answered(
                    v["id"], tuple(v["responses"]), tuple(v["finish_reasons"]), v["missing"]
                )
                for _, v in read_jsonl(path)
            }
        return questions, found

    def _ask(
        self,
        questions: Sequence[Question],
        engines: Engines,
        model: Contestant,
        params: SamplingParams,
        name: str,
    ) -> list[Answered]:
        """Turn after turn; a model's own answers are part of what it is asked next."""
        s = self.setup.sampling
        engine = engines.sampler(s.engine, model.source, self.setup.loading, s.batch_size)
        found = {q.id: Answered(q.id, (), ()) for q in questions}
        with progress_bar(
            f"{model.label}: {name}", sum(1 + len(q.later) for q in questions)
        ) as bar:
            for turn in range(1 + max(len(q.later) for q in questions)):
                asked = [
                    Request(
                        q.id,
                        q.query(found[q.id].responses).messages,
                        # the same seed for every model: what differs is the model
                        derive_seed(self.setup.seed, "benchmarks", name, q.id, turn),
                    )
                    for q in questions
                    if turn <= len(q.later) and not found[q.id].missing
                ]
                for i, given in answers(engine, asked, params, advance=bar.advance).items():
                    found[i] = found[i].then(given)
        return list(found.values())

    def judge(
        self,
        judged: JudgedSet,
        questions: Sequence[Question],
        given: Mapping[str, Mapping[str, Answered]],
        judge: Judge,
    ) -> dict[str, Any]:
        """The column of a judged set."""
        first = self.models[0].label
        baseline: dict[str, str] = {}
        if judged.baseline is not None:
            baseline = read_baseline(judged, questions)
        elif judged.style != "mt-bench":
            baseline = {i: a.responses[0] for i, a in given[first].items() if not a.missing}
            given = {label: found for label, found in given.items() if label != first}
        seed = derive_seed(self.setup.seed, "benchmarks", judged.name)
        return {
            "name": judged.name,
            "kind": judged.style,
            "judge": judge.name,
            "scale": getattr(judge, "scale", "1 to 10"),
            "against": judged.baseline or first,
            "models": judge_set(judged, questions, given, baseline, judge, seed),
        }

    def _cell(self, model: Contestant, name: str, made_of: Sequence[Any], suffix: str) -> Path:
        """The file of one model on one benchmark."""
        shared = [model.fingerprint, self.setup.loading, self.setup.seed]
        key = digest(identity([*shared, *made_of]))
        return _folder(self.home, model.label) / f"{_slug(name)}-{key}{suffix}"


def _folder(home: Path, label: str) -> Path:
    return home / "benchmarks" / _slug(label)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def _differences(
    columns: Sequence[Mapping[str, Any]], labels: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Each later model minus each earlier one, paired by question, of figures that are means."""
    out = []
    for column, figure in ((c, f) for c in columns for f in ("", "LC")):
        values = {
            m: f["values"][figure] for m, f in column["models"].items() if figure in f["values"]
        }
        for earlier, later in combinations([m for m in labels if m in values], 2):
            mine, theirs = values[later], values[earlier]
            both = sorted(mine.keys() & theirs.keys())
            if not both:
                continue
            rng = np.random.default_rng(derive_seed(seed, "difference", column["name"]))
            out.append(
                {
                    "benchmark": column["name"],
                    "figure": figure,
                    "of": [later, earlier],
                    "questions": len(both),
                    "difference": mean_interval([mine[i] - theirs[i] for i in both], rng),
                }
            )
    return out


def _slim(column: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """The column without values and examples of questions, which are in the models' files."""
    kept = {}
    for model, figures in column["models"].items():
        kept[model] = {k: v for k, v in figures.items() if k not in ("values", "examples")}
        if column["kind"] != "task":
            values, controlled = (figures["values"].get(figure, {}) for figure in ("", "LC"))
            lines = [
                {"id": i, "value": v}
                | ({"length_controlled": controlled[i]} if i in controlled else {})
                for i, v in values.items()
            ]
            path = _folder(home, model) / f"{_slug(column['name'])}.values.jsonl"
            write_atomic(path, dump_lines(lines))
    return {**column, "models": kept}
