"""JSON Lines: atomic writes, checked reads, and records that stay on disk until they are needed."""

import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from selfsteer.errors import ArtifactError, ConfigError, DataError, clip, short
from selfsteer.recipe.texts import ENDLESS, is_endless, unfit

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: Bytes of a spool that wait in memory before they go to disk.
SPOOL_BYTES = 1 << 20

#: Levels of lists and objects in a row; Python's own limit depends on where it is read.
DEPTH = 100
_TOO_DEEP = f"lists and objects are nested more than {DEPTH} levels deep"


class Record(Protocol):
    """Anything with a JSONL form."""

    def to_dict(self) -> dict[str, Any]:
        """The JSONL line."""
        ...


class Records(Protocol[T_co]):
    """Sized, and read as often as needed: a list, or records on disk (`Stored`, `Spool`)."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __iter__(self) -> Iterator[T_co]:
        """One after the other, in the same order each time."""
        ...


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def at(items: Iterable[T], positions: Iterable[int]) -> Iterator[T]:
    """The items at these positions, which ascend; nothing after the last is read."""
    rest, before = iter(items), -1
    for position in positions:
        yield next(islice(rest, position - before - 1, None))
        before = position


def dump_line(record: Record | Mapping[str, Any]) -> str:
    """One JSON line, with its line end; the same record always gives the same bytes."""
    value = record if isinstance(record, Mapping) else record.to_dict()
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def dump_lines(records: Iterable[Record | Mapping[str, Any]]) -> str:
    """The text of a JSONL file."""
    return "".join(map(dump_line, records))


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is none, too deep, or holds a number that Python does not read.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"not JSON ({e.msg} at column {e.colno}): {short(text.strip())}") from None
    except RecursionError:
        raise DataError(_TOO_DEEP) from None
    except ValueError as e:  # an integer of more than 4,300 digits
        raise DataError(f"a number cannot be read: {e}") from None
    return shallow(value)


def shallow(value: T) -> T:
    """The value itself, which has at most `DEPTH` levels of lists and objects.

    Raises:
        DataError: it has more.
    """
    level: list[Any] = [value]
    for _ in range(DEPTH + 1):
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return value
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
    raise DataError(_TOO_DEEP)


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold; JSON may have others."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of each non-blank line.

    Raises:
        DataError: the file is unreadable or a line is not a JSON object; names file and line.
    """
    with readable(path), open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = parse(line)
            except DataError as e:
                raise DataError(
                    f"{path}, line {number}: {e}. Each line must be one JSON object."
                ) from None
            if not isinstance(value, dict):
                raise DataError(f"{path}, line {number}: not a JSON object: {short(value)}.")
            yield number, value


def lines(source: Path | bytes) -> Iterator[dict[str, Any]]:
    """JSON objects of a log; a line that is none, or not whole yet, is left out."""
    if isinstance(source, Path):
        source = source.read_bytes() if source.is_file() else b""
    for line in source.split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def read_shards(folder: Path) -> Iterator[dict[str, Any]]:
    """All records of a folder of shards, in order."""
    for shard in sorted(folder.glob("shard-*.jsonl")):
        for _, value in read_jsonl(shard):
            yield value


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the system's refusal to read, or another encoding, into a DataError.

    Pipes and devices are refused: they may never end, and cannot be read a second time.
    """
    try:
        if is_endless(path):
            raise DataError(f"{path} {ENDLESS}.")
        yield
    except UnicodeDecodeError as e:
        if reason := unfit(path):
            raise DataError(f"{path} {reason}.") from None
        raise DataError(
            f"{path} is not UTF-8 text ({e.reason} at byte {e.start}). Convert it to UTF-8, for "
            "example with iconv."
        ) from None
    except OSError as e:
        said = " ".join((e.strerror or str(e)).split()).rstrip(
            "."
        )  # of pyarrow's there is no other
        raise DataError(f"{path} cannot be read: {clip(said, 200)}.") from None


def write_atomic(path: Path, text: str | bytes | Iterable[str], *, sync: bool = True) -> None:
    """Writes to a temporary name in the same folder, syncs, renames.

    Args:
        path: the file; its folder is made if need be.
        text: whole, or in pieces that are written as they come.
        sync: whether it must outlive the machine, not only the process.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written; the old file stays, and
            the temporary one is removed.
    """
    whole = text.encode("utf-8") if isinstance(text, str) else text
    pieces = [whole] if isinstance(whole, bytes) else (piece.encode("utf-8") for piece in whole)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, open(partial, "wb") as file:
            file.writelines(pieces)
            file.flush()
            if sync:
                os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to: it becomes the file, or is removed where the block fails.

    Another process that writes the same file now is waited for.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.is_symlink():  # of a folder from elsewhere; it could lead anywhere
        partial.unlink()
    with _alone(partial):
        try:
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors leaves 0600
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """A block in which no other process writes under this name."""
    while True:
        with open(partial, "ab") as file:
            with suppress(OSError):  # not all file systems have locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(partial, file.fileno()):  # or another process has just renamed it
                yield
                return


def _is_still(path: Path, opened: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(opened))
    return False


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill: it becomes the folder, or is removed where the block fails.

    Raises:
        ConfigError: the folder is there and not empty.
        ArtifactError: another process fills it now, or it cannot be written.
    """
    there = folder.is_dir()  # if empty, perhaps a mount point: nothing can take its place
    partial = folder / ".partial" if there else folder.with_name(f".{folder.name}.partial")

    def refuse_used() -> None:
        if folder.exists() and (not there or {*folder.iterdir()} - {partial}):
            raise ConfigError(f"{folder} is there already; choose another, or move it away.")

    refuse_used()
    with disk_errors(folder, "folder"):
        partial.mkdir(parents=True, exist_ok=True)
    busy = ArtifactError(
        f"Another process writes {folder} now. Wait for it, or choose another folder."
    )
    try:
        held = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:  # it has just become the folder
        raise busy from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise busy from None
        if not _is_still(partial, held):
            raise busy
        for left in partial.iterdir():  # by a kill
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        with all_or_nothing(partial):
            refuse_used()  # by one that ended while this one began
            yield partial
            with disk_errors(folder, "folder"):
                if there:
                    for path in partial.iterdir():
                        path.replace(folder / path.name)
                    partial.rmdir()
                else:
                    partial.replace(folder)
    finally:
        os.close(held)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """As `replacing_folder`; a folder that holds something is filled itself, and nothing removed.

    Raises:
        ArtifactError: as `replacing_folder`.
    """
    if folder.is_dir() and {*folder.iterdir()} - {folder / ".partial"}:
        yield folder
        return
    with replacing_folder(folder) as partial:
        yield partial


@contextmanager
def disk_errors(path: Path, other: str = "runs_dir") -> Iterator[None]:
    """Turns the system's refusal to write into one paragraph.

    Args:
        path: what is written.
        other: what a person chooses to have it written elsewhere.
    """
    try:
        yield
    except Exception as e:
        # safetensors and torch.save report a full disk as errors of their own
        words = ("os error 28", "No space left", "PytorchStreamWriter failed", "unexpected pos")
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(w in str(e) for w in words):
            raise ArtifactError(
                f"The disk is full: {path} could not be written. Everything finished before is "
                "kept; free some room and run the same command again."
            ) from e
        if "(os error 27)" in str(e) or (isinstance(e, OSError) and e.errno == errno.EFBIG):
            raise ArtifactError(
                f"{path} could not be written: it would be larger than a file may be here. "
                "Everything finished before is kept; raise the limit (ulimit -f), or put the run "
                "on a file system that takes larger files (runs_dir), and run the same command "
                "again."
            ) from e
        if not isinstance(e, OSError):
            raise
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise ArtifactError(
                f"{path} cannot be written ({e.strerror}). Choose another {other} or fix the "
                "folder's permissions."
            ) from e
        raise


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[None]:
    """A folder that was not there, or was empty, is removed where the block fails."""
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


# -- records that stay on disk -------------------------------------------------------------------


class Stored(Generic[T]):
    """The records of a JSONL file or of a folder of shards, read anew at each pass.

    Memory holds 8 bytes of each where only some of them are taken, otherwise nothing.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Mapping[str, Any]], T],
        positions: Sequence[int] | None = None,
    ) -> None:
        self.path = path
        self._read = read
        self._positions = positions
        self._count: int | None = None

    def __len__(self) -> int:
        if self._positions is not None:
            return len(self._positions)
        if self._count is None:
            shards = self.path.glob("shard-*.jsonl") if self.path.is_dir() else [self.path]
            self._count = sum(map(_lines, shards))
        return self._count

    def __iter__(self) -> Iterator[T]:
        folder = self.path.is_dir()
        rows = read_shards(self.path) if folder else (v for _, v in read_jsonl(self.path))
        return map(self._read, rows if self._positions is None else at(rows, self._positions))

    def take(self, positions: Iterable[int]) -> "Stored[T]":
        """Some of the records, by their positions in this set, in ascending order."""
        mine = self._positions
        kept = array("q", positions if mine is None else (mine[i] for i in positions))
        return Stored(self.path, self._read, kept)


def _lines(path: Path) -> int:
    with readable(path), open(path, "rb") as file:
        return sum(not line.isspace() for line in file)


class Spool(Sequence[T]):
    """A growing list of records in a temporary JSONL file; memory holds 8 bytes of each.

    Up to `SPOOL_BYTES` are kept in memory. The file has no name and goes with the process.
    """

    def __init__(self, read: Callable[[Mapping[str, Any]], T], folder: Path | None = None) -> None:
        """``folder`` is on the disk that holds the file; None is the system's temporary folder."""
        self._read = read
        self._folder = folder or Path(tempfile.gettempdir())
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(self._folder))  # noqa: SIM115
        self._starts = array("q")
        weakref.finalize(self, self._file.close)

    def append(self, record: Record) -> None:
        """Adds a record as the last one."""
        line = dump_line(record).encode()
        with disk_errors(self._folder):
            self._starts.append(self._file.seek(0, os.SEEK_END))
            self._file.write(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        self._file.seek(self._starts[number])
        return self._read(json.loads(self._file.readline()))
