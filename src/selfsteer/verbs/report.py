"""``selfsteer report``: a run drawn on one page."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out, say
from selfsteer.verbs.common import AsJson, emit


def report(
    run: Annotated[Path, typer.Argument(help="run folder, finished or not")],
    html: Annotated[
        Path | None,
        typer.Option("--out", help="HTML file to write; default: report.html in the run folder"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run: one page (report.html), its text (report.md), figures as SVG and PNG.

    The page is a single file that loads nothing from the network. Only the run folder is read.
    """
    if html is not None and html.suffix != ".html":
        raise ConfigError(f"--out names the HTML file and must end in .html, found {html}.")
    from selfsteer.report.document import write_report

    written = write_report(run, html)
    result = {
        "html": str(written.html),
        "markdown": str(written.markdown),
        "figures": list(map(str, written.figures)),
        "not_drawn": written.not_drawn,
    }
    emit(result, as_json, _print)


def _print(written: dict[str, Any]) -> None:
    for reason in written["not_drawn"]:
        say(f"not drawn: {reason}")
    out.print(f"{written['html']}\n{written['markdown']}", markup=False)
    if figures := written["figures"]:
        out.print(f"{Path(figures[0]).parent}: {len(figures)} pictures", markup=False)
