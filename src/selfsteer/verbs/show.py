"""``selfsteer show``: what a run did so far."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.verbs.common import AsJson, emit


def show(
    run: Annotated[Path, typer.Argument(help="run folder")],
    as_json: AsJson = False,
) -> None:
    """Show a run: stages, counts, drops by reason, data quality, paths of the models."""
    from selfsteer.report import summary
    from selfsteer.view import RunView

    found = RunView.open(run)
    emit(found.to_json() if as_json else found, as_json, summary.print_show)
