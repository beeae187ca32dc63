"""The rows of a file, whatever they mean: JSON, JSONL, Parquet and CSV."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import read_jsonl
from selfsteer.errors import DataError

#: Characters of a list that are decoded together.
PIECE = 1 << 20

_BLANK = " \t\r\n"
_BLANKS = tuple(_BLANK)


def file_rows(
    path: Path, columns: Callable[[Sequence[str]], list[str]] | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line, entry or row; object) of a JSON, JSONL, Parquet or CSV file.

    JSON is one object or a list of them; which of JSON and JSONL a file is, its content says. CSV
    has a header, and texts only: an empty cell is an empty text.

    Args:
        path: the file.
        columns: which of a table's columns to read; default: all of them.

    Raises:
        DataError: unreadable; names the file and the line or entry.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    if path.suffix == ".csv":
        yield from _csv_rows(path, columns)
        return
    if _is_jsonl(path):
        for number, record in read_jsonl(path):
            yield f"{path}, line {number}", record
        return
    try:
        for number, record in enumerate(_entries(path), 1):
            if not isinstance(record, Mapping):
                kind = type(record).__name__
                raise DataError(f"{path}, entry {number} is not an object but {kind}.")
            yield f"{path}, entry {number}", record
    except json.JSONDecodeError as e:
        raise DataError(
            f"{path}, line {e.lineno} is not JSON ({e.msg} at column {e.colno}). The file must be "
            "one object, a list of objects, or one object per line."
        ) from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}).") from None


def _entries(path: Path) -> Iterator[Any]:
    """What a list holds, or the one value of another file; a list is never whole in memory."""
    try:
        yield from _decoded(path)
    except ValueError:
        json.loads(path.read_text("utf-8-sig"))  # says where in the file
        raise


def _decoded(path: Path) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(PIECE).lstrip(_BLANK)
        if len(text) < PIECE // 2 or not text.startswith("["):
            value = json.loads(text + file.read())
            yield from value if isinstance(value, list) else [value]
            return
        position, begun = 1, False
        while True:
            # behind an entry stands a comma and another one, or the end
            start = _behind_blank(text, position)
            if begun and text.startswith(",", start):
                start = _behind_blank(text, start + 1)
            elif text.startswith("]", start):
                if (text[start + 1 :] + file.read()).strip(_BLANK):
                    raise ValueError("text behind the list")
                return
            elif begun:
                start = len(text)
            try:
                entry, position = decode(text, start)
            except ValueError:
                more = file.read(max(PIECE, len(text) - position))
                if not more:
                    raise
                text, position = text[position:] + more, 0
                continue
            begun = True
            yield entry


def _behind_blank(text: str, position: int) -> int:
    while text[position : position + 1] in _BLANKS:
        position += 1
    return position


def _parquet_rows(
    path: Path, columns: Callable[[Sequence[str]], list[str]] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    number = 0
    try:
        table = pq.ParquetFile(path)
        wanted = columns(table.schema_arrow.names) if columns else None
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                # a column that only other rows fill is no key of this one
                yield f"{path}, row {number}", {k: v for k, v in row.items() if v is not None}
    except (OSError, ArrowException) as e:
        raise DataError(f"{path} is not a Parquet file: {e}.") from None


def _csv_rows(
    path: Path, columns: Callable[[Sequence[str]], list[str]] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 kB is shorter than a long prompt
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            names = reader.fieldnames or ()
            wanted = set(columns(names) if columns else names)
            twice = [n for n, count in Counter(names).items() if n in wanted and count > 1]
            if twice:
                raise DataError(f"{path} has more than one column called {twice[0]!r}; keep one.")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where} has not as many cells as the header has columns.")
                yield where, {k: v for k, v in row.items() if k in wanted}
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} is not a CSV file in UTF-8: {e}.") from None


def _is_jsonl(path: Path) -> bool:
    """Whether each line is an object; otherwise the file is one list, or an object over lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            pieces = iter(lambda: file.readline(PIECE), "")
            first = next((piece for piece in pieces if piece.strip()), "")
            if not first.lstrip().startswith("["):  # a list may be one long line
                first += "" if first.endswith("\n") else file.readline()
            first = first.strip()
    except (OSError, UnicodeDecodeError):
        return True  # read_jsonl meets it again and says so
    if first.startswith("version https://git-lfs"):
        raise DataError(
            f"{path} is a Git LFS pointer, not the data. Fetch the data with `git lfs pull`."
        )
    if first.startswith("[") or first == "{":
        return False
    return path.suffix != ".json" or not first or _parses(first)


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
