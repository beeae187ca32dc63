"""``selfsteer benchmark``: benchmarks of models or of a run's models, without a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.verbs.common import AsJson

#: Settings of a recipe that have an effect here.
SECTIONS = ("benchmarks", "policy", "sampling", "judge", "seed")


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
        typer.Option(help="judge of those questions: chat:MODEL, reward:MODEL or oracle"),
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
    as_json: AsJson = False,
) -> None:
    """Benchmark models side by side: public tasks, your own tasks, judged question sets.

    Example: selfsteer benchmark BASE runs/mine/iteration-1/policy --task ifeval --task gsm8k
    """
    from selfsteer.terminal import out

    named = {"tasks": task, "task_folders": task_folder, "judged": judged}
    given = [f"benchmarks.{k}={v}" for k, v in (("judge", judge), ("limit", limit)) if v]
    setup = _setup(models[0], named, [*given, *(settings or [])])
    rows = _rows(models)
    from selfsteer.data.digests import model_digest
    from selfsteer.run.folder import RunFolder
    from selfsteer.stages.benchmarking import Contestant, benchmark, check_benchmarks

    check_benchmarks(setup.settings, setup.judge)
    contestants = [Contestant(label, s, model_digest(s)) for label, s in rows.items()]
    with RunFolder(to).locked():
        benchmark(contestants, setup, to)
    if as_json:
        out.print_json((to / "benchmarks.json").read_text("utf-8"))
    else:
        out.print((to / "benchmarks.md").read_text("utf-8"), markup=False, end="")


def _setup(first: str, named: dict[str, list[str] | None], settings: list[str]) -> Any:
    """These benchmarks, with the settings of the first run's recipe where it is a run."""
    from selfsteer.recipe.read import check_sections, load_values, merge, read_yaml, validate
    from selfsteer.stages.benchmarking import Settings, Setup

    check_sections(settings, SECTIONS, "benchmark")
    recipe = Path(first) / "recipe.yaml"
    given: dict[str, Any] = {"policy": {"model": first}}
    if recipe.is_file():
        values = load_values(str(recipe))
        given = {name: values[name] for name in Settings.model_fields if name in values}
    given["benchmarks"] = {
        k: [read_yaml(v) for v in values] for k, values in named.items() if values
    }
    own = validate(Settings, merge(given, settings), "settings of benchmark")
    judge = own.benchmarks.judge or own.judge
    return Setup(own.benchmarks, judge, own.sampling, own.policy.loading, own.seed)


def _rows(named: list[str]) -> dict[str, str]:
    """Row → model; a run folder is its base, baseline and policy."""
    from selfsteer.errors import ConfigError
    from selfsteer.models.load import check_source
    from selfsteer.recipe.sections import resolve_path
    from selfsteer.report import summary

    rows: dict[str, str] = {}
    for name in named:
        source = resolve_path(name)
        if not (Path(source) / "resolved.json").is_file():
            check_source(source)
            found = {name: source}
        else:
            made = summary.load(Path(source))
            models, method = made["models"], made["recipe"]["method"]
            if "policy" not in models:
                raise ConfigError(f"{name} has no trained policy yet; finish the run first.")
            found = {"base": resolve_path(models["base"])}
            for label, kind in ((made["recipe"]["baseline"], "baseline"), (method, "policy")):
                if kind in models:
                    found[label] = models[kind]
            if len(named) > 1:
                found = {f"{name}/{label}": path for label, path in found.items()}
        twice = sorted(found.keys() & rows.keys())
        if twice:
            raise ConfigError(f"{twice[0]} is named twice.")
        rows |= found
    return rows
