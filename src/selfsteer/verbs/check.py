"""``selfsteer check``: its lines, tables and last sentence; the checks are in `checks`."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from selfsteer.errors import listed
from selfsteer.terminal import interval, out, say, table
from selfsteer.verbs.common import AsJson, Overrides, RecipeName, Trust, aligning, emit, load_recipe

if TYPE_CHECKING:
    from selfsteer.verbs.checks import Line

STYLES = {"ok": "green", "warning": "yellow", "FAILED": "bold red", "skipped": "dim"}


def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    queries: Annotated[int, typer.Option(help="most queries to measure steering on", min=2)] = 64,
    minutes: Annotated[
        float, typer.Option(help="minutes after which no more queries are measured", min=0)
    ] = 3,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Check whether a run can start and the policy can be steered; writes nothing.

    Checks folder, queries, model, template, budgets, disk and engine, then measures on a few
    queries whether the policy follows the principles, and on more until that is certain or the
    time is up. Exits with 0 if a run can start, even with warnings.
    """
    checked = aligning(load_recipe(recipe, overrides or [], trust=trust)[0])
    from selfsteer.verbs import checks

    figures = checks.check(checked, queries, minutes, (lambda line: None) if as_json else tell)
    emit(figures, as_json, lambda _: out.print(f"\n{conclusion(figures)}"))
    if not as_json and figures["exit_code"] == 0:
        say(f"see it: {shlex.join(['selfsteer', 'preview', recipe, *(overrides or [])])}")
    raise typer.Exit(figures["exit_code"])


def tell(line: "Line") -> None:
    """Prints a line as soon as it is known; what to do stands below."""
    style = STYLES[line.status]
    out.print(f"[{style}]{line.status:<8}[/{style}] {line.name:<10} {escape(line.found)}")
    drawn = {"steering": _tables, "rules": _rules}.get(line.name)
    for made in drawn(line.figures) if drawn and line.figures else ():
        out.print(made)
    for todo in line.todo:
        out.print(f"{'':<19} [{style}]{escape(todo)}[/{style}]")


def _tables(figures: dict[str, Any]) -> tuple[Table, Table]:
    """Gaps of the whole, and of each feature sorted by gap; nats per token."""
    halves = ("good", "bad")
    whole = ([h, interval(figures["gap"][h]), interval(figures["net_gap"][h])] for h in halves)
    found = sorted(figures["features"].items(), key=lambda i: sum(i[1]["gap"].values()))
    # every principle holds all of them: more queries would not tell them apart
    together = len(found) > 1 and all(f["triples"] == figures["triples"] for _, f in found)
    features = (
        [
            name,
            f["triples"],
            *(interval(f["gap"][h]) for h in halves),
            "not separable" if together else interval(f["adds"], missing="too few to say"),
            interval(f["accuracy"], ".2f"),
        ]
        for name, f in reversed(found)
    )
    names = ("feature", "queries", "gap good", "bad", "adds to net gap", "accuracy")
    of_both = table(["", "gap", "net gap"], whole, title="steering, in nats per token")
    return of_both, table(names, features)


def _rules(figures: dict[str, Any]) -> tuple[Table]:
    """Shares of plain and good answers that keep each rule."""
    rows = (
        [
            rule,
            f["queries"],
            interval(f["plain"], ".2f"),
            interval(f["good"], ".2f"),
            interval(f["gain"], "+.2f"),
        ]
        for rule, f in figures["rules"].items()
    )
    title = "share of the answers that keep each rule, where the principle names its feature"
    return (table(["rule", "queries", "plain", "good", "gain"], rows, title=title),)


def conclusion(figures: dict[str, Any]) -> str:
    """All checks in one sentence."""
    lines = figures["checks"]
    failed = [name for name, line in lines.items() if line["status"] == "FAILED"]
    if failed:
        return f"not ready: fix {', '.join(failed)}, then check again"
    warned = sum(line["status"] == "warning" for line in lines.values())
    count = f"{warned} warning{'s' * (warned != 1)}" if warned else "no warnings"
    if lines["steering"]["status"] == "skipped":
        return f"ready: this method needs no principles ({count})"
    found = lines["steering"]["figures"]
    on = f"{found['triples']} queries"
    if found["undecided"]:
        return f"it would run; {on} do not say whether the policy steers ({count})"
    if not found["steers"]:
        return f"it would run, but the policy does not steer on {on} ({count})"
    weak = [name for name, f in found["features"].items() if f["steers"] is False]
    weak += lines.get("rules", {}).get("figures", {}).get("missing", ())
    steers = f"the policy steers on {on}" + f", but not by {listed(weak)}" * bool(weak)
    ranking = lines["ranking"]
    if ranking["status"] == "warning" and ranking["figures"]["decides"]:
        pairs = f"{ranking['figures']['decided']} pairs of plain answers"
        return f"it would run; {steers}, but the principles do not rank {pairs} ({count})"
    return f"ready: {steers} ({count})"
