"""``selfsteer queries``: a query set, cleaned."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.terminal import out, table, warn
from selfsteer.verbs.common import AsJson, Columns, emit, renamed

#: Contaminated pairs shown in the terminal; the file beside the output has all.
PAIRS_SHOWN = 10


def queries(
    path: Annotated[
        str,
        typer.Argument(
            help="query file, folder of shards, or NAME:CONFIG:SPLIT@REVISION of a dataset"
        ),
    ],
    to: Annotated[Path, typer.Option(help="JSONL file to write")],
    min_chars: Annotated[int | None, typer.Option(help="drop queries of fewer characters")] = None,
    max_chars: Annotated[int | None, typer.Option(help="drop queries of more characters")] = None,
    script: Annotated[
        list[str] | None,
        typer.Option(help="script that half of the letters must be in, such as Latin; repeatable"),
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(help="drop queries that are this similar to an earlier one, such as 0.8"),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="evaluation set whose queries to keep out; repeatable")
    ] = None,
    ngram: Annotated[
        int | None,
        typer.Option(
            help="number of words in a row that count as overlap with --against; default: 8"
        ),
    ] = None,
    holdout: Annotated[float | None, typer.Option(help="share to hold out, such as 0.05")] = None,
    limit: Annotated[int | None, typer.Option(help="use only the first N queries")] = None,
    split: Annotated[str | None, typer.Option(help="split of the dataset")] = None,
    column: Columns = None,
    as_json: AsJson = False,
) -> None:
    """Clean a query set: length bounds, (near-)duplicates, evaluation sets kept out, a hold-out.

    Reads selfsteer's own rows and many others (docs/queries.md). Where asked for,
    OUT.holdout.jsonl and OUT.contaminated.jsonl are written beside OUT.jsonl.
    """
    from selfsteer.data.queries import write_curated
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import Queries

    given = {
        "path": path,
        "split": split,
        "columns": renamed(column) or None,
        "limit": limit,
        "min_chars": min_chars,
        "max_chars": max_chars,
        "scripts": script,
        "near_duplicates": near_duplicates,
        "against": against,
        "ngram": ngram,
    }
    values = {k: v for k, v in given.items() if v is not None}
    found = write_curated(validate(Queries, values, "settings of queries"), to, holdout)
    emit(found, as_json, print_curated)


def print_curated(found: dict[str, Any]) -> None:
    """What became of a query set: counts by reason, contaminated pairs, files."""
    for example in found["examples"]:
        warn(f"dropped: {example}")
    rows = [(f"{found['read']:,}", "read")]
    rows += [(f"-{n:,}", reason.replace("_", " ")) for reason, n in found["dropped"].items()]
    files = {side: found["files"].get(side) for side in ("queries", "holdout")}
    rows += [(f"{found[side]:,}", path) for side, path in files.items() if path]
    out.print(table(["", ""], rows, words=[1]))
    if found["not_compared"]:
        rest = ", ".join(f"{n:,} {reason}" for reason, n in found["not_compared"].items())
        out.print(f"rows of evaluation sets without a query to compare with: {rest}")
    if found["answers_cut"]:
        out.print(f"answers cut off from the end of kept queries: {found['answers_cut']:,}")
    pairs = found["contaminated"]
    if pairs:
        keys = ("id", "evaluation_id", "against", "shared")
        shown = ([pair[k] for k in keys] for pair in pairs[:PAIRS_SHOWN])
        names = ["query", "evaluation query", "of", "shared words"]
        out.print(table(names, shown, title="\nshared with evaluation sets", words=4))
        more = f"{len(pairs) - PAIRS_SHOWN:,} more" if len(pairs) > PAIRS_SHOWN else "all"
        out.print(f"{more} of them in {found['files']['contaminated']}", markup=False)
