"""Benchmarks of several models: tasks of lm-evaluation-harness, and judged question sets.

What one model did on one benchmark is a file of its own in ``benchmarks/``, addressed by all that
it depends on. So a killed stage resumes after the last finished one, and a benchmark that is added
later costs only itself. ``benchmarks.json`` and the table ``benchmarks.md`` are drawn from them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import derive_seed, digest, model_digest
from selfsteer.data.jsonl import dump_lines, read_jsonl, write_atomic
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Engine, Request, SamplingParams
from selfsteer.engines.load import Engines, check_served
from selfsteer.errors import ConfigError
from selfsteer.evaluation.benchmark_table import markdown
from selfsteer.evaluation.harness import Unavailable, check_tasks, harness_identity, run_task
from selfsteer.evaluation.judged_sets import judge_set
from selfsteer.evaluation.questions import Answered, Question, read_baseline, read_questions
from selfsteer.judges.base import Judge
from selfsteer.judges.load import load_judge
from selfsteer.judges.stats import mean_interval
from selfsteer.recipe.sections import Benchmarks, JudgeConfig, JudgedSet, Sampling
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult, versions
from selfsteer.run.stage import Artifact, Stage, identity
from selfsteer.terminal import progress_bar, say, warn


@dataclass(frozen=True)
class RunBenchmarks(Stage):
    """Several models on public benchmarks and judged question sets.

    Args:
        models: rows of the table; the first is what the others are held against, and the baseline
            of judged sets that name none.
        settings: which benchmarks.
        judge: of the judged sets.
        sampling: how models answer them, temperature and budget aside.
    """

    models: Mapping[str, Artifact]
    settings: Benchmarks
    judge: JudgeConfig | None
    sampling: Sampling

    title = "benchmarks"
    makes = ("benchmarks.json", "benchmarks.md")

    @override
    def cost(self, scale: Scale) -> Cost:
        return Cost(unknown=(self.name,))

    @override
    def check(self) -> Iterator[str]:
        """Whether a task's data can be fetched shows only when it is asked."""
        settings, first = self.settings, next(iter(self.models))
        for fault in settings.judge_faults(self.judge):
            raise ConfigError(f"{fault}.")
        if settings.tasks:
            check_tasks(settings)
        compared = [s for s in settings.judged if s.style != "mt-bench"]
        if compared and find_spec("statsmodels") is None:
            raise ConfigError(
                "benchmarks.judged needs statsmodels for its length control: "
                "pip install 'selfsteer[eval]'."
            )
        judge = load_judge(self.judge) if settings.judged else None
        for judged in settings.judged:
            questions = read_questions(judged, settings.limit)
            if judged.baseline is not None:
                read_baseline(judged, questions)
            elif judged in compared and len(self.models) == 1:
                raise ConfigError(
                    f"benchmarks.judged: {judged.name} has no baseline, so the first model's "
                    f"answers are the ones to beat, and there is no other model than {first}. "
                    "Give the set a baseline, or name a second model."
                )
            if judge is not None:
                judge.check([q.query() for q in questions])
        yield from ()

    @override
    def run(self, run: RunFolder) -> StageResult:
        """Runs what is not there yet.

        Raises:
            Unavailable: after everything else: some tasks cannot be asked here.
        """
        home, settings, notes = run.path, self.settings, dict[str, Any]()
        given = {s.name: self.answers(s, home, notes) for s in settings.judged}
        columns, unavailable = self._run_tasks(home)
        judge = load_judge(self.judge, home / "judgements") if settings.judged else None
        for judged in settings.judged:
            assert judge is not None
            say(f"  judging {judged.name} ({judged.style})")
            columns.append(self._judge(judged, *given[judged.name], judge))
        report = {
            "models": {label: str(model.path) for label, model in self.models.items()},
            "limit": settings.limit,
            "differences": _differences(columns, list(self.models), self.seed),
            "benchmarks": [_without_values(column) for column in columns],
            "versions": versions(),
        }
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        write_atomic(home / "benchmarks.json", text)
        write_atomic(home / "benchmarks.md", markdown(report))
        asked = len(self.models) * (len(settings.tasks) + len(settings.judged))
        result = StageResult(asked, asked - len(self.models) * len(unavailable), notes=notes)
        if unavailable:
            done = f"The other {result.n_out} of {result.n_in} are in {home / 'benchmarks.md'}."
            raise Unavailable(" ".join([*map(str, unavailable.values()), done]))
        return result

    def _run_tasks(self, home: Path) -> tuple[list[dict[str, Any]], dict[str, Unavailable]]:
        """The columns of the tasks, and those that cannot be asked; a model is loaded once."""
        from selfsteer.models.load import load_model

        found: dict[str, dict[str, Any]] = {t.name: {} for t in self.settings.tasks}
        unavailable: dict[str, Unavailable] = {}
        for label, model in self.models.items():
            loaded = None
            for task in self.settings.tasks:
                if task.name in unavailable:
                    continue
                made_of = [task, harness_identity(self.settings), version("lm_eval")]
                path = self._cell(home, label, task.name, made_of, ".json")
                if not path.exists():
                    say(f"  {label}: {task.name}")
                    loaded = loaded or load_model(str(model.path), self.loading, inference=True)
                    seed = derive_seed(self.seed, "benchmarks", task.name)
                    try:
                        figures = run_task(task, self.settings, loaded, seed)
                    except Unavailable as e:
                        unavailable[task.name] = e
                        warn(f"{task.name} is left out: its data or a package is missing")
                        continue
                    write_atomic(path, json.dumps(figures, indent=1, allow_nan=False) + "\n")
                figures = found[task.name][label] = read_json(dict[str, Any], path)
                if figures["truncated"]:
                    warn(
                        f"{label}, {task.name}: {figures['truncated']:,} requests were longer "
                        "than the model's context and lost their beginning"
                    )
        columns = [{"name": n, "kind": "task", "models": cells} for n, cells in found.items()]
        return [column for column in columns if column["models"]], unavailable

    def answers(
        self, judged: JudgedSet, home: Path, notes: dict[str, Any]
    ) -> tuple[list[Question], dict[str, dict[str, Answered]]]:
        """The questions of a set, and what each model answered, now or in an earlier try.

        Args:
            judged: the set.
            home: the run folder.
            notes: what servers were asked now is added under ``asked``.

        Raises:
            ConfigError: the engine cannot answer with every model.
        """
        check_served(self.sampling.engine, (str(m.path) for m in self.models.values()), home)
        questions, s = read_questions(judged, self.settings.limit), self.sampling
        budget = self.settings.max_new_tokens or s.max_new_tokens
        params = SamplingParams(self.settings.temperature, s.top_p, budget)
        found: dict[str, dict[str, Answered]] = {}
        for label, model in self.models.items():
            made_of = [params, s.engine, questions]
            path = self._cell(home, label, judged.name, made_of, ".answers.jsonl")
            known: dict[str, Answered] = {}
            if path.exists():
                known = {v["id"]: Answered.from_dict(v) for _, v in read_jsonl(path)}
            again = [q for q in questions if q.id not in known or known[q.id].failed]
            if again:
                with Engines(home) as engines:
                    # without a name, so that one model leaves memory before the next comes
                    given = self._ask(
                        engines.sampler(s.engine, str(model.path), self.loading, s.batch_size),
                        again,
                        params,
                        f"{label}: {judged.name}",
                    )
                known |= {a.id: a for a in given}
                if engines.asked:
                    notes.setdefault("asked", {})[f"{label}: {judged.name}"] = engines.asked
                lines = (
                    {**q.query().to_dict(), "response": "".join(a.responses[:1]), **asdict(a)}
                    for q, a in ((q, known[q.id]) for q in questions)
                )
                write_atomic(path, dump_lines(lines))
            found[label] = known
        return questions, found

    def _ask(
        self, engine: Engine, questions: Sequence[Question], params: SamplingParams, label: str
    ) -> list[Answered]:
        """Turn after turn; a model's own answers are part of what it is asked next."""
        found = {q.id: Answered(q.id, (), ()) for q in questions}
        with progress_bar(label, sum(1 + len(q.later) for q in questions)) as bar:
            for turn in range(1 + max(len(q.later) for q in questions)):
                asked = [
                    Request(
                        q.id,
                        q.query(found[q.id].responses).messages,
                        # the same seed for every model: what differs is the model
                        derive_seed(self.seed, "benchmarks", q.id, turn),
                    )
                    for q in questions
                    if turn <= len(q.later) and not found[q.id].missing
                ]
                for i, given in answers(engine, asked, params, advance=bar.advance).items():
                    found[i] = found[i].then(given)
        return list(found.values())

    def _judge(
        self,
        judged: JudgedSet,
        questions: Sequence[Question],
        given: Mapping[str, Mapping[str, Answered]],
        judge: Judge,
    ) -> dict[str, Any]:
        """The column of a judged set."""
        first = next(iter(self.models))
        baseline: dict[str, str] = {}
        if judged.baseline is not None:
            baseline = read_baseline(judged, questions)
        elif judged.style != "mt-bench":
            baseline = {i: a.responses[0] for i, a in given[first].items() if not a.missing}
            given = {label: found for label, found in given.items() if label != first}
        seed = derive_seed(self.seed, "benchmarks", judged.name)
        return {
            "name": judged.name,
            "kind": judged.style,
            "judge": judge.name,
            "scale": getattr(judge, "scale", "1 to 10"),
            "against": judged.baseline or first,
            "models": judge_set(judged, questions, given, baseline, judge, seed),
        }

    def _cell(self, home: Path, label: str, name: str, made_of: Sequence[Any], suffix: str) -> Path:
        """The file of one model on one benchmark."""
        # by content: on a GPU the same recipe need not train the same model twice
        model = model_digest(str(self.models[label].path))
        key = digest(identity([model, self.loading, self.seed, *made_of]))
        folder, file = (re.sub(r"[^\w.-]+", "-", text).strip("-.") for text in (label, name))
        return home / "benchmarks" / folder / f"{file}-{key}{suffix}"


def _differences(
    columns: Sequence[Mapping[str, Any]], labels: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Each later model minus each earlier one, paired by question, of figures that are means."""
    out = []
    for column, figure in ((c, f) for c in columns for f in ("", "LC")):
        values = {m: f["values"].get(figure, {}) for m, f in column["models"].items()}
        for earlier, later in combinations([m for m in labels if m in values], 2):
            mine, theirs = values[later], values[earlier]
            both = sorted(mine.keys() & theirs.keys())
            if both:
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


def _without_values(column: Mapping[str, Any]) -> dict[str, Any]:
    """The column without the values and examples of its questions."""
    models = {
        model: {k: v for k, v in figures.items() if k not in ("values", "examples")}
        for model, figures in column["models"].items()
    }
    return {**column, "models": models}
