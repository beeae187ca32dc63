"""A run in the terminal: result, stages, drops, data quality, where the models are.

Only JSON is read, so that showing a run takes no time.
"""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from selfsteer.evaluation.benchmark_table import markdown
from selfsteer.principles.contexts import CONTEXTS
from selfsteer.report import tables
from selfsteer.terminal import interval, out
from selfsteer.view import Example, Exhibit, RunView


def print_result(run: RunView) -> None:
    """The closing summary of a run."""
    if run.evaluation is not None:
        tables.results(run).print()
        tables.models(run).print()
        tables.rules(run).print()
        if text := tables.sentence(run) or tables.worse_rules(run):
            out.print(f"\n{escape(text)}")
        out.print(
            f"score: {escape(run.evaluation.score_scale or 'none')}. "
            + (
                "on-policy: mean probability per token of the training pairs under the policy "
                "before training. "
                if run.stage("MeasureQuality")
                else ""
            )
            + "[ ]: 95 % bootstrap.",
            style="dim",
        )
    for sheet in tables.reward(run):
        sheet.print()
    if run.reward and not run.reward.held_out.pairs:
        out.print("No pairs were held out, so the accuracy of the reward model is unknown.")
    elif run.reward and (longer := run.reward.held_out.longer_is_chosen):
        said = interval(longer, ".3f")
        out.print(f"preferring the longer response would score {said}", markup=False)
    if run.benchmarks:
        out.print(f"\n{markdown(run.benchmarks)}", markup=False, end="")
    if run.evaluation and run.evaluation.example:
        _print_example(run.evaluation.example)
    if run.exhibit:
        _print_exhibit(run.exhibit)


def _print_example(shown: Example) -> None:
    title = f"\nBefore and after, where the score rose most: {escape(shown.query)}"
    table = Table(title=title, title_justify="left")
    for label, score in shown.scores.items():
        table.add_column(f"{escape(label.partition('/')[0])}, score {score:.3g}", ratio=1)
    table.add_row(*map(escape, shown.answers.values()))
    out.print(table)


def _print_exhibit(shown: Exhibit) -> None:
    table = Table(title=f"\nWhat steering looks like: {escape(shown.query)}", show_lines=True)
    table.title_justify = "left"
    table.add_column("context")
    for name in shown.responses:
        table.add_column(name, ratio=1)
    for context in CONTEXTS:
        table.add_row(context, *(escape(r[context]) for r in shown.responses.values()))
    out.print(table)
    for side in ("good", "bad"):
        text = f"{f'{side} principle:':<15} {shown.principles[side]}"
        out.print(escape(text), style="dim")


def print_show(run: RunView) -> None:
    """Stages, counts, drops by reason, quality, models, and the result."""
    out.print(f"[bold]{escape(str(run.folder))}[/bold]  {tables.about(run)}")
    tables.stages(run).print()
    for stage in run.stages:
        for line in _remarks(stage.notes):
            out.print(f"{stage.name}: {line}", markup=False)
    for name, text in tables.warnings(run).rows:
        out.print(escape(f"warning: {name}: {text}"), style="yellow")
    for table in (tables.quality, tables.verdicts, tables.lengths, tables.tokens):
        table(run).print()
    if run.models:
        out.print("\n[bold]Models[/bold]")
        longest = max(map(len, run.models))
    for label, source in run.models.items():
        out.print(f"{label:<{longest}}  {escape(source)}")
    print_result(run)


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    """What a stage noted that its counts do not say."""
    out = []
    for name, figures in notes.get("diversity", {}).items():
        shown = ", ".join(f"{k.replace('_', '-')} {v:.3f}" for k, v in figures.items())
        out.append(f"diversity of the queries {name} augmentation: {shown}")
    tries = {"first_try": "first try", "retry": "retry", "sources": "in the end"}
    written = [f"{said} {tables.counts(notes[key])}" for key, said in tries.items() if key in notes]
    if len(written) > 1:
        out.append("; ".join(written))
    elif written:
        out.append(tables.counts(notes["sources"]))  # picked or fixed: nothing was tried
    if "selection" in notes:
        out.append(notes["selection"]["text"])
    if "entries" in notes:
        out.append(
            f"{notes['entries']:.1f} entries a token cover {notes['covered']:.3f} of the mass; "
            f"the good principle makes a token {notes['reward']:+.3f} nats likelier than the "
            "bad one"
        )
    survivors = notes.get("survivors", {})
    if len(survivors) > 3:  # more than hygiene and lengths
        out.append(tables.counts(survivors))
    return out
