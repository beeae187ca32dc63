"""``selfsteer judge``: what one or two judges say of stored preferences."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfsteer.errors import ConfigError
from selfsteer.terminal import interval, out
from selfsteer.verbs.common import AsJson, aligning, load_recipe


def judge(
    preferences: Annotated[
        Path,
        typer.Argument(help="a run folder, or preferences in a JSONL file or a folder of shards"),
    ],
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="oracle, chat:MODEL, reward:MODEL, human:FILE or YAML; one or two; default: "
            "the run's judge",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="judge a random subset of this size", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the subset and of the intervals")] = 0,
    iteration: Annotated[
        int | None, typer.Option(help="iteration of the run; default: the last one")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="judge the baseline's preferences")] = False,
    store: Annotated[
        Path | None, typer.Option(help="folder for the judges' answers; default: that of the run")
    ] = None,
    label_sheet: Annotated[
        Path | None,
        typer.Option(help="judge nothing: write the pairs to a file, to label them by hand"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge preferences: verdicts, accuracy, position bias and cost; agreement of two judges."""
    from selfsteer.recipe.read import merge, validate
    from selfsteer.recipe.sections import JudgeConfig
    from selfsteer.run.folder import RunFolder

    if label_sheet is not None and (judges or as_json or store):
        raise ConfigError("--label-sheet judges nothing; leave --judge, --store and --json out.")
    given = [
        validate(JudgeConfig, merge({}, [f"judge={j}"]).get("judge", j), f"judge {j}")
        for j in judges or []
    ]
    if len(given) > 2:
        raise ConfigError(f"Give one judge or two, found {len(given)}.")
    source, is_run = preferences, (preferences / "recipe.yaml").is_file()
    if is_run:
        recipe = aligning(load_recipe(str(preferences), [])[0])
        k = recipe.iterations if iteration is None else iteration
        source = RunFolder(preferences).iteration(k, baseline=baseline) / "preferences"
        store = store or preferences / "judgements"
        given = given or ([recipe.judge] if recipe.judge else [])
    elif iteration is not None or baseline:
        raise ConfigError(f"--iteration and --baseline need a run folder; {preferences} is none.")
    if not given and label_sheet is None:
        raise ConfigError("Name a judge: --judge oracle, chat:MODEL, reward:MODEL or human:PATH.")
    from selfsteer.verbs.judging import judge_preferences, load_preferences, pick, write_label_sheet

    chosen = pick(load_preferences(source), limit, seed)
    if label_sheet is not None:
        count = write_label_sheet(chosen, label_sheet, seed)
        out.print(
            f"{label_sheet}: {count:,} pairs. Set each verdict to first, second or tie, then: "
            f"selfsteer judge {preferences} --judge human:{label_sheet}"
        )
        return
    # answers are added to the run folder, so no other process may work in it
    with RunFolder(preferences).locked() if is_run else nullcontext():
        report = judge_preferences(chosen, given, store, seed)
    if as_json:
        out.print_json(data=report)
    else:
        print_judges(report, out)


def print_judges(report: dict[str, Any], console: Console) -> None:
    """Verdict classes, accuracy, position bias and cost of each judge; agreement of two."""
    table = Table(
        title=f"{report['pairs']:,} pairs, first is the chosen response", box=None, padding=(0, 1)
    )
    table.title_justify = "left"
    table.add_column("")
    columns = report["judges"]
    for judge in columns:
        table.add_column(escape(judge["name"]), justify="right")
    for verdict in columns[0]["verdicts"]:
        table.add_row(verdict, *(f"{c['verdicts'][verdict]:,}" for c in columns))
    reasons = sorted({reason for c in columns for reason in c["unparseable_because"]})
    for reason in reasons:
        counts = (c["unparseable_because"].get(reason, 0) for c in columns)
        table.add_row(f"  {reason}", *(f"{n:,}" for n in counts), style="dim")
    table.add_row("accuracy", *(_share(c["accuracy"]) for c in columns))
    bias = [c["position"] and c["position"]["shown_first_wins"] for c in columns]
    table.add_row("shown first wins", *map(_share, bias))
    for key, label in (
        ("prompt_tokens", "tokens in"),
        ("completion_tokens", "tokens out"),
    ):
        table.add_row(label, *(f"{c['cost'][key]:,}" for c in columns))
    table.add_row("seconds", *(f"{c['cost']['seconds']:,.1f}" for c in columns))
    console.print(table)
    console.print(
        "accuracy: (first + ½ (tie + inconsistent)) / all but unparseable; shown first wins: of "
        "the showings with a winner, 0.5 is no bias; -: none.",
        style="dim",
    )
    if "agreement" in report:
        names = [judge["name"] for judge in columns]
        _print_agreement(report["agreement"], *names, console=console)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _kappa(value: list[float | None] | None) -> str:
    if value is None:
        return "undefined (one class alone leaves nothing to agree on beyond chance)"
    return interval(value, ".3f")


def _print_agreement(found: dict[str, Any], rows: str, columns: str, *, console: Console) -> None:
    table = Table(
        title=f"\nrows {escape(rows)}, columns {escape(columns)}", box=None, padding=(0, 1)
    )
    table.title_justify = "left"
    table.add_column("")
    for name in found["classes"]:
        table.add_column(name, justify="right")
    for name, counts in zip(found["classes"], found["table"], strict=True):
        table.add_row(name, *(f"{n:,}" for n in counts))
    console.print(table)
    console.print(
        f"same verdict {_share(found['same'])}; Cohen's kappa {_kappa(found['kappa'])}; over the "
        f"{found['parsed']['pairs']:,} pairs that both judged {_kappa(found['parsed']['kappa'])}",
        markup=False,
    )
    console.print("[ ]: 95 % bootstrap over pairs.", style="dim", markup=False)
