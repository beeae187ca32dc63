"""``selfsteer check``: its lines, tables and last sentence; the checks are in `checks`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from selfsteer.terminal import interval, out
from selfsteer.verbs.common import AsJson, Overrides, RecipeName, aligning, load_recipe

if TYPE_CHECKING:
    from selfsteer.verbs.rehearsal import Line

STYLES = {"ok": "green", "warning": "yellow", "FAILED": "bold red", "skipped": "dim"}


def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    queries: Annotated[
        int, typer.Option(help="number of queries to measure steering on", min=2)
    ] = 64,
    as_json: AsJson = False,
) -> None:
    """Check whether a run can start and the policy can be steered; writes nothing.

    Checks folder, queries, model, template, budgets, disk and engine, then measures on a few
    queries whether the policy follows the principles. Exits with 0 if a run can start, even with
    warnings.
    """
    checked = aligning(load_recipe(recipe, overrides or [])[0])
    from selfsteer.verbs import checks

    figures = checks.check(checked, queries, (lambda line: None) if as_json else tell)
    if as_json:
        out.print_json(data=figures)
    else:
        out.print(f"\n{conclusion(figures)}")
    raise typer.Exit(figures["exit_code"])


def tell(line: "Line") -> None:
    """Prints a line as soon as it is known; what to do stands below."""
    style = STYLES[line.status]
    out.print(f"[{style}]{line.status:<8}[/{style}] {line.name:<10} {escape(line.found)}")
    for table in _tables(line.figures) if line.name == "steering" and line.figures else ():
        out.print(table)
    for todo in line.todo:
        out.print(f"{'':<19} [{style}]{escape(todo)}[/{style}]")


def _tables(figures: dict[str, Any]) -> tuple[Table, Table]:
    """Gaps of the whole, and of each feature sorted by gap; nats per token."""
    whole = _table("nats per token", "gap", "net gap")
    for half in ("good", "bad"):
        whole.add_row(half, interval(figures["gap"][half]), interval(figures["net_gap"][half]))
    features = _table("feature", "queries", "gap good", "bad", "adds to net gap", "accuracy")
    found = figures["features"].items()
    for name, f in sorted(found, key=lambda item: sum(item[1]["gap"].values()), reverse=True):
        features.add_row(
            escape(name),
            str(f["triples"]),
            f"{f['gap']['good']:+.3f}",
            f"{f['gap']['bad']:+.3f}",
            "too few to say" if f["adds"] is None else interval(f["adds"]),
            "" if f["accuracy"] is None else f"{f['accuracy']:.2f}",
        )
    return whole, features


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True, min_width=17)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def conclusion(figures: dict[str, Any]) -> str:
    """All checks in one sentence."""
    lines = figures["checks"]
    failed = [name for name, line in lines.items() if line["status"] == "FAILED"]
    if failed:
        return f"not ready: mend {', '.join(failed)}, then check again"
    warned = sum(line["status"] == "warning" for line in lines.values())
    count = f"{warned} warning{'s' * (warned != 1)}" if warned else "no warnings"
    if lines["steering"]["status"] == "skipped":
        return f"ready: this method needs no principles ({count})"
    if lines["steering"]["figures"]["steers"]:
        return f"ready: the policy steers ({count})"
    return f"it would run, but the policy does not steer ({count})"
