"""Verbs that move data: a run's preferences out, other people's in, a query set cleaned."""

import json
from pathlib import Path
from typing import Annotated

import typer

from selfsteer.verbs.principles import AsJson

data_app = typer.Typer()


@data_app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    to: Annotated[Path, typer.Option(help="folder to write into")],
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="trl (default), trl-prompts, trl-unpaired, llama-factory, llama-factory-sharegpt, "
            "distilabel, chat, parquet or authors",
        ),
    ] = None,
    model: Annotated[
        bool, typer.Option("--model", help="the trained policy with its card")
    ] = False,
    iteration: Annotated[int | None, typer.Option(help="default: the last one")] = None,
    baseline: Annotated[bool, typer.Option(help="the baseline's data or policy instead")] = False,
    queries_license: Annotated[
        str | None, typer.Option(help="licence of the queries, for the card of --format parquet")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's preferences for other trainers, or its policy, each with a card."""
    from selfsteer.errors import ConfigError
    from selfsteer.report import summary
    from selfsteer.terminal import out, warn

    if model and (fmt is not None or queries_license is not None):
        raise ConfigError(
            "--model takes neither --format nor --queries-license: these are of data."
        )
    found = summary.load(run)
    k = found["recipe"]["iterations"] if iteration is None else iteration
    from selfsteer.verbs.exporting import export_model, export_run

    if model:
        folder = str(export_model(found, k, to, baseline=baseline))
        if as_json:
            out.print_json(json.dumps({"paths": [folder]}))
        else:
            out.print(folder)
        return
    exported = export_run(
        found, k, fmt or "trl", to, baseline=baseline, queries_license=queries_license
    )
    paths = list(map(str, exported.paths))
    if as_json:
        result = {"records": exported.count, "paths": paths, "left_out": exported.left_out}
        out.print_json(json.dumps(result))
        return
    for reason in exported.left_out:
        warn(reason)
    out.print(f"{exported.count:,} records: {', '.join(paths)}")


@data_app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON, JSONL, Parquet or CSV; a folder of shards")
    ],
    to: Annotated[Path, typer.Option(help="JSONL file to write")],
    as_json: AsJson = False,
) -> None:
    """Turn other programs' preferences, triples or prompts into ours; the shape is recognised."""
    from selfsteer.data.jsonl import dump_line, write_atomic
    from selfsteer.errors import ConfigError
    from selfsteer.formats import import_records
    from selfsteer.terminal import out, warn

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
        out.print_json(json.dumps(result))
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


@data_app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what selfsteer export wrote")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub")],
    yes: Annotated[bool, typer.Option("--yes", help="upload; without it, only say what")] = False,
    private: Annotated[bool, typer.Option("--private", help="for nobody else to see")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish an exported data set or model on the Hugging Face hub."""
    from selfsteer.formats import hub
    from selfsteer.terminal import out, warn

    upload = hub.plan_upload(folder, repo, private=private)
    url = hub.push(upload) if yes else None
    if as_json:
        files = [{"path": name, "bytes": size} for name, size in upload.files]
        result = {"repo": repo, "kind": upload.kind, "private": private, "files": files, "url": url}
        out.print_json(json.dumps({**result, "warnings": upload.warnings}))
        return
    for warning in upload.warnings:
        warn(warning)
    if url is not None:
        out.print(f"{len(upload.files):,} files are at {url}")
        return
    for name, size in upload.files:
        out.print(f"{size:>15,}  {name}", markup=False)
    who = "private" if private else "public"
    out.print(
        f"would upload {len(upload.files):,} files, {upload.size:,} bytes, to the {who} "
        f"{upload.kind} {repo}; nothing was uploaded. Add --yes to do it."
    )


@data_app.command()
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
    from selfsteer.terminal import out

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
        out.print_json(json.dumps(found))
    else:
        print_curated(found, out)
