"""``selfsteer import``: records of other programs, turned into ours."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out, warn
from selfsteer.verbs.common import AsJson, Columns, emit, renamed


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="JSON, JSONL, CSV, text or Parquet file, a folder of shards, or "
            "NAME:CONFIG:SPLIT@REVISION of a dataset",
        ),
    ],
    to: Annotated[Path, typer.Option(help="JSONL file to write")],
    column: Columns = None,
    as_json: AsJson = False,
) -> None:
    """Convert other programs' preferences, triples or prompts; the format is recognised."""
    from selfsteer.data.files import refuse_rereading
    from selfsteer.data.jsonl import dump_line, write_atomic
    from selfsteer.data.reading import import_records

    refuse_rereading([source], [to])
    if to.exists():
        raise ConfigError(f"{to} is there already; choose another name or move it away.")
    found = import_records(source, to.absolute().parent, rename=renamed(column))
    write_atomic(to, map(dump_line, found.records))
    result = {
        "shape": found.shape,
        "kind": type(found.records[0]).__name__.lower(),
        "n_in": found.n_in,
        "n_out": len(found.records),
        "dropped": dict(found.dropped),
        "examples": found.examples,
        "left_out": found.left_out,
        "path": str(to),
    }
    emit(result, as_json, _print)


def _print(found: dict[str, Any]) -> None:
    for text in (*(f"dropped: {example}" for example in found["examples"]), *found["left_out"]):
        warn(text)
    drops = ", ".join(f"{n:,} {reason}" for reason, n in found["dropped"].items())
    out.print(
        f"{found['path']}: {found['n_in']:,} in, each {found['shape']}; {found['n_out']:,} out, "
        f"each a {found['kind']}; dropped {sum(found['dropped'].values()):,}"
        + (f" ({drops})" if drops else "")
    )
