"""The rows of a file, of a folder of shards or of a datasets name, whatever they mean."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import read_jsonl, readable
from selfsteer.errors import DataError

Row = dict[str, Any]
Columns = Callable[[Sequence[str]], Sequence[str]]

#: Kinds of file that may be shards in a folder.
SHARDS = (".jsonl", ".parquet", ".csv")

#: Columns of a CSV where an empty cell is an empty text; elsewhere it is an absent one.
TEXTS = {"prompt", "instruction", "chosen", "rejected", "completion", "response", "output", "raw"}

#: Characters of a JSON list that are decoded together.
PIECE = 1 << 20


def read_rows(
    source: str | Path, split: str = "train", columns: Columns = tuple
) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of each row; where is a file with its line, entry or row.

    A JSON file is one object or a list of them; its content says which of JSON and JSONL a file is.
    A CSV has a header and holds texts only. Cells of a table that hold nothing are left out.

    Args:
        source: JSONL, JSON, CSV or Parquet file; a folder of JSONL, CSV or Parquet files of one
            kind, in itself or in its folder ``data``; or a datasets name, which is streamed.
        split: of a datasets name.
        columns: which columns of a table to read, of those that it has; default: all.

    Raises:
        DataError: it is absent or unreadable; names the file and the line or entry.
    """
    path = Path(source)
    if path.is_dir():
        for shard in _shards(path):
            yield from _file(shard, columns)
    elif path.exists():
        yield from _file(path, columns)
    elif re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) or re.match(r"[./]|.*/.*/", str(source)):
        raise DataError(f"There is no file {source}.")
    else:
        yield from _dataset(str(source), split)


def _shards(folder: Path) -> list[Path]:
    inside = [*folder.glob("*"), *folder.glob("data/*")]
    found = {kind: sorted(p for p in inside if p.suffix == kind) for kind in SHARDS}
    kinds = [kind for kind, paths in found.items() if paths]
    if len(kinds) != 1:
        what = f"holds {' and '.join(kinds)} files" if kinds else "is a folder without shards"
        raise DataError(
            f"{folder} {what}. Give a file, or a folder of {', '.join(SHARDS)} files of one kind, "
            "for example a run's iteration-1/triples."
        )
    return found[kinds[0]]


def _file(path: Path, columns: Columns) -> Iterator[tuple[str, Row]]:
    if path.suffix in _TABLES:
        yield from _TABLES[path.suffix](path, columns)
    elif _is_jsonl(path):
        yield from ((f"{path}, line {number}", row) for number, row in read_jsonl(path))
    else:
        yield from _json(path)


# -- tables --------------------------------------------------------------------------------------


def _parquet(path: Path, columns: Columns) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        table = pq.ParquetFile(path)
        batches = table.iter_batches(1024, columns=list(columns(table.schema_arrow.names)))
        for number, row in enumerate((row for b in batches for row in b.to_pylist()), 1):
            yield f"{path}, row {number}", _without_nulls(row)
    except (OSError, ArrowException) as e:
        raise DataError(f"{path} is not a Parquet file: {e}.") from None


def _csv(path: Path, columns: Columns) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 kB is shorter than a long prompt
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            names = reader.fieldnames or ()
            wanted = list(columns(names))
            twice = [n for n, count in Counter(names).items() if n in wanted and count > 1]
            if twice:
                raise DataError(f"{path} has more than one column called {twice[0]!r}; keep one.")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where} does not have as many cells as the header.")
                yield where, {k: row[k] for k in wanted if row[k] or k in TEXTS}
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} is not a CSV file in UTF-8: {e}.") from None


_TABLES = {".parquet": _parquet, ".csv": _csv}


def _without_nulls(row: Row) -> Row:
    """A column that only other rows fill is no key of this one."""
    return {k: v for k, v in row.items() if v is not None}


def _dataset(name: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        found: Iterable[Any] = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(found, 1):
            yield f"{name}[{split}], row {number}", _without_nulls(row)
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(
            f"There is no file {name!r}, and as a datasets name it cannot be loaded: {reason}."
        ) from e


# -- JSON ----------------------------------------------------------------------------------------


def _is_jsonl(path: Path) -> bool:
    """Whether each line is an object; otherwise the file is one list, or one object over lines."""
    with readable(path), open(path, encoding="utf-8-sig") as file:
        while (first := file.read(1)).isspace():
            pass
        if first != "[":  # a list may be one long line
            first = (first + file.readline()).strip()
    if first.startswith("version https://git-lfs"):
        raise DataError(
            f"{path} is a Git LFS pointer, not the data. Fetch the data with `git lfs pull`."
        )
    if first in ("[", "{"):
        return False
    try:
        json.loads(first or "null")
    except ValueError:
        return path.suffix != ".json"
    return True


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with readable(path):
            for number, row in enumerate(_entries(path), 1):
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise DataError(f"{path}, entry {number} is not an object but {kind}.")
                yield f"{path}, entry {number}", row
    except json.JSONDecodeError:
        try:
            json.loads(path.read_text("utf-8-sig"))  # says where in the file
        except json.JSONDecodeError as e:
            raise DataError(
                f"{path}, line {e.lineno} is not JSON ({e.msg} at column {e.colno}). The file must "
                "be one object, a list of objects, or one object per line."
            ) from None
        raise


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a list, which is never whole in memory, or the one value of another file."""
    decode = json.JSONDecoder().raw_decode
    between = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(PIECE).lstrip()
        if len(text) < PIECE or not text.startswith("["):
            value = json.loads(text + file.read())
            yield from value if isinstance(value, list) else [value]
            return
        place, comma = 1, ""  # before the first entry stands nothing, before each other a comma
        while True:
            gap = between.match(text, place)
            assert gap
            if not gap[1] and text.startswith("]", gap.end()):
                if (text[gap.end() + 1 :] + file.read()).strip():
                    raise json.JSONDecodeError("text after the list", text, gap.end())
                return
            try:
                if gap[1] != comma:
                    raise json.JSONDecodeError("no comma, or one too many", text, gap.end())
                entry, place = decode(text, gap.end())
            except json.JSONDecodeError:
                more = file.read(max(PIECE, len(text) - place))
                if not more:
                    raise
                text, place = text[place:] + more, 0
                continue
            comma = ","
            yield entry
