"""``selfsteer preview``: a few queries all the way to what would be trained on."""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from selfsteer import stopping
from selfsteer.errors import ConfigError
from selfsteer.report.colours import LEVELS, level
from selfsteer.terminal import CONTROL, out, say
from selfsteer.verbs.common import AsJson, Overrides, RecipeName, Trust, aligning, emit, load_recipe

if TYPE_CHECKING:
    from selfsteer.verbs.previewing import Answer, Preview, Row

#: Characters of an answer on the terminal; the page has all of it.
MOST = 1200

STYLES = {
    1: ("cyan", "bold cyan", "bold black on cyan"),
    -1: ("yellow", "bold yellow", "bold black on yellow"),
}


def preview(
    recipe: RecipeName,
    overrides: Overrides = None,
    queries: Annotated[int, typer.Option("--queries", "-n", help="queries to show", min=1)] = 5,
    to: Annotated[Path | None, typer.Option(help="folder to keep the page in")] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what would be trained on: a few queries, their principles, answers, scores and drops.

    Runs the recipe's own stages up to the first training, in a temporary folder. Nothing is
    trained and nothing is left in the run folder.
    """
    checked, given = load_recipe(recipe, overrides or [], trust=trust)
    asked = aligning(checked)
    if to is not None and to.exists() and not to.is_dir():
        raise ConfigError(f"--to {to} is a file; name a folder.")
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.verbs import previewing

    stopping.keeps = False
    with tempfile.TemporaryDirectory(prefix="selfsteer-preview-") as scratch:
        made = previewing.preview(asked, given, queries, Path(scratch))
    folder = to or Path(tempfile.mkdtemp(prefix="selfsteer-preview-"))
    page = folder / "preview.html"
    write_atomic(page, page_of(made, asked.name, asked.method))
    emit(made.to_json(), as_json, lambda _: _print(made))
    say(f"\nthe same as a page: {page}" + " (--to DIR keeps it elsewhere)" * (to is None))
    say(f"next: {shlex.join(['selfsteer', 'run', recipe, *(overrides or [])])}")


def page_of(made: "Preview", name: str, method: str) -> str:
    """The page."""
    from selfsteer.report.page import render

    return render(
        "preview.html.j2",
        title=f"{name}: preview",
        made=made,
        name=name,
        method=method,
        level=level,
    )


def _print(made: "Preview") -> None:
    for number, row in enumerate(made.rows, 1):
        out.print(f"\n[bold]{number}/{len(made.rows)}[/bold]  ", end="")
        out.print(Text(_safe(row.query.transcript), style="bold"))
        if row.principles:
            for side in ("good", "bad"):
                _block(f"principle {side}", getattr(row.principles, side), style="dim")
        for answer in row.answers.values():
            _answer(answer)
        _fate(row)
    out.print(f"\n{made.summary}", style="bold", markup=False)
    if made.coloured:
        out.print(
            "contrast: nats per token by which the good principle makes an answer likelier than "
            "the bad one. Colours, token by token: ",
            end="",
            style="dim",
        )
        for sign, what in ((1, "likelier"), (-1, "less likely")):
            out.print(Text(f" {what} ", style=STYLES[sign][1]), end="")
        out.print(f" from {LEVELS[0]:g} nats on", style="dim")
    if made.scale:
        out.print(f"score: {made.scale} ({made.judge})", style="dim", markup=False)
    for note in made.notes:
        out.print(note, style="dim", markup=False)


def _safe(text: str) -> str:
    return text.translate(CONTROL)


def _block(label: str, text: "str | Text", style: str = "") -> None:
    out.print(f"  {label}", style="dim", markup=False)
    body = Text(_safe(text), style=style) if isinstance(text, str) else text
    if body:
        out.print(Padding(body, (0, 0, 0, 6), expand=False), soft_wrap=False)


def _answer(answer: "Answer") -> None:
    label = f"{answer.name}, {answer.role}" if answer.role else answer.name
    if answer.score is not None:
        label += f"  score {answer.score:.2f}"
    if answer.contrast is not None:
        label += f"  contrast {answer.contrast:+.3f}"
    if not answer.finished:
        label += "  (cut off)"
    more = f" … ({len(answer.text):,} characters in all)" if len(answer.text) > MOST else ""
    if answer.pieces:
        text, length = Text(), 0
        for piece, value in answer.pieces:
            text.append(_safe(piece), style_of(value))
            length += len(piece)
            if length > MOST:
                break
    else:
        text = Text(_safe(answer.text[:MOST]))
    text.append(more)
    _block(label, text)
    if answer.pieces and not out.is_terminal and (said := _words(answer.pieces)):
        _block(said, "")


def style_of(value: float) -> str:
    """The terminal's style of a token."""
    found = level(value)
    return STYLES[1 if found > 0 else -1][abs(found) - 1] if found else ""


def _words(pieces: Sequence[tuple[str, float]], most: int = 5) -> str:
    """What colours would show, where there are none."""
    ranked = sorted(((v, p.strip()) for p, v in pieces if p.strip()), reverse=True)
    liked = [f"{p} {v:+.2f}" for v, p in ranked[:most] if level(v) > 0]
    not_liked = [f"{p} {v:+.2f}" for v, p in ranked[::-1][:most] if level(v) < 0]
    both = {"likelier": liked, "less likely": not_liked}
    return "; ".join(f"{name}: {', '.join(w)}" for name, w in both.items() if w)


def _fate(row: "Row") -> None:
    if row.verdict:
        out.print(f"  judge: {row.verdict}", markup=False)
    if row.dropped:
        out.print(f"  would be dropped: {row.dropped}", style="yellow", markup=False)
    else:
        out.print("  kept", style="green")
