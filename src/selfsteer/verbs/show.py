"""``selfsteer show``: what a run did so far."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.terminal import out
from selfsteer.verbs.common import AsJson, emit


def show(
    run: Annotated[Path, typer.Argument(help="run folder")],
    as_json: AsJson = False,
) -> None:
    """Show a run: stages, counts, drops by reason, data quality, paths of the models."""
    from selfsteer.report import summary

    emit(summary.load(run), as_json, lambda found: summary.print_show(found, out))
