"""Many rows to records: lines named, drops counted and kept, whole files imported."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from selfsteer.data.files import Row, Rows, Unusable, read_rows
from selfsteer.data.jsonl import Spool
from selfsteer.data.records import Dropped, Message, Preference, Triple
from selfsteer.data.shapes import (
    HALF_TITLE,
    RELEASE_TITLE,
    Read,
    Record,
    ranked,
    record,
    unfolded,
)
from selfsteer.errors import DataError, short
from selfsteer.terminal import progress_bar, warn

T = TypeVar("T")

#: Rows of each reason whose places are named.
PLACES = 3


class Drops:
    """What was left out: counts by reason, the first of each in words, the records on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.records: Spool[Dropped] = Spool(lambda value: Dropped(**value), folder)
        self._said: dict[str, str] = {}
        self._places: dict[str, list[str]] = {}
        self._unreadable = 0

    def add(self, reason: str, identity: str, row: Row | None = None, said: str = "") -> None:
        """Counts one; ``said`` tells what is wrong with a row that stands at ``identity``."""
        self.counts[reason] += 1
        if said:
            self._unreadable += 1
            self._said.setdefault(reason, said)
            places = self._places.setdefault(reason, [])
            if len(places) < PLACES:
                places.append(identity)
        try:
            self.records.append(Dropped(identity, reason, row))
        except (TypeError, ValueError):  # a date, half a surrogate pair
            self.records.append(Dropped(identity, reason))

    @property
    def examples(self) -> list[str]:
        """What is wrong with the first row of each reason, and where the next ones stand."""
        return [
            f"{places[0]}: {self._said[reason]}"
            + "".join(f"; also {place.rpartition(', ')[2]}" for place in places[1:])
            for reason, places in self._places.items()
        ]

    def warn_if_most(self, source: str | Path, read: int) -> None:
        """Warns if more than half of the rows of a source could not be used."""
        if 2 * self._unreadable > read:
            warn(
                f"{self._unreadable:,} of the {read:,} rows of {source} cannot be used: "
                f"{self.summary}. Is it the right file?"
            )

    @property
    def summary(self) -> str:
        """The counts in words."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common())


def read(
    source: Rows, parse: Callable[[Row], T], drops: Drops | None = None
) -> Iterator[tuple[str, T]]:
    """(where it stands, what ``parse`` makes of it) of each row that can be read.

    Shows a progress bar.

    Args:
        source: of `selfsteer.data.files.read_rows`.
        parse: raises `Unusable` or another DataError, which counts as ``malformed``.
        drops: gets the rows that cannot be read; None: the first of them is an error.

    Raises:
        DataError: names the file and the line or entry.
    """
    with progress_bar("reading", None) as bar:
        for where, row in source:
            bar.advance(1)
            try:
                if isinstance(row, DataError):
                    raise row
                made = parse(row)
            except DataError as e:
                if drops is None:
                    raise DataError(f"{where}: {e}.") from None
                reason = e.reason if isinstance(e, Unusable) else "malformed"
                drops.add(reason, where, None if isinstance(row, DataError) else row, str(e))
                continue
            yield where, made


_TRAINABLE = (
    "triples of a run (messages, responses), records of the SSO release (instruction, chosen, "
    "rejected, and p_system, n_system, raw, history, system), preferences (prompt, chosen, "
    "rejected; also as two conversations, as Alpaca or as ShareGPT) or labelled answers (prompt, "
    "completion, label)"
)


@dataclass(frozen=True)
class Imported:
    """What an import found; the records, and what was dropped, wait on disk.

    A row that holds several records counts as several.
    ``n_in == len(records) * (2 if the rows are labelled answers else 1) + sum(dropped)``.
    """

    shape: str
    records: Sequence[Record]
    n_in: int
    dropped: Counter[str]
    examples: list[str]
    left_out: list[str]
    drops: Sequence[Dropped] = ()


def import_records(
    source: str | Path,
    folder: Path | None = None,
    *,
    rename: Mapping[str, str] | None = None,
    trainable: bool = False,
) -> Imported:
    """Reads rows of any shape of docs/formats.md; what cannot be used is counted.

    The shape is that of the first row that has one. Beside the reasons of `record`, rows are
    dropped as ``malformed``, ``other_shape`` (than the first) and ``unpaired`` (a labelled answer
    without its partner: the n-th good one and the n-th bad one of a prompt and id make a
    preference). Records that share an id are kept apart by ``-2``, ``-3`` …

    Args:
        source: see `selfsteer.data.files.read_rows`.
        folder: on whose disk the records wait; None is the system's temporary folder. Memory holds
            about 0.1 kB of each, and labelled answers until their partner comes.
        rename: old to new names of columns.
        trainable: whether rows without two answers are dropped, as ``no_pair``.

    Raises:
        ConfigError: a column that is to be renamed is not there.
        DataError: it is unreadable, or nothing is left of it; lists the drops.
    """
    drops, lost, shape, n_in = Drops(folder), Counter[str](), "", 0
    found: Spool[Any] | None = None
    waiting: dict[tuple[Any, ...], list[tuple[str, Triple]]] = {}

    def of_one_shape(row: Row) -> Read:
        nonlocal shape
        made = record(row, release=shape == RELEASE_TITLE)
        if trainable and made.title in ("query", "answered query"):
            raise Unusable("no_pair", f"{made.title}, not two answers to one prompt")
        if shape and made.title != shape:
            raise Unusable("other_shape", f"{made.title}, but the first record is: {shape}")
        shape = made.title
        return made

    rows = unfolded(read_rows(source, rename=rename), ranked)
    for where, made in read(rows, of_one_shape, drops):
        n_in += 1
        lost.update(made.lost)
        half = shape == HALF_TITLE
        one = _join(where, made.record, waiting) if half else made.record
        if one is not None:
            found = Spool(type(one).from_dict, folder) if found is None else found
            found.append(one)
    n_in += drops.counts.total()
    for where, alone in (half for halves in waiting.values() for half in halves):
        said = "a labelled answer without one of the same prompt and the other label"
        drops.add("unpaired", where, alone.to_dict(), said)
    if found is None:
        first = "".join(f" {said}." for said in drops.examples[:1])
        raise DataError(
            f"Of the {n_in:,} records of {source} none can be used "
            f"({drops.summary or 'it is empty'}).{first} Give {_TRAINABLE}"
            + (
                "."
                if trainable
                else "; an import also takes conversations with their answer "
                "(messages) and queries (prompt)."
            )
        )
    drops.warn_if_most(source, n_in)
    left_out = [
        f"{n:,} of {n_in:,} records: the key {short(key)} is left out."
        for key, n in sorted(lost.items())
    ]
    records = _with_distinct_ids(found, folder)
    return Imported(shape, records, n_in, drops.counts, drops.examples, left_out, drops.records)


def _join(
    where: str, half: Any, waiting: dict[tuple[Any, ...], list[tuple[str, Triple]]]
) -> Preference | None:
    """The preference that a labelled answer makes with one that waits; else it waits too."""
    key: tuple[str, tuple[Message, ...]] = (half.id, half.messages)
    mates = waiting.setdefault(key, [])
    if not mates or mates[0][1].responses.keys() == half.responses.keys():
        mates.append((where, half))
        return None
    texts = {**mates.pop(0)[1].responses, **half.responses}
    if not mates:
        del waiting[key]
    return Preference(half.id, half.messages, texts["good"], texts["bad"])


def _with_distinct_ids(found: Spool[Any], folder: Path | None) -> Spool[Any]:
    """The records, later ones of the same id renamed ``-2``, ``-3`` … around the ids given."""
    taken = {r.id for r in found}
    if len(taken) == len(found):
        return found
    renamed: Spool[Any] = Spool(type(found[0]).from_dict, folder)
    seen: Counter[str] = Counter()
    for one in found:
        seen[one.id] += 1
        others = (f"{one.id}-{n}" for n in count(seen[one.id]))
        identity = one.id if seen[one.id] == 1 else next(o for o in others if o not in taken)
        taken.add(identity)
        renamed.append(replace(one, id=identity))
    return renamed
