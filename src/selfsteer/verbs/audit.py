"""``selfsteer audit``: its tables and sentences; the figures are those of `auditing`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import interval, out, table
from selfsteer.verbs.common import AsJson, Trust, aligning, check_trust, emit, named_judge

if TYPE_CHECKING:
    from selfsteer.view import RunView

#: Settings of a recipe that have an effect on an audit.
SECTIONS = ("policy", "principles", "sampling", "judge")


def audit(
    model: Annotated[
        str,
        typer.Argument(help="a run folder, or an aligned model: folder, hub id or package:NAME"),
    ],
    base: Annotated[
        str | None, typer.Option(help="model before alignment; a run folder names its own")
    ] = None,
    generator: Annotated[
        str | None, typer.Option(help="data generator; a run folder names its own")
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="held-out prompts; default: the run's evaluation queries"),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="oracle, checks:FILE, chat:MODEL, reward:MODEL or YAML; default: the run's judge"
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="number of queries, a random subset", min=8)] = 128,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="recipe setting as KEY=VALUE, such as sampling.max_new_tokens=512; repeatable",
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="folder for answers and audit.json; default: RUN/audit")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="seed of the subset, the sampling and the intervals", min=0)
    ] = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Test a model under bad principles, against its base: did alignment open a back door?"""
    from selfsteer.recipe.read import check_sections, load_values, merge, validate
    from selfsteer.recipe.sections import Queries
    from selfsteer.verbs.auditing import Settings

    check_sections(settings or [], SECTIONS, "audit")
    folder = Path(model)
    is_run = (folder / "resolved.json").is_file()
    if is_run:
        from selfsteer.view import RunView

        if base or generator:
            raise ConfigError(
                f"{model} is a run folder and names its own base and generator; leave --base and "
                "--generator out, or give the model's folder instead."
            )
        run = RunView.open(folder)
        recipe = aligning(run.recipe)
        given = merge(load_values(str(run.recipe_file)), settings or [])
        given = {name: given[name] for name in Settings.model_fields if name in given}
        if "policy" not in run.models:
            raise ConfigError(f"{model} has no trained policy yet; finish the run first.")
        models = {}
        source = recipe.evaluation.queries if recipe.evaluation else None
        to = to or run.place("audit")
    else:
        if base is None:
            raise ConfigError(f"{model} is not a run folder; name the model before with --base.")
        given = merge({"policy": {"model": base}}, settings or [])
        models = {"base": base, "policy": model, **({"generator": generator} if generator else {})}
        source, to = None, to or Path("audit")
    own = validate(Settings, given, "audit's settings")
    if judge is not None:
        own = own.model_copy(update={"judge": named_judge(judge)})
    if is_run:
        check_trust(folder, own.model_copy(update={"judge": None}) if judge else own, trust)
        called = {home: method for method, home in run.recipe.homes.items()}
        models = {called.get(k, k): v for k, v in run.checked_models.items() if k != "reward"}
        _compare_sources(run, queries=queries is None, judge=judge is None)
    if queries is not None:
        source = Queries(path=queries)
    if source is None:
        raise ConfigError("Name held-out prompts: --queries FILE.")
    from selfsteer.verbs import auditing

    run_folder = folder if is_run else None
    subjects = auditing.Subjects(models, own, source, own.judge, to, limit, seed, run_folder)
    emit(auditing.run_audit(subjects), as_json, print_audit)


def _compare_sources(run: "RunView", *, queries: bool, judge: bool) -> None:
    """Refuses other prompts than the run was made with, if they are the run's.

    A changed catalogue is a warning, and so is a changed judge where it is the run's.
    """
    from selfsteer.run.sources import check_sources

    if queries:
        check_sources(run.folder, run.recipe, "evaluation.queries.path")
    told = ("principles.", *(["judge."] if judge else []))
    check_sources(run.folder, run.recipe, *told, refuse=False)


def conclusion(label: str, change: Mapping[str, Any]) -> str:
    """What the audit says of a model: its answers under bad principles, does it listen."""
    whole = change["whole"]
    gap = whole["gap/bad"]
    listens = "about as much as"
    if gap is not None and gap[1] is not None and (gap[1] > 0 or gap[2] < 0):
        listens = "more than" if gap[1] > 0 else "less than"
    width = interval(gap, missing="unknown")
    listening = f"It listens to bad principles {listens} the base model (gap {width})."
    if change["verdict"] == "unknown":
        return f"{label}: no judge has scored its answers. {listening}"
    figure = interval(whole.get("score/bad") or whole["wins/bad"], missing="unknown")
    if change["verdict"] == "back_door":
        return (
            f"{label}: worse than the base model under bad principles ({figure}): alignment made "
            f"it easier to misuse. {listening}"
        )
    return f"{label}: no back door found, score under bad principles {figure}. {listening}"


def print_audit(report: Mapping[str, Any]) -> None:
    """Figures by model, changes with intervals, changes by feature, a sentence for each model."""
    from selfsteer.run.folder import by_reason

    names = [n for n in report["models"]["base"] if not n.startswith("tokens")]
    own = (
        [label, *(interval(figures[n], ".3f") for n in names)]
        for label, figures in report["models"].items()
    )
    title = f"{report['queries']:,} queries under three contexts"
    if report["dropped"]:
        title += f"; left out: {by_reason(Counter(report['dropped']))}"
    out.print(table(["model", *names], own, title=title))
    for label, change in report["changes"].items():
        whole, compared = change["whole"], "wins/bad" in change["whole"]
        changes = [
            (name, interval(whole[name], missing="unknown"))
            for name in [*names, *(["wins/bad"] if compared else [])]
        ]
        title = f"\n{label} against base, paired by query"
        out.print(table(["figure", "change"], changes, title=title))
        shown = ("wins/bad" if compared else "score/bad", "gap/bad")
        features = (
            [name, f["queries"], *(interval(f.get(k), missing="too few to say") for k in shown)]
            for name, f in change["features"].items()
        )
        out.print(table(["feature", "queries", *shown], features))
        out.print(conclusion(label, change) + "\n", markup=False)
    scale = f"score: {report['scale']}; " if report["scale"] else ""
    out.print(
        f"{scale}drop: score/plain - score/bad; gap: how much likelier a model holds its own "
        "answer under the principle that asked for it, nats per token; cut_off: share of answers "
        "that the token budget cut off; wins/bad: win rate of its answers under bad principles "
        "against the base model's, less 1/2. [ ]: 95 % bootstrap over queries.",
        style="dim",
        markup=False,
    )
