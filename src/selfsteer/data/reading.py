"""Files of other programs to our records: strict for training, counting for an import."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from selfsteer.data.files import file_rows
from selfsteer.data.jsonl import dump_line
from selfsteer.data.records import Preference, Query, Triple
from selfsteer.data.shapes import SHAPES, Half, Shape, Unusable, shapes_of
from selfsteer.data.stored import Shelf, shelf
from selfsteer.errors import DataError
from selfsteer.terminal import progress_bar

Named = TypeVar("Named", Triple, Preference, Query)

_TRAINABLE = (
    "triples of a run (messages, responses), records of the SSO release (instruction, chosen, "
    "rejected, and p_system, n_system, raw, history, system), preferences (prompt, chosen, "
    "rejected; also as two conversations, as Alpaca or as ShareGPT) or labelled answers (prompt, "
    "completion, label)"
)
_IMPORTABLE = (
    f"{_TRAINABLE}; an import also takes conversations with their answer (messages) and queries "
    "(prompt)"
)


def read_triples(path: Path) -> list[Triple]:
    """Triples of a file, or of a folder of shards; preferences become triples without principles.

    The shapes are those of docs/formats.md. Of *the authors' release*, ``instruction`` (and
    ``input`` on the next line, as in Alpaca) is the last user turn, ``history`` the [user,
    assistant] pairs before it, ``system`` the query's own system message; ``chosen``, ``rejected``
    and ``raw`` are y+, y- and yo. ``p_system`` and ``n_system`` are the whole system messages of
    the good and bad context: where one begins with the query's own system message, that and the
    white space after it are cut off, since our contexts put it there again; where it does not, it
    is kept whole and follows the query's own. Without both, the triple has no principles; an empty
    ``raw`` is an absent one. Features are read from the release's ``principles``; other keys are
    kept as they are.

    The id is ``id``, else the release's ``idx``, else a hash of the messages. Records that share
    one are kept apart by ``-2``, ``-3`` …: a query can carry several triples.

    Raises:
        DataError: unreadable, malformed, of a shape that has no pair, of more than one shape, or
            empty; names the file and the line or entry.
    """
    found: Shelf = []
    first: tuple[Shape, str] | None = None
    for where, record in read_rows(path):
        shape = _trainable(where, record)
        # a record of the release may lack the keys that tell it from Alpaca's
        if first and first[0] is SHAPES["release"] and shape is SHAPES["alpaca"]:
            shape = first[0]
        first = first or (shape, where)
        if shape is not first[0]:
            raise DataError(
                f"{where} is {shape.title}, but {first[1]} is {first[0].title}. "
                "Give one kind of record at a time."
            )
        found.append(_checked(where, shape, record))
    if not found:
        raise DataError(f"{path} holds no record. Give {_TRAINABLE}.")
    if first and first[0] is SHAPES["unpaired"]:
        halves = len(found)
        found = pair_up(found, [])
        if alone := halves - 2 * len(found):
            raise DataError(
                f"{path} has {halves:,} labelled answers, of which {alone:,} have no partner with "
                "the same prompt and the other label. `selfsteer import` keeps the pairs alone."
            )
    triples = [r.to_triple() if isinstance(r, Preference) else r for r in found]
    return list(with_distinct_ids(triples, []))


def _trainable(where: str, record: Mapping[str, Any]) -> Shape:
    found = [name for name in shapes_of(record) if name not in ("chat", "query")]
    if len(found) == 1:
        return SHAPES[found[0]]
    what = "more than one kind of record" if found else "no record that can be trained on"
    raise DataError(
        f"{where} is {what}: its keys are {', '.join(record) or '(none)'}. Give {_TRAINABLE}."
    )


def _checked(
    where: str, shape: Shape, record: Mapping[str, Any]
) -> Triple | Preference | Query | Half:
    try:
        found = shape.read(record)
        # What cannot be written back (half a surrogate pair, NaN) would fail hours later.
        if isinstance(found, Half):
            found.text.encode()
        else:
            dump_line(found).encode()
    except Unusable as e:
        raise Unusable(e.reason, f"{where}: {e}.") from None
    except DataError as e:
        raise DataError(f"{where}: {e}.") from None
    except (TypeError, ValueError) as e:  # Parquet has dates and bytes
        raise DataError(f"{where} cannot be stored as UTF-8 JSON: {e}.") from None
    return found


@dataclass(frozen=True)
class Imported:
    """What an import found; the records are in memory only where they were read so.

    ``n_in == len(records) * (2 if the shape is a labelled answer else 1) + sum(dropped)``.
    """

    shape: str
    records: Sequence[Triple] | Sequence[Preference] | Sequence[Query]
    n_in: int
    dropped: Counter[str]
    examples: list[str]
    left_out: list[str]


def import_records(path: Path, folder: Path | None = None) -> Imported:
    """Reads a file or a folder of any shape of docs/formats.md; what cannot be used is counted.

    The shape is that of the first record that has one. Dropped are ``unknown_shape`` and
    ``other_shape`` (of another than the first), ``malformed``, ``prompts_differ``,
    ``not_rated_higher`` (see `shapes.read_pair`) and ``unpaired`` (a labelled answer without its
    partner). ``examples`` has the first of each reason in words, ``left_out`` the keys
    that our records have no place for. Two labelled answers make one
    preference; a conversation with its answer makes a triple with a good response only.

    Args:
        path: what to read.
        folder: where the records wait on disk; memory then holds about 0.4 kB of each. None: they
            are all in memory.

    Raises:
        DataError: the file is unreadable, or nothing is left of it; lists the drops.
    """
    found = shelf(folder)
    n_in = 0
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    lost: Counter[str] = Counter()
    shape: Shape | None = None

    def drop(reason: str, said: str) -> None:
        dropped[reason] += 1
        examples.setdefault(reason, said)

    with progress_bar("import", None) as bar:
        for n_in, (where, record) in enumerate(read_rows(path), 1):  # noqa: B007
            bar.advance(1)
            names = shapes_of(record)
            if shape is SHAPES["release"] and names == ["alpaca"]:
                names = ["release"]
            if len(names) != 1:
                keys = ", ".join(record) or "(none)"
                drop("unknown_shape", f"{where} is no record of a known shape: its keys are {keys}")
                continue
            shape = shape or SHAPES[names[0]]
            if SHAPES[names[0]] is not shape:
                other = SHAPES[names[0]].title
                drop("other_shape", f"{where} is {other}, the first record is {shape.title}")
                continue
            try:
                one = _checked(where, shape, record)
            except DataError as e:
                drop(e.reason if isinstance(e, Unusable) else "malformed", str(e).rstrip("."))
                continue
            found.append(one)
            kept = {} if isinstance(one, Half) else one.extra
            lost.update(record.keys() - shape.reads - kept.keys())
    if shape is SHAPES["unpaired"]:
        halves, found = found, pair_up(found, shelf(folder))
        alone = len(halves) - 2 * len(found)
        dropped.update({"unpaired": alone} if alone else {})
    if shape is None or not found:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
        first = "".join(f" {said}." for said in list(examples.values())[:1])
        raise DataError(
            f"Of the {n_in:,} records of {path} none can be used ({reasons or 'it is empty'})."
            f"{first} Give {_IMPORTABLE}."
        )
    records = with_distinct_ids(found, shelf(folder))
    left_out = [
        f"{n:,} of {n_in:,} records: the key {key!r} is left out."
        for key, n in sorted(lost.items())
    ]
    return Imported(shape.title, records, n_in, dropped, list(examples.values()), left_out)


def pair_up(halves: Sequence[Half], pairs: Shelf) -> Shelf:
    """Joins labelled answers of one prompt and id, the n-th good with the n-th bad one.

    Puts the preferences on ``pairs``, in the order of the first half of each prompt and id.
    """
    groups: dict[bytes, int] = {}
    members = array("q")  # the group of each half
    for half in halves:
        prompt = "\0".join(f"{m.role}\0{m.content}" for m in half.prompt)
        key = hashlib.sha256(f"{half.id}\0{prompt}".encode()).digest()[:16]
        members.append(groups.setdefault(key, len(groups)))
    for _, numbers in groupby(
        sorted(range(len(members)), key=members.__getitem__), members.__getitem__
    ):
        sides: dict[bool, list[Half]] = {True: [], False: []}
        for number in numbers:
            sides[halves[number].label].append(halves[number])
        for good, bad in zip(sides[True], sides[False], strict=False):
            pairs.append(Preference(good.id, good.prompt, good.text, bad.text))
    return pairs


def with_distinct_ids(records: Sequence[Named], renamed: Shelf) -> Sequence[Named]:
    """The records, later ones of the same id renamed ``-2``, ``-3`` … around the ids given.

    Where some are renamed, all are put on ``renamed``.
    """
    taken = {r.id for r in records}
    if len(taken) == len(records):
        return records
    seen: Counter[str] = Counter()
    for record in records:
        identity = record.id
        seen[record.id] += 1
        if seen[record.id] > 1:
            while (identity := f"{record.id}-{seen[record.id]}") in taken:
                seen[record.id] += 1
        renamed.append(record if identity == record.id else replace(record, id=identity))
    return renamed


# -- files ---------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line, entry or row, object) of JSON, JSONL or Parquet, or of a folder of shards.

    Raises:
        DataError: unreadable; names the file and the line or entry.
    """
    if not path.is_dir():
        yield from file_rows(path)
        return
    shards = sorted(path.glob("shard-*.jsonl")) or sorted(path.glob("data/*.parquet"))
    if not shards:
        raise DataError(
            f"{path} holds no shard-*.jsonl and no data/*.parquet. Give a file, or the folder of "
            "a run that holds the shards, for example iteration-1/triples."
        )
    for shard in shards:
        yield from file_rows(shard)
