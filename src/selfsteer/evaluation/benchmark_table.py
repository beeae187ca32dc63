"""The benchmark report as a markdown table, models by benchmarks, like SSO v2's table 1."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from selfsteer.models.reasoning import UNFINISHED_REASONING
from selfsteer.terminal import interval


class Column(NamedTuple):
    """One figure of one benchmark: its heading, a cell per model, and how its numbers read."""

    heading: str
    cells: dict[str, str]
    scale: float
    form: str


def tables(report: Mapping[str, Any]) -> list[list[list[str]]]:
    """Models by benchmarks, and paired differences if there are any; the head comes first.

    Args:
        report: what ``benchmarks.json`` holds.
    """
    columns = {
        (found["name"], figure): column
        for found in report["benchmarks"]
        for figure, column in _columns(found)
    }
    rows = [["model", *(c.heading for c in columns.values())]]
    rows += [
        [model, *(c.cells.get(model, "") for c in columns.values())] for model in report["models"]
    ]
    differences = [["paired by question", "models", "questions", "difference"]]
    for d in report["differences"]:
        column = columns.get((d["benchmark"], d["figure"]))
        if column is not None:
            said = _scaled(d["difference"], column.scale, f"+{column.form}")
            models = " - ".join(d["of"])
            differences.append([column.heading, models, f"{d['questions']:,}", said])
    return [rows, differences] if len(differences) > 1 else [rows]


def notes(report: Mapping[str, Any]) -> list[str]:
    """What one must know to read the tables."""
    found = [note for column in report["benchmarks"] for note in _notes(column)]
    if report["limit"] is not None:
        found.append(f"only the first {report['limit']:,} questions of each task or set")
    return [*found, "±: standard error; [ ]: 95 % bootstrap over questions; rates in percent"]


def markdown(report: Mapping[str, Any]) -> str:
    """Tables and notes.

    Args:
        report: what ``benchmarks.json`` holds.
    """
    lines = []
    for rows in tables(report):
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        drawn = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
        lines += [drawn[0], rule, *drawn[1:], ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(report)), ""])


def _columns(found: Mapping[str, Any]) -> Iterator[tuple[str, Column]]:
    """The figures of a benchmark: ``""``, or ``LC`` for the length-controlled one."""
    name, models = found["name"], found["models"]
    if found["kind"] == "task":
        # bits per byte may be below 1 as well, but are no share of anything
        share = all(
            0 <= f["score"] <= 1 and f.get("higher_is_better") is not False for f in models.values()
        )
        scale, form = (100.0, ".1f") if share else (1.0, ".3f")
        errors = {m: _scaled(f["stderr"], scale, form) for m, f in models.items()}
        cells = {m: _scaled(f["score"], scale, form) for m, f in models.items()}
        with_errors = {m: f"{c} ± {errors[m]}" if errors[m] else c for m, c in cells.items()}
        yield "", Column(name, with_errors, scale, form)
    elif found["kind"] == "mt-bench":
        cells = {m: _scaled(f["score"], 1.0, ".2f", "-") for m, f in models.items()}
        yield "", Column(name, cells, 1.0, ".2f")
    else:
        for figure in ("LC", "") if found["kind"] == "alpaca-eval" else ("",):
            of = {m: f.get("length_controlled", {}) if figure else f for m, f in models.items()}
            cells = {m: _scaled(f.get("win_rate"), 100.0, ".1f", "-") for m, f in of.items()}
            heading = f"{name} {figure} win rate" if figure else f"{name} win rate"
            yield figure, Column(heading, {found["against"]: "baseline", **cells}, 100.0, ".1f")


def _scaled(
    value: float | Sequence[float | None] | None, scale: float, form: str, missing: str = ""
) -> str:
    values = [value] if isinstance(value, float | int) else value
    scaled = values and [None if v is None else v * scale for v in values]
    return interval(scaled, form, missing)


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What one must know to read a benchmark's column."""
    name, models = found["name"], found["models"]
    if found["kind"] == "task":
        first = next(iter(models.values()))
        metric = first["metric"].removesuffix(",none")
        yield f"{name}: {metric}, {first['questions']:,} questions"
        for model, f in models.items():
            if thoughts := f.get(UNFINISHED_REASONING):
                yield f"{name}, {model}: {thoughts:,} answers end within the model's thoughts"
            if f["truncated"]:
                yield f"{name}, {model}: {f['truncated']:,} prompts cut"
        return
    rated = found["kind"] == "mt-bench"
    how = f"scale {found['scale']}" if rated else f"against {found['against']}"
    yield f"{name}: {found['kind']} style, judge {found['judge']}, {how}"
    for model, f in models.items():
        yield f"{name}, {model}: {_ratings(f) if rated else _lengths(f)}"
        if f["dropped"]:
            drops = ", ".join(f"{n:,} {why}" for why, n in f["dropped"].items())
            yield f"{name}, {model}: not judged: {drops}"


def _ratings(figures: Mapping[str, Any]) -> str:
    turns = {f"turn {k}": v for k, v in figures["turns"].items()} | figures["categories"]
    return ", ".join(f"{k} {v[0]:.2f}" for k, v in turns.items()) or "no rating"


def _lengths(figures: Mapping[str, Any]) -> str:
    if figures["characters"] is None:
        return "nothing was compared"
    mine, theirs = figures["characters"]
    text = f"{mine:,.0f} characters per answer, the baseline's {theirs:,.0f}"
    controlled = figures.get("length_controlled", {})
    if controlled.get("length_effect"):
        text += f"; length effect {interval(controlled['length_effect'], '+.2f')}"
        text += f", instruction term from {controlled['difficulty_from']}"
    if controlled.get("reason"):
        text += f"; no length control: {controlled['reason']}"
    return text
