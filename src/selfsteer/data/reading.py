"""Many rows to records: lines named, drops counted and kept, whole files imported."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from selfsteer.data.files import read_rows
from selfsteer.data.jsonl import Spool
from selfsteer.data.records import Dropped, Message, Preference, Triple
from selfsteer.data.shapes import HALF_TITLE, RELEASE_TITLE, Read, Record, Row, Unusable, record
from selfsteer.errors import DataError
from selfsteer.terminal import progress_bar

T = TypeVar("T")


class Drops:
    """What was left out: counts by reason, the first of each in words, the records on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.records: Spool[Dropped] = Spool(lambda value: Dropped(**value), folder)

    def add(self, reason: str, identity: str, row: Row | None = None, said: str = "") -> None:
        """Counts one; ``said`` is the reason in words, with the place."""
        self.counts[reason] += 1
        if said:
            self.examples.setdefault(reason, said)
        try:
            self.records.append(Dropped(identity, reason, row))
        except (TypeError, ValueError):  # a date, half a surrogate pair
            self.records.append(Dropped(identity, reason))


def read(
    source: Iterable[tuple[str, Row]],
    parse: Callable[[Row], T],
    drops: Drops | None = None,
    fatal: Container[str] = (),
) -> Iterator[tuple[str, T]]:
    """(where it stands, what ``parse`` makes of it) of each row that can be read.

    Shows a progress bar.

    Args:
        source: of `selfsteer.data.files.read_rows`.
        parse: raises `Unusable` or another DataError, which counts as ``malformed``.
        drops: gets the rows that cannot be read; None: the first of them is an error.
        fatal: reasons that are an error all the same.

    Raises:
        DataError: names the file and the line or entry.
    """
    with progress_bar("reading", None) as bar:
        for where, row in source:
            bar.advance(1)
            try:
                made = parse(row)
            except DataError as e:
                reason = e.reason if isinstance(e, Unusable) else "malformed"
                if drops is None or reason in fatal:
                    raise DataError(f"{where}: {e}.") from None
                drops.add(reason, where, row, f"{where}: {e}")
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
    """What an import found; the records wait on disk.

    ``n_in == len(records) * (2 if the rows are labelled answers else 1) + sum(dropped)``.
    """

    shape: str
    records: Sequence[Record]
    n_in: int
    dropped: Counter[str]
    examples: list[str]
    left_out: list[str]


def import_records(
    source: str | Path, folder: Path | None = None, *, strict: bool = False
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
        strict: whether the first row that cannot be trained on is an error.

    Raises:
        DataError: it is unreadable, or nothing is left of it; lists the drops.
    """
    drops, lost, shape, n_in = Drops(folder), Counter[str](), "", 0
    found: Spool[Any] | None = None
    waiting: dict[tuple[Any, ...], list[Triple]] = {}

    def of_one_shape(row: Row) -> Read:
        nonlocal shape
        made = record(row, release=shape == RELEASE_TITLE)
        if strict and made.title in ("query", "answered query"):
            raise DataError(
                f"no record that can be trained on, its keys are {', '.join(row)}. Give "
                f"{_TRAINABLE}"
            )
        if shape and made.title != shape:
            raise Unusable("other_shape", f"{made.title}, but the first record is: {shape}")
        shape = made.title
        return made

    for _, made in read(read_rows(source), of_one_shape, None if strict else drops):
        n_in += 1
        lost.update(made.lost)
        one = _join(made.record, waiting) if shape == HALF_TITLE else made.record
        if one is not None:
            found = Spool(type(one).from_dict, folder) if found is None else found
            found.append(one)
    n_in += drops.counts.total()
    if alone := sum(map(len, waiting.values())):
        if strict:
            raise DataError(
                f"{source} has {n_in:,} labelled answers, of which {alone:,} have no partner with "
                "the same prompt and the other label. `selfsteer import` keeps the pairs alone."
            )
        drops.counts["unpaired"] += alone
    if found is None:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in drops.counts.most_common())
        first = "".join(f" {said}." for said in list(drops.examples.values())[:1])
        raise DataError(
            f"Of the {n_in:,} records of {source} none can be used ({reasons or 'it is empty'})."
            f"{first} Give {_TRAINABLE}; an import also takes conversations with their answer "
            "(messages) and queries (prompt)."
        )
    left_out = [
        f"{n:,} of {n_in:,} records: the key {key!r} is left out."
        for key, n in sorted(lost.items())
    ]
    records = _with_distinct_ids(found, folder)
    return Imported(shape, records, n_in, drops.counts, list(drops.examples.values()), left_out)


def read_triples(source: str | Path) -> list[Triple]:
    """The triples of a file or folder; preferences become triples without principles.

    Raises:
        DataError: unreadable, empty, or a row that is malformed, has no pair or is of another shape
            than the first; names the file and the line or entry.
    """
    found = import_records(source, strict=True).records
    return [r.to_triple() if isinstance(r, Preference) else r for r in found]  # type: ignore[misc]


def _join(half: Any, waiting: dict[tuple[Any, ...], list[Triple]]) -> Preference | None:
    """The preference that a labelled answer makes with one that waits; else it waits too."""
    key: tuple[str, tuple[Message, ...]] = (half.id, half.messages)
    mates = waiting.setdefault(key, [])
    if not mates or mates[0].responses.keys() == half.responses.keys():
        mates.append(half)
        return None
    texts = {**mates.pop(0).responses, **half.responses}
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
