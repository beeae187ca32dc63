"""What `selfsteer judge` prints: a column per judge, and the table of two judges' verdicts."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfsteer.terminal import interval


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
