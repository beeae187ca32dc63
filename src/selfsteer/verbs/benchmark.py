"""``selfsteer benchmark``: benchmarks of models or of a run's models, without a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out
from selfsteer.verbs.common import AsJson, Trust, aligning, check_trust

if TYPE_CHECKING:
    from selfsteer.evaluation.official import Official
    from selfsteer.run.stage import Artifact
    from selfsteer.stages.benchmark import RunBenchmarks
    from selfsteer.view import RunView


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            help="folders, hub ids, package:NAME or run folders; the others are compared with "
            "the first"
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(help="task of lm-evaluation-harness: a name or YAML; repeatable"),
    ] = None,
    task_folder: Annotated[
        list[str] | None, typer.Option(help="folder with tasks of your own; repeatable")
    ] = None,
    judged: Annotated[
        list[str] | None,
        typer.Option(
            help="questions to judge: alpaca-eval:FILE, arena-hard:FILE or mt-bench:FILE, or "
            "YAML with a baseline; repeatable"
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="judge of those questions: chat:MODEL, reward:MODEL, checks:FILE, oracle or a "
            "section as in a recipe"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="only the first N questions of each", min=1)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="recipe setting as KEY=VALUE, such as benchmarks.chat_template=false; repeatable",
        ),
    ] = None,
    to: Annotated[Path, typer.Option(help="folder for results; the same folder resumes")] = Path(
        "benchmarks"
    ),
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Benchmark models side by side: public tasks, your own tasks, judged question sets.

    Example: selfsteer benchmark BASE runs/mine/iteration-1/policy --task ifeval --task gsm8k
    """
    from selfsteer.run.folder import LEDGER, RunFolder

    if any((to / name).exists() for name in (LEDGER, "resolved.json")):
        raise ConfigError(
            f"{to} is a run folder, and a run would take these results for its own. Give another "
            "folder: --to benchmarks."
        )
    named = {"tasks": task, "task_folders": task_folder, "judged": judged}
    given = [f"benchmarks.{k}={v}" for k, v in (("judge", judge), ("limit", limit)) if v]
    stage = _stage(models, named, [*given, *(settings or [])], trust)
    list(stage.check())
    folder = RunFolder(to)
    with folder.locked("folder with --to"):
        stage.run(folder)
    if as_json:
        out.print_json((to / "benchmarks.json").read_text("utf-8"))
    else:
        out.print((to / "benchmarks.md").read_text("utf-8"), markup=False, end="")


def _stage(
    models: list[str], named: dict[str, list[str] | None], settings: list[str], trust: bool
) -> "RunBenchmarks":
    """These benchmarks, with the settings of the first run's recipe if it is a run."""
    from selfsteer.recipe.read import check_sections, load_values, merge, typed, validate
    from selfsteer.recipe.sections import BenchmarkConfig
    from selfsteer.run.folder import recipe_file
    from selfsteer.run.sources import check_sources
    from selfsteer.stages.benchmark import RunBenchmarks
    from selfsteer.view import RunView

    sections = tuple(BenchmarkConfig.model_fields)
    check_sections(settings, sections, "benchmark")
    recipe = recipe_file(Path(models[0]))
    values = load_values(str(recipe)) if recipe.is_file() else {"policy": {"model": models[0]}}
    given = {name: value for name, value in values.items() if name in sections}
    given["benchmarks"] = {k: [typed(v) for v in vs] for k, vs in named.items() if vs}
    own = validate(BenchmarkConfig, merge(given, settings), "settings of benchmark")
    if recipe.is_file():
        check_trust(recipe.parent, own, trust)
        if own.benchmarks.judge is None:
            whole = RunView.open(recipe.parent).recipe
            check_sources(recipe.parent, whole, "judge.", refuse=False)
    judge = own.benchmarks.judge or own.judge
    rows, loading = _rows(models), own.policy.loading
    return RunBenchmarks(rows, own.benchmarks, judge, own.sampling, seed=own.seed, loading=loading)


def _rows(named: list[str]) -> "dict[str, Artifact]":
    """Row → model; a run folder is its base, baseline and policy."""
    from selfsteer.models.sources import check_source
    from selfsteer.recipe.sections import resolve_path
    from selfsteer.run.stage import Artifact
    from selfsteer.view import RunView

    rows: dict[str, Artifact] = {}
    for name in named:
        source = resolve_path(name)
        if (Path(source) / "resolved.json").is_file():
            found = run_models(RunView.open(Path(source)))
            if len(named) > 1:
                found = {f"{name}/{label}": path for label, path in found.items()}
        else:
            check_source(source)
            found = {name: Artifact(Path(source))}
        twice = sorted(found.keys() & rows.keys())
        if twice:
            raise ConfigError(f"{twice[0]} is named twice.")
        rows |= found
    return rows


def run_models(run: "RunView") -> "dict[str, Artifact]":
    """Label → model of a run: ``base``, its baselines and its own policy.

    Raises:
        ConfigError: the run has not trained its policy yet.
    """
    from selfsteer.recipe.sections import resolve_path
    from selfsteer.run.stage import Artifact

    found = run.checked_models
    if "policy" not in found:
        raise ConfigError(f"{run.folder} has no trained policy yet; finish the run first.")
    own, *others = run.recipe.homes.items()
    labels = {"base": "base", **{home: method for method, home in others}, "policy": own[0]}
    return {
        label: Artifact(Path(resolve_path(found[kind])))
        for kind, label in labels.items()
        if kind in found
    }


def export_answers(run: "RunView", style: str, questions: Path | None, to: Path) -> "Official":
    """Writes what a run's models answer to a question set for the official tool of a style.

    Answers that the run has stored are used; others are sampled now, as its benchmarks would be,
    and stored in the run.

    Args:
        run: with a trained policy.
        style: one of `selfsteer.evaluation.official.FILES`.
        questions: the tool's question file; None: the set of that style that the run has judged.
        to: made if need be.

    Raises:
        ConfigError: no question file is named, and the run has judged no set of that style, or
            several.
    """
    from selfsteer.evaluation.official import write_official
    from selfsteer.recipe.sections import Benchmarks, JudgedSet
    from selfsteer.run.folder import RunFolder
    from selfsteer.stages.benchmark import RunBenchmarks

    recipe = aligning(run.recipe)
    sets = [s for s in recipe.benchmarks.judged if s.style == style] if recipe.benchmarks else []
    if questions is not None:
        sets = [JudgedSet.model_validate(f"{style}:{questions}")]
    if len(sets) != 1:
        raise ConfigError(
            f"{run.folder} has judged {len(sets)} sets in style {style}. Name the questions: "
            "--questions FILE."
        )
    settings = recipe.benchmarks or Benchmarks(judged=tuple(sets))
    stage = RunBenchmarks(
        run_models(run),
        settings.model_copy(update={"limit": None}),
        None,
        recipe.sampling,
        seed=recipe.seed,
        loading=recipe.policy.loading,
    )
    for name in ("benchmarks", "usage", "batches", "logs"):
        run.place(name)
    with RunFolder(run.folder).locked():
        asked, given = stage.answers(sets[0], run.folder, {})
    named = {f"{recipe.name}-{label}": found for label, found in given.items()}
    return write_official(style, asked, named, to)
