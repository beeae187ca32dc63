"""``selfsteer export``: a run's preferences or its policy for other programs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out, warn
from selfsteer.verbs.common import AsJson, emit


def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    to: Annotated[Path, typer.Option(help="folder to write to")],
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="trl (default), trl-prompts, trl-unpaired, llama-factory, llama-factory-sharegpt, "
            "distilabel, chat, parquet or authors",
        ),
    ] = None,
    model: Annotated[
        bool, typer.Option("--model", help="export the trained policy with its card")
    ] = False,
    iteration: Annotated[
        int | None, typer.Option(help="iteration to export; default: the last one")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="export the baseline's data or policy")] = False,
    queries_license: Annotated[
        str | None, typer.Option(help="licence of the queries, for the card of --format parquet")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a run's preferences for other trainers, or its policy, each with a card."""
    from selfsteer.report import summary

    if model and (fmt is not None or queries_license is not None):
        raise ConfigError(
            "--model takes neither --format nor --queries-license: those are for data."
        )
    found = summary.load(run)
    k = found["recipe"]["iterations"] if iteration is None else iteration
    from selfsteer.verbs.exporting import export_model, export_run

    if model:
        folder = str(export_model(found, k, to, baseline=baseline))
        emit({"paths": [folder]}, as_json, lambda _: out.print(folder))
        return
    exported = export_run(
        found, k, fmt or "trl", to, baseline=baseline, queries_license=queries_license
    )
    paths = list(map(str, exported.paths))
    result = {"records": exported.count, "paths": paths, "left_out": exported.left_out}
    emit(result, as_json, _print)


def _print(result: dict[str, Any]) -> None:
    for reason in result["left_out"]:
        warn(reason)
    out.print(f"{result['records']:,} records: {', '.join(result['paths'])}")
