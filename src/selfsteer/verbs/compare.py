"""``selfsteer compare``: its tables and sentences; the figures are those of `comparing`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfsteer.errors import ConfigError
from selfsteer.terminal import interval, out
from selfsteer.verbs.common import AsJson


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="run folders; of a single one, its own models are compared")
    ],
    judge: Annotated[
        str | None,
        typer.Option(
            help="oracle, chat:MODEL, reward:MODEL or YAML; default: the first run's judge"
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="field of the evaluation queries that names their class")
    ] = None,
    examples: Annotated[
        int, typer.Option(help="number of queries to show where the answers differ most", min=0)
    ] = 3,
    baselines: Annotated[
        bool, typer.Option(help="also compare the base model and the baseline of each run")
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the intervals", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare runs: quality, curves, wins by feature and query class, largest differences."""
    from selfsteer.recipe.read import load_recipe, merge, validate
    from selfsteer.recipe.sections import JudgeConfig
    from selfsteer.verbs import comparing

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
        out.print_json(data=report)
    else:
        print_comparison(report, out)


def sentence(label: str, first: str, difference: Mapping[str, Any]) -> str:
    """One difference in words; undecided where the interval holds no difference."""
    figure = difference.get("score") or difference.get("win_rate")
    if figure is None:
        return f"{label} - {first}: no judge, so nobody says which is better."
    zero = 0.0 if "score" in difference else 0.5
    _, low, high = figure
    verdict = "undecided"
    if low is not None and low > zero:
        verdict = f"{label} is better"
    elif high is not None and high < zero:
        verdict = f"{first} is better"
    what = "in score" if "score" in difference else "win rate"
    return f"{label} - {first}: {interval(figure)} {what}, paired by query: {verdict}."


def print_comparison(report: Mapping[str, Any], console: Console) -> None:
    """Entrants, differences, classes, features, curves and the queries that differ most."""
    first = report["first"]
    title = f"{report['queries']:,} evaluation queries that all answered"
    table = _table(title, "model", "score", "tokens", "seconds")
    pairs = _table(
        "\ntheir training pairs",
        *("model", "accuracy", "on-policy chosen", "rejected", "gap good", "gap bad"),
    )
    for label, own in report["entrants"].items():
        score = interval(own["score"], ".3f") if own.get("score") else ""
        seconds = "" if own["seconds"] is None else f"{own['seconds']:.0f}"
        table.add_row(escape(label), escape(score), f"{own['tokens']:.1f}", seconds)
        if own["quality"]:
            q, gap = own["quality"], own["steering_gap"] or {}
            policyness = [q["on_policyness"][k] for k in ("chosen", "rejected")]
            figures = (q["accuracy"], *policyness, gap.get("good"), gap.get("bad"))
            pairs.add_row(escape(label), *("" if v is None else f"{v:.3f}" for v in figures))
    console.print(table)
    if pairs.row_count:
        console.print(pairs)
    for label, d in report["differences"].items():
        console.print(f"\n[bold]{escape(sentence(label, first, d))}[/bold]")
        rate = f"win rate {interval(d['win_rate'], '.3f')}; " if d.get("win_rate") else ""
        console.print(escape(f"{rate}tokens {interval(d['tokens'], '+.1f')}"))
        if "by_class" in d:
            by = _table("", report["class"], "queries", "difference")
            for name, figures in d["by_class"].items():
                value = figures["difference"]
                by.add_row(
                    escape(name),
                    str(figures["queries"]),
                    "too few to say" if value is None else escape(interval(value)),
                )
            console.print(by)
        for example in d.get("examples", ()):
            console.print(
                f"\n{example['difference']:+.2f}  {escape(example['query'])}", style="bold"
            )
            for name in (first, label):
                console.print(f"  {escape(name)}: {escape(example[name])}")
    features = sorted({f for figures in report["features"].values() for f in figures})
    if features:
        labels = [k for k, v in report["features"].items() if v]
        table = _table("\naccuracy of the training pairs by feature", "feature", *labels)
        for feature in features:
            cells = [report["features"][k].get(feature, {}).get("accuracy") for k in labels]
            table.add_row(
                escape(feature), *("" if v is None else escape(interval(v, ".3f")) for v in cells)
            )
        console.print(table)
    steps = ("start", "25 %", "50 %", "75 %", "end")
    table = _table("\nlast training of the policy, by its steps", "model", "figure", *steps)
    for label, own in report["entrants"].items():
        for name, values in own["curves"].items():
            table.add_row(escape(label), name, *(f"{v:.3f}" for v in values))
    if table.row_count:
        console.print(table)
    console.print(
        "accuracy, on-policy, gap: of the training pairs, see docs/method.md. [ ]: 95 % bootstrap "
        "over queries; training seeds vary more.",
        style="dim",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        left = i == 0 or name == "figure"
        table.add_column(escape(name), justify="left" if left else "right", no_wrap=True)
    return table
