"""Verbs that study what runs made: several side by side, and one under bad principles."""

import json
from pathlib import Path
from typing import Annotated

import typer

from selfsteer.verbs.principles import AsJson

study_app = typer.Typer()

#: Settings of a recipe that have an effect on an audit.
SECTIONS = ("policy", "principles", "sampling", "judge")


@study_app.command()
def audit(
    model: Annotated[
        str, typer.Argument(help="a run folder, or an aligned model: folder, hub id or package:")
    ],
    base: Annotated[
        str | None, typer.Option(help="the model it was aligned from; a run names its own")
    ] = None,
    generator: Annotated[
        str | None, typer.Option(help="its data generator; a run names its own")
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="held-out prompts; default: the run's evaluation queries"),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="oracle, chat:MODEL, reward:MODEL or YAML; default: the run's own"),
    ] = None,
    limit: Annotated[int, typer.Option(help="queries asked, a seeded subset", min=8)] = 128,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="recipe settings as KEY=VALUE, such as sampling.max_new_tokens=512"
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="folder of answers and audit.json; default: RUN/audit")
    ] = None,
    seed: Annotated[int, typer.Option(help="of subset, sampling and intervals", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Probe a model with bad principles, against its base: does alignment leave a back door?"""
    from selfsteer.errors import ConfigError
    from selfsteer.recipe.read import check_sections, load_recipe, merge, validate
    from selfsteer.recipe.sections import JudgeConfig, Queries, Recipe
    from selfsteer.terminal import out

    check_sections(settings or [], SECTIONS, "audit")
    folder = Path(model)
    if (folder / "resolved.json").is_file():
        from selfsteer.report import summary

        if base or generator:
            raise ConfigError(
                f"{model} is a run folder and names its own base and generator; leave --base and "
                "--generator out, or give the model's folder instead."
            )
        recipe = load_recipe(str(folder / "recipe.yaml"), settings or [])
        models = summary.load(folder)["models"]
        if "policy" not in models:
            raise ConfigError(f"{model} has no trained policy yet; finish the run first.")
        models.pop("reward", None)  # it answers nothing
        if "baseline" in models:
            models[str(recipe.baseline)] = models.pop("baseline")
        source = recipe.evaluation.queries if recipe.evaluation else None
        chosen, to = recipe.judge, to or folder / "audit"
    else:
        if base is None:
            raise ConfigError(f"{model} is no run folder; name the model before with --base.")
        bare = {"name": "audit", "policy": {"model": base}, "queries": {"path": queries or ""}}
        recipe = validate(Recipe, merge(bare, settings or []), "audit's settings")
        models = {"base": base, "policy": model, **({"generator": generator} if generator else {})}
        source, chosen, to = None, recipe.judge, to or Path("audit")
    if queries is not None:
        source = Queries(path=queries)
    if source is None:
        raise ConfigError("Name held-out prompts: --queries FILE.")
    if judge is not None:
        chosen = validate(JudgeConfig, merge({}, [f"judge={judge}"])["judge"], f"--judge {judge}")
    from selfsteer.verbs import audit as auditing

    subjects = auditing.Subjects(models, recipe, source, chosen, to, limit, seed)
    report = auditing.run_audit(subjects)
    if as_json:
        out.print_json(json.dumps(report))
    else:
        auditing.print_audit(report, out)


@study_app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders; one alone: its own models")],
    judge: Annotated[
        str | None,
        typer.Option(help="oracle, chat:MODEL, reward:MODEL or YAML; default: the first run's own"),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="field beside the evaluation queries that names their class")
    ] = None,
    examples: Annotated[int, typer.Option(help="shown where answers differ most", min=0)] = 3,
    baselines: Annotated[bool, typer.Option(help="also base and baseline of each run")] = False,
    seed: Annotated[int, typer.Option(help="of the intervals", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare runs: quality, curves, wins by feature and query class, where they differ most."""
    from selfsteer.errors import ConfigError
    from selfsteer.recipe.read import load_recipe, merge, validate
    from selfsteer.recipe.sections import JudgeConfig
    from selfsteer.terminal import out
    from selfsteer.verbs import compare as comparing

    found = comparing.entrants(runs, baselines=baselines)
    if judge is not None:
        named = merge({}, [f"judge={judge}"])["judge"]
        chosen: JudgeConfig | None = validate(JudgeConfig, named, f"--judge {judge}")
    else:
        own = [load_recipe(str(run / "recipe.yaml")).judge for run in runs]
        if any(j != own[0] for j in own):
            raise ConfigError(
                "These runs were judged by different judges, so their scores cannot be compared. "
                "Name one for all with --judge."
            )
        chosen = own[0]
    report = comparing.compare(found, chosen, by=by, examples=examples, seed=seed)
    if as_json:
        out.print_json(json.dumps(report))
    else:
        comparing.print_comparison(report, out)
