"""Records that stay on disk: a stage reads them one by one, as often as it needs to.

Memory does not grow with their number, but for 8 bytes each where only some of them are taken.
"""

import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from selfsteer.data.jsonl import T, at, disk_errors, read_jsonl
from selfsteer.run.folder import read_shards


class Stored(Generic[T]):
    """The records of a JSONL file or of a folder of shards, read anew at each pass."""

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
            shards = sorted(self.path.glob("shard-*.jsonl")) if self.path.is_dir() else [self.path]
            self._count = sum(map(_lines, shards))
        return self._count

    def __iter__(self) -> Iterator[T]:
        folder = self.path.is_dir()
        rows = read_shards(self.path) if folder else (v for _, v in read_jsonl(self.path))
        return map(self._read, rows if self._positions is None else at(rows, self._positions))

    def take(self, positions: Iterable[int]) -> "Stored[T]":
        """Some of the records, by their places in this set, which ascend."""
        mine = self._positions
        kept = array("q", positions if mine is None else (mine[i] for i in positions))
        return Stored(self.path, self._read, kept)


def _lines(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return sum(not line.isspace() for line in file)
    except OSError:
        return sum(1 for _ in read_jsonl(path))  # fails with a better message


class Spool(Sequence[T]):
    """Records that wait in a file without a name until they are needed, by number.

    The file is gone when nobody needs it any more, or when the process ends.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the file in ``folder``, whose disk must hold the records once more."""
        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._starts = array("q")
        self._end = 0
        weakref.finalize(self, self._file.close)

    def append(self, record: T) -> None:
        """Writes a record down, as the last one."""
        data = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        with disk_errors(self._folder):
            self._file.seek(self._end)
            self._file.write(data)
        self._starts.append(self._end)
        self._end += len(data)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        self._file.seek(self._starts[number])
        return pickle.load(self._file)


#: Where records wait, by number.
Shelf = Spool[Any] | list[Any]


def shelf(folder: Path | None) -> Shelf:
    """An empty one: on the disk of ``folder``, or in memory where there is none."""
    return [] if folder is None else Spool(folder)
