"""The rows of a file, of a folder of shards or of a data set on the hub, whatever they mean."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Self

from selfsteer.data.jsonl import parse, readable, shallow
from selfsteer.errors import ConfigError, DataError, listed, short
from selfsteer.recipe.texts import BEGINNINGS, PACKED

Row = Mapping[str, Any]
Columns = Callable[[Sequence[str]], Sequence[str]]
#: Where each row stands, and the row; or why it is none.
Rows = Iterable[tuple[str, Row | DataError]]

#: Kinds of file that may be shards in a folder.
SHARDS = (".jsonl", ".parquet", ".csv")

#: Columns of a CSV where an empty cell is an empty text; elsewhere it is an absent one.
TEXTS = {"prompt", "instruction", "chosen", "rejected", "completion", "response", "output", "raw"}

#: Characters of a JSON list that are decoded together.
PIECE = 1 << 20

#: Bytes of a line, characters of a JSON text that is no list: what is longer is no data of ours,
#: and a small packed file can hold a line that fills the memory.
LONGEST = 1 << 28

#: Rows of a Parquet file that are unpacked together: each may be long, and in the file a few bytes.
TOGETHER = 8

#: Rows of which one must have a column that is to be renamed.
HEAD = 100


def cache_home() -> Path:
    """Where what can be made again is kept: dequantised checkpoints, indices of runs."""
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SELFSTEER_CACHE") or Path(users) / "selfsteer").absolute()


class Unusable(DataError):
    """A row that cannot become what is wanted; ``reason`` is counted."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    columns: Columns = tuple,
    rename: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Row | DataError]]:
    """(where it stands, row) of each row; where is a file with its line, entry or row.

    A JSON file is one object or a list of them; its content says which of JSON and JSONL a file is.
    A CSV has a header and holds texts only. Cells of a table that hold nothing are left out. A text
    in place of an object is a prompt, and so is each line of a ``.txt`` file. In place of a row
    that cannot be read comes the error.

    Args:
        source: JSONL, JSON, CSV, text or Parquet file, all but the last also packed by gzip or
            zstd; a folder of JSONL, CSV or Parquet files of one kind, in itself or in its folder
            ``data``; or a name that `HubName` reads, which is streamed.
        split: of a data set on the hub.
        columns: which columns of a table to read, of those that it has; default: all.
        rename: old to new names of columns; the new ones are what ``columns`` sees.

    Raises:
        ConfigError: a column that is to be renamed is not there, or its new name is taken.
        DataError: the source is absent or unreadable as a whole.
    """
    path, new, header = Path(source), dict(rename or {}), dict[str, None]()

    def wanted(names: Sequence[str]) -> list[str]:
        header.update(dict.fromkeys(names))
        named = [new.get(name, name) for name in names]
        chosen = set(columns(named))
        return [
            name for name, now in zip(names, named, strict=True) if now in chosen or name in new
        ]

    if path.is_dir():
        rows: Rows = (row for shard in _shards(path) for row in _file(shard, wanted))
    elif path.exists():
        rows = _file(path, wanted)
    else:
        rows = _dataset(HubName.read(str(source), split))
    return iter(_renamed(rows, new, str(source), header) if new else rows)


def _renamed(rows: Rows, new: Mapping[str, str], source: str, header: Mapping[str, None]) -> Rows:
    if twice := [name for name, n in Counter(new.values()).items() if n > 1]:
        raise ConfigError(
            f"More than one column of {source} would be called {short(twice[0])}; keep one."
        )
    rest = iter(rows)
    head = list(islice(rest, HEAD))  # a table's header is known once a row is read
    found = (name for _, row in head if not isinstance(row, DataError) for name in row)
    names = list(header) or list(dict.fromkeys(found))
    for old in new:
        if old not in names:
            raise ConfigError(
                f"There is no column {short(old)} to rename in {source}; it has "
                f"{listed(map(repr, names)) if names else 'no rows'}."
            )
    for old, name in new.items():
        if name in names and name not in new:
            raise ConfigError(
                f"{source} has a column {short(name)} already, so {short(old)} cannot be called "
                f"that. Rename both, for example {name}=other_{name}."
            )
    for where, row in chain(head, rest):
        if not isinstance(row, DataError):
            row = {new.get(name, name): value for name, value in row.items()}
        yield where, row


def refuse_rereading(sources: Iterable[str | Path], written: Iterable[Path]) -> None:
    """Refuses to write what one of the sources is, or what would be read with it the next time.

    Raises:
        ConfigError: a file would be written over a source, or beside the shards of a folder.
    """
    found = [Path(s).resolve() for s in sources]
    folders = {f / inner for f in found if f.is_dir() for inner in ("", "data")}
    for file in written:
        if file.resolve() in found:
            raise ConfigError(f"{file} is read here and cannot be written; choose another --to.")
        if file.resolve().parent in folders:
            raise ConfigError(
                f"{file} would be in a folder that is read here, so that the same command would "
                "read its own output the next time. Choose a --to outside of it."
            )


def _shards(folder: Path) -> list[Path]:
    inside = [*folder.glob("*"), *folder.glob("data/*")]
    found = {kind: sorted(p for p in inside if _kind(p) == kind) for kind in SHARDS}
    kinds = [kind for kind, paths in found.items() if paths]
    if len(kinds) != 1:
        what = f"holds {' and '.join(kinds)} files" if kinds else "is a folder without shards"
        raise DataError(
            f"{folder} {what}. Give a file, or a folder of {', '.join(SHARDS)} files of one kind, "
            "for example a run's iteration-1/triples."
        )
    return found[kinds[0]]


def _kind(path: Path) -> str:
    """The suffix of a file, without that of its packing."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


def _file(path: Path, columns: Columns) -> Rows:
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet(path, columns)
    if kind == ".csv":
        return _csv(path, columns)
    if kind == ".txt":
        return _lines(path, _prompt)
    return _lines(path, parse) if _is_jsonl(path) else _json(path)


# -- files of lines ------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where it begins like one of gzip or zstd."""
    with readable(path), open(path, "rb") as file:
        begins = file.read(32)
        file.seek(0)
        for beginning, what in BEGINNINGS.items():
            if begins.startswith(beginning):
                raise DataError(f"{path} {what}.")
        if b"\0" in begins and not begins.startswith(tuple(PACKED)):
            raise DataError(
                f"{path} begins with NUL bytes, so it is not UTF-8 text. If it is UTF-16 text, "
                "convert it, for example with iconv -f UTF-16LE -t UTF-8."
            )
        try:
            yield _unpacked(file, begins)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise DataError(f"{path} is a damaged gzip file: {e}.") from None
        except OSError as e:
            if e.errno is not None:
                raise
            raise DataError(f"{path} is a damaged zstd file: {e}.") from None


def _unpacked(file: IO[bytes], begins: bytes) -> IO[bytes]:
    if begins.startswith(b"\x1f\x8b"):
        return gzip.open(file)  # type: ignore[return-value]
    if not begins.startswith(b"\x28\xb5\x2f\xfd"):
        return file
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


@contextmanager
def _text(path: Path, **how: Any) -> Iterator[IO[str]]:
    with opened(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", **how)


def _lines(path: Path, read: Callable[[str], Any]) -> Rows:
    """What ``read`` makes of each line that is not blank; a line ends at a line feed alone."""
    with opened(path) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
            if len(line) == LONGEST:
                raise _endless(f"{path}, line {number},")
            if line.strip():
                row = _row(lambda line: read(line.decode("utf-8-sig")), line)
                yield f"{path}, line {number}", row


def _endless(what: str) -> DataError:
    return DataError(
        f"{what} is longer than {LONGEST:,} characters, so it is no data of ours. Is it the right "
        "file?"
    )


def _row(read: Callable[[Any], Any], raw: Any) -> Row | DataError:
    """A row, or what is wrong with it."""
    try:
        value = read(raw)
    except UnicodeDecodeError as e:
        return Unusable("not_utf8", f"not UTF-8 ({e.reason} at byte {e.start} of the line)")
    except DataError as e:
        return e
    if isinstance(value, str):
        return {"prompt": value}
    return value if isinstance(value, dict) else DataError(f"not a JSON object: {short(value)}")


def _prompt(line: str) -> str:
    text = line.rstrip("\r\n")
    if text.startswith('{"'):
        raise DataError(
            "a prompt that looks like a JSON object; a file of such lines must end in .jsonl"
        )
    if "\r" in text:
        raise DataError(
            "a carriage return (CR) within a line. If the lines of the file end in CR alone, "
            "convert it, for example with tr '\\r' '\\n'; a prompt of several lines needs .jsonl"
        )
    return text


# -- tables --------------------------------------------------------------------------------------


def _parquet(path: Path, columns: Columns) -> Rows:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with readable(path):
            table = pq.ParquetFile(path)
            batches = table.iter_batches(TOGETHER, columns=list(columns(table.schema_arrow.names)))
            for first, batch in enumerate(batches):
                if batch.nbytes >= LONGEST:
                    raise _endless(f"A row of {path}")
                for number, row in enumerate(batch.to_pylist(), first * TOGETHER + 1):
                    yield f"{path}, row {number}", _without_nulls(row)
    except ArrowException as e:
        raise DataError(f"{path} is not a Parquet file: {e}.") from None


def _csv(path: Path, columns: Columns) -> Rows:
    csv.field_size_limit(LONGEST)  # the default of 128 kB is shorter than a long prompt
    held = 0  # characters of the row that is being read

    def pieces(file: IO[str]) -> Iterator[str]:
        nonlocal held
        for line in _pieces(file, path):
            held += len(line)
            if held >= LONGEST:
                raise _endless(f"A row of {path}")
            yield line

    try:
        with _text(path, newline="") as file:
            reader = csv.DictReader(pieces(file), strict=True)
            names = reader.fieldnames or ()
            wanted = list(columns(names))
            twice = [n for n, count in Counter(names).items() if n in wanted and count > 1]
            if twice:
                raise DataError(
                    f"{path} has more than one column called {short(twice[0])}; keep one."
                )
            for row in reader:
                where, held = f"{path}, line {reader.line_num}", 0
                if None in row or None in row.values():
                    yield where, DataError("it does not have as many cells as the header")
                else:
                    yield where, {k: row[k] for k in wanted if row[k] or k in TEXTS}
    except csv.Error as e:
        raise DataError(f"{path} is not a CSV file: {e}.") from None


def _without_nulls(row: Row) -> Row:
    """A column that only other rows fill is no key of this one."""
    return {k: v for k, v in row.items() if v is not None}


# -- JSON ----------------------------------------------------------------------------------------


def _is_jsonl(path: Path) -> bool:
    """Whether each line is a value; otherwise the file is one list, or one object over lines."""
    with _text(path, errors="replace") as file:
        head = file.read(PIECE).lstrip()
        if head.startswith("["):  # a list may be one long line
            return False
        if "\n" not in head:
            head += next(_pieces(file, path), "")
    first = head.partition("\n")[0].strip()
    if first == "{":
        return False
    try:
        json.loads(first or "null")
    except (ValueError, RecursionError):
        return _kind(path) != ".json"
    return True


def _pieces(file: IO[str], path: Path) -> Iterator[str]:
    """The lines of a text."""
    for line in iter(partial(file.readline, LONGEST), ""):
        if len(line) == LONGEST:
            raise _endless(f"A line of {path}")
        yield line


def _json(path: Path) -> Rows:
    try:
        for number, entry in enumerate(_entries(path), 1):
            yield f"{path}, entry {number}", _row(shallow, entry)
    except DataError:
        raise
    except (ValueError, RecursionError) as e:
        raise _broken(path, e) from None


def _broken(path: Path, e: Exception) -> DataError:
    """The error of a file that is not JSON as a whole, with the line."""
    if not isinstance(e, json.JSONDecodeError):
        return DataError(f"{path} cannot be read as JSON: {e}.")
    try:
        with _text(path) as file:
            text = file.read(LONGEST)  # what is decoded in pieces does not know its line
        if len(text) == LONGEST:
            return DataError(f"{path} is not JSON ({e.msg}).")
        json.loads(text)
    except (ValueError, RecursionError) as whole:
        e = whole if isinstance(whole, json.JSONDecodeError) else e
    return DataError(
        f"{path}, line {e.lineno}: not JSON ({e.msg} at column {e.colno}). The file must be one "
        "object, a list of objects, or one object per line."
    )


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a list, which is never whole in memory, or the one value of another file."""
    decode = json.JSONDecoder().raw_decode
    between = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
    with _text(path) as file:
        text = file.read(PIECE).lstrip()
        if len(text) < PIECE or not text.startswith("["):
            text += file.read(LONGEST)
            if len(text) >= LONGEST:
                raise _endless(str(path))
            value = json.loads(text)
            yield from value if isinstance(value, list) else [value]
            return
        place, comma = 1, ""  # before the first entry stands nothing, before each other a comma
        while True:
            gap = between.match(text, place)
            assert gap
            if not gap[1] and text.startswith("]", gap.end()):
                rest = text[gap.end() + 1 :]
                while not rest.strip():
                    if not (rest := file.read(PIECE)):
                        return
                raise json.JSONDecodeError("text after the list", text, gap.end())
            try:
                if gap[1] != comma:
                    raise json.JSONDecodeError("no comma, or one too many", text, gap.end())
                entry, place = decode(text, gap.end())
            except json.JSONDecodeError:
                if len(text) - place >= LONGEST:
                    raise _endless(f"An entry of {path}") from None
                more = file.read(max(PIECE, len(text) - place))
                if not more:
                    raise
                text, place = text[place:] + more, 0
                continue
            comma = ","
            yield entry


# -- the hub -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubName:
    """A data set on the Hugging Face hub."""

    repo: str
    config: str | None
    split: str
    revision: str | None

    @classmethod
    def read(cls, text: str, split: str | None = None) -> Self:
        """Reads ``NAME:CONFIG:SPLIT@REVISION``, of which all but the name may be left out.

        ``NAME[SPLIT]`` names a split too; without any it is ``split``, or else ``train``.

        Raises:
            ConfigError: the name has another split than ``split``.
            DataError: it looks like a file, and there is none.
        """
        part = r"(?::([^:@]*))?"
        match = re.fullmatch(rf"([^:@\[]+){part}{part}(?:\[(\w+)\])?(?:@(.+))?", text)
        repo = match[1] if match else text
        if not match or re.search(r"\.[A-Za-z]\w*$|^[./]|/.*/", repo):
            raise DataError(f"There is no file {text}.")
        named = match[3] or match[4]
        if named and split and named != split:
            raise ConfigError(
                f"{text} names another split than the setting {short(split)}; keep one."
            )
        return cls(repo, match[2] or None, named or split or "train", match[5])

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}:{self.config or ''}:{self.split}{at}"

    @property
    def commit(self) -> str | None:
        """The commit that the revision is now; None where the hub does not say."""
        if self.revision and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        return _commit(self.repo, self.revision)


@cache
def _commit(repo: str, revision: str | None) -> str | None:
    import huggingface_hub

    try:
        found = huggingface_hub.dataset_info(repo, revision=revision, timeout=10)
    except Exception:  # no network, or no such data set: loading says which
        return None
    return found.sha


def _dataset(name: HubName) -> Rows:
    import datasets

    revision = name.commit or name.revision
    try:
        found: Iterable[Any] = datasets.load_dataset(
            name.repo, name.config, split=name.split, revision=revision, streaming=True
        )
        for number, row in enumerate(found, 1):
            yield f"{name}, row {number}", _without_nulls(row)
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(
            f"There is no file {short(name.repo)}, and as a data set on the hub it cannot be "
            f"loaded: {reason}."
        ) from e
