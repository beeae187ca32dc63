"""``selfsteer queries``: a query set, cleaned."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.terminal import out
from selfsteer.verbs.common import AsJson


def queries(
    path: Annotated[str, typer.Argument(help="a query file, a folder of shards, a datasets name")],
    to: Annotated[Path, typer.Option(help="the JSONL file to write")],
    min_chars: Annotated[int | None, typer.Option(help="fewest characters")] = None,
    max_chars: Annotated[int | None, typer.Option(help="most characters")] = None,
    script: Annotated[
        list[str] | None, typer.Option(help="script of half the letters, such as Latin; repeatable")
    ] = None,
    near_duplicates: Annotated[
        float | None, typer.Option(help="drop at this similarity, such as 0.8")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="evaluation set to keep out; repeatable")
    ] = None,
    ngram: Annotated[int | None, typer.Option(help="shared words that count, 8")] = None,
    holdout: Annotated[float | None, typer.Option(help="share to hold out, such as 0.05")] = None,
    limit: Annotated[int | None, typer.Option(help="use only the first so many")] = None,
    split: Annotated[str | None, typer.Option(help="of a datasets name")] = None,
    as_json: AsJson = False,
) -> None:
    """Clean a query set: bounds, duplicates, near-duplicates, evaluation sets kept out, a hold-out.

    Rows of our own, UltraFeedback's, ShareGPT's and Alpaca's shape are read. Beside OUT.jsonl come
    OUT.holdout.jsonl and OUT.contaminated.jsonl, where asked for.
    """
    from selfsteer.data.queries import write_curated
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import Queries
    from selfsteer.report.summary import print_curated

    given = {
        "path": path,
        "split": split,
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
    if as_json:
        out.print_json(data=found)
    else:
        print_curated(found, out)
