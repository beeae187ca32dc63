"""``selfsteer report``: a run drawn on one page."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.verbs.common import AsJson


def report(
    run: Annotated[Path, typer.Argument(help="run folder, finished or not")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; default: report.html in the run folder"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run: one page (report.html), its text (report.md), figures as SVG and PNG.

    The page is a single file that loads nothing from the network. Only the run folder is read.
    """
    from selfsteer.errors import ConfigError

    if out is not None and out.suffix != ".html":
        raise ConfigError(f"--out names the HTML file and must end in .html, found {out}.")
    from selfsteer.report.document import write_report
    from selfsteer.terminal import out as console
    from selfsteer.terminal import say

    written = write_report(run, out)
    if as_json:
        figures = [str(p) for p in written.figures]
        console.print_json(
            data={
                "html": str(written.html),
                "markdown": str(written.markdown),
                "figures": figures,
                "not_drawn": written.not_drawn,
            }
        )
        return
    for reason in written.not_drawn:
        say(f"not drawn: {reason}")
    console.print(str(written.html), markup=False)
    console.print(str(written.markdown), markup=False)
    if written.figures:
        console.print(f"{written.figures[0].parent}: {len(written.figures)} pictures", markup=False)
