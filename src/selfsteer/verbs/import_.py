"""``selfsteer import``: records of other programs, turned into ours."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out, warn
from selfsteer.verbs.common import AsJson


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="JSON, JSONL, Parquet or CSV file, or a folder of shards"
        ),
    ],
    to: Annotated[Path, typer.Option(help="JSONL file to write")],
    as_json: AsJson = False,
) -> None:
    """Convert other programs' preferences, triples or prompts; the format is recognised."""
    from selfsteer.data.jsonl import dump_line, write_atomic
    from selfsteer.formats import import_records

    if to.exists():
        raise ConfigError(f"{to} is there already; choose another name or move it away.")
    found = import_records(source, to.absolute().parent)
    write_atomic(to, map(dump_line, found.records))
    kind = type(found.records[0]).__name__.lower()
    if as_json:
        result = {
            "shape": found.shape,
            "kind": kind,
            "n_in": found.n_in,
            "n_out": len(found.records),
            "dropped": dict(found.dropped),
            "examples": found.examples,
            "left_out": found.left_out,
            "path": str(to),
        }
        out.print_json(data=result)
        return
    for example in found.examples:
        warn(f"dropped: {example}")
    for reason in found.left_out:
        warn(reason)
    drops = ", ".join(f"{n:,} {reason}" for reason, n in found.dropped.most_common())
    out.print(
        f"{to}: {found.n_in:,} in, each {found.shape}; {len(found.records):,} out, each a {kind}; "
        f"dropped {found.dropped.total():,}{f' ({drops})' if drops else ''}"
    )
