"""``selfsteer queries``: a query set, cleaned."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.terminal import out
from selfsteer.verbs.common import AsJson, emit


def queries(
    path: Annotated[
        str, typer.Argument(help="query file, folder of shards, or name of a Hugging Face dataset")
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
    as_json: AsJson = False,
) -> None:
    """Clean a query set: length bounds, (near-)duplicates, evaluation sets kept out, a hold-out.

    Reads selfsteer's own rows and those of UltraFeedback, ShareGPT and Alpaca. Where asked for,
    OUT.holdout.jsonl and OUT.contaminated.jsonl are written beside OUT.jsonl.
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
    emit(found, as_json, lambda _: print_curated(found, out))
