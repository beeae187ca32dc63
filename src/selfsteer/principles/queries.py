"""Loads the query set: JSONL, JSON, Parquet or a datasets name; duplicates counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfsteer.config import Queries, resolve_path
from selfsteer.errors import DataError
from selfsteer.records import Query, dump_line, read_jsonl
from selfsteer.runs import digest_path

_COLUMNS = ("id", "prompt", "messages", "system")


def load_queries(settings: Queries) -> tuple[list[Query], Counter[str]]:
    """The queries in id order, and what was left out by reason.

    Raises:
        DataError: unreadable, malformed (names file and line), empty, or two different queries
            with one id.
    """
    path = resolve_path(settings.path)
    queries: dict[str, Query] = {}
    seen: set[tuple[Any, ...]] = set()
    dropped: Counter[str] = Counter()
    for where, row in _rows(path, settings.split):
        if settings.limit is not None and len(queries) == settings.limit:
            dropped["over_limit"] += 1
            continue
        try:
            query = Query.from_dict(row)
            dump_line(query).encode()
        except DataError as e:
            raise DataError(f"{where}: {e}.") from None
        except ValueError as e:
            raise DataError(f"{where} cannot be stored as UTF-8 JSON: {e}.") from None
        if query.messages in seen:
            dropped["duplicate"] += 1
            continue
        if query.id in queries:
            raise DataError(
                f"{where}: the id {query.id!r} is already that of another query. Make ids unique, "
                "or leave them out."
            )
        seen.add(query.messages)
        queries[query.id] = query
    if not queries:
        raise DataError(
            f"{settings.path} holds no query. Give one JSON object per line, for example "
            '{"prompt": "Why is the sky blue?"}.'
        )
    return [queries[i] for i in sorted(queries)], dropped


def queries_digest(settings: Queries) -> str:
    """Identifies the query set: the file's content, or the datasets name."""
    path = Path(resolve_path(settings.path))
    return digest_path(path) if path.exists() else f"datasets:{settings.path}:{settings.split}"


def _rows(path: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    file = Path(path)
    if file.is_file():
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif file.suffix == ".json":
            yield from _json(file)
        else:
            for number, row in read_jsonl(file):
                yield f"{path}, line {number}", row
        return
    if file.is_dir():
        raise DataError(f"{path} is a folder; give a JSONL, JSON or Parquet file in it.")
    if file.suffix or path.count("/") > 1 or path.startswith((".", "/")):
        raise DataError(f"There is no query file {path}.")
    yield from _dataset(path, split)


def _json(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import json

    try:
        value = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError) as e:
        raise DataError(f"{file} is not a JSON file: {e}.") from None
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, entry {number} is not an object.")
        yield f"{file}, entry {number}", row


def _parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        table = pq.ParquetFile(file)
        columns = [c for c in table.schema_arrow.names if c in _COLUMNS]
        number = 0
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (OSError, ArrowException) as e:
        raise DataError(f"{file} is not a Parquet file: {e}.") from None


def _dataset(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield (
                f"{name}[{split}], row {number}",
                {k: v for k, v in row.items() if k in _COLUMNS},
            )
    except DataError:
        raise
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(
            f"There is no query file {name!r}, and as a datasets name it cannot be loaded: "
            f"{reason}."
        ) from e
