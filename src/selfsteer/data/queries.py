"""Query sets: read, curated, split; what is left out is counted by reason and kept."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer.data.curate import (
    Contamination,
    Duplicates,
    NearDuplicates,
    Overlap,
    bounds,
    held_out,
)
from selfsteer.data.digests import MISSING, digest_path
from selfsteer.data.files import HubName, read_rows, refuse_rereading
from selfsteer.data.jsonl import Spool, dump_line, write_atomic
from selfsteer.data.reading import Drops, read
from selfsteer.data.records import Dropped, Query
from selfsteer.data.shapes import asked, asked_columns, unfolded
from selfsteer.errors import ConfigError, DataError, short
from selfsteer.recipe.sections import Queries, resolve_path
from selfsteer.terminal import progress_bar


class Loaded(NamedTuple):
    """A query set: queries in id order, drops by reason, and what else was found.

    ``answers_cut`` counts kept queries after whose last user turn an answer was cut off;
    ``overlaps`` are the pairs that made queries ``contaminated``; ``not_compared`` counts the rows
    of evaluation sets that hold no query to compare with, by reason; ``left_out`` are the dropped
    records one by one, those beyond the limit by file and line alone; ``examples`` says what is
    wrong with the rows that cannot be used; ``commit`` is that of a data set on the hub, if known.
    """

    queries: Sequence[Query]
    dropped: Counter[str]
    answers_cut: int
    overlaps: list[Overlap]
    not_compared: Counter[str]
    left_out: Sequence[Dropped]
    examples: list[str]
    commit: str | None


def load_queries(settings: Queries, folder: Path | None = None) -> Loaded:
    """Reads and curates a query set.

    In reading order each query is checked for its bounds, duplicates, contamination and the limit,
    the first reason counts. Near-duplicates are then dropped in id order, so that the limit is an
    upper bound.

    Args:
        settings: what to read and to keep.
        folder: on whose disk the queries wait; None is the system's temporary folder. Memory holds
            about 0.4 kB of each, and with ``near_duplicates`` another 7 kB.

    Raises:
        ConfigError: a split of a file, or a column that is not there.
        DataError: unreadable, or no query is left; names the reasons.
    """
    path = resolve_path(settings.path)
    streamed = not Path(path).exists()
    split = settings.split if "split" in settings.model_fields_set else None
    if "split" in settings.model_fields_set and not streamed:
        raise ConfigError(
            f"split {short(settings.split)} has no effect: {settings.path} is not a datasets name "
            "but a file or folder, all of which is read. Remove it."
        )
    out_of_bounds = bounds(settings.min_chars, settings.max_chars, settings.scripts)
    duplicates = Duplicates()
    evaluation, not_compared = contamination(settings)
    drops, overlaps = Drops(folder), list[Overlap]()
    found: Spool[Query] = Spool(Query.from_dict, folder)
    numbers: dict[str, int] = {}
    answered: set[str] = set()
    rows = read_rows(path, split=split, columns=asked_columns, rename=settings.columns)
    source = iter(unfolded(rows))
    for where, (query, answer, _) in read(source, asked, drops):
        reason = out_of_bounds(query) or duplicates.add(query)
        if reason is None and len(evaluation) and (pairs := evaluation.find(query)):
            overlaps += pairs
            reason = "contaminated"
        if reason is not None:
            drops.add(reason, query.id, query.to_dict())
            continue
        if query.id in numbers:
            said = f"the id {short(query.id)} is already that of another query"
            drops.add("repeated_id", where, query.to_dict(), said)
            continue
        numbers[query.id] = len(found)
        found.append(query)
        if answer is not None:
            answered.add(query.id)
        if len(found) == settings.limit:
            break
    if not streamed:  # the rest of a data set of any size is not fetched to be counted
        for where, _ in source:
            drops.add("over_limit", where)
    kept: Spool[Query] = Spool(Query.from_dict, folder)
    in_order = array("q", (numbers[i] for i in sorted(numbers)))
    del numbers, duplicates  # most of the memory that grows with the queries
    threshold, answers_cut = settings.near_duplicates, 0
    index = None if threshold is None else NearDuplicates(threshold, kept)
    with progress_bar("near-duplicates" if index else "sorting", len(found)) as bar:
        for query in map(found.__getitem__, in_order):
            bar.advance(1)
            if index is None:
                kept.append(query)
            elif index.add(query) is not None:
                drops.add("near_duplicate", query.id, query.to_dict())
                continue
            answers_cut += query.id in answered
    if not kept:
        raise DataError(_nothing_left(settings.path, drops))
    drops.warn_if_most(settings.path, len(found) + drops.counts.total())
    commit = HubName.read(path, split).commit if streamed else None
    return Loaded(
        *(kept, drops.counts, answers_cut, overlaps, not_compared),
        *(drops.records, drops.examples, commit),
    )


def _nothing_left(path: str, drops: Drops) -> str:
    if not drops.counts:
        return (
            f"{path} holds no query. Give one JSON object per line, for example "
            '{"prompt": "Why is the sky blue?"}.'
        )
    cause = f"{drops.examples[0]}." if drops.examples else "Loosen what dropped them."
    return f"{path} has no query left: {drops.summary}. {cause}"


def write_curated(settings: Queries, to: Path, holdout: float | None) -> dict[str, Any]:
    """Curates a query set into ``to``, the hold-out and the contaminated pairs beside it.

    Args:
        settings: what to read and to keep.
        to: a JSONL file; ``NAME.holdout.jsonl`` and ``NAME.contaminated.jsonl`` are named after it.
        holdout: share of the queries that goes into the hold-out, in (0, 1); None: no hold-out.

    Returns:
        Counts, pairs, and the files written.

    Raises:
        ConfigError: an output is an input, beside one in its folder, or no .jsonl, or the share is
            not one.
        DataError: see `load_queries`; or a side of the split is empty.
    """
    if holdout is not None and not 0 < holdout < 1:
        raise ConfigError(f"--holdout must be a share between 0 and 1, found {holdout:g}.")
    if to.suffix != ".jsonl":
        raise ConfigError(f"{to} would hold JSONL; choose a --to that ends in .jsonl.")
    files = {"queries": to}
    if holdout is not None:
        files["holdout"] = to.with_name(f"{to.stem}.holdout.jsonl")
    elif (stale := to.with_name(f"{to.stem}.holdout.jsonl")).exists():
        raise ConfigError(
            f"{stale} is there, and without --holdout its queries would be in {to} as well. Give "
            "the same --holdout again, choose another --to, or move that file away."
        )
    if settings.against:
        files["contaminated"] = to.with_name(f"{to.stem}.contaminated.jsonl")
    refuse_rereading((settings.path, *settings.against), files.values())
    loaded = load_queries(settings, to.absolute().parent)
    out = bytearray(len(loaded.queries))
    if holdout is not None:
        out = bytearray(held_out(q, holdout) for q in loaded.queries)
    counts = {"queries": out.count(0), "holdout": out.count(1)}
    for side, count in counts.items():
        if holdout is not None and not count:
            raise DataError(
                f"A hold-out of {holdout:g} leaves no query on the side of '{side}': there are "
                f"only {len(loaded.queries):,}. Choose another share, or leave it out."
            )
    written: dict[str, Iterable[Any]] = {
        "contaminated": loaded.overlaps,
        "queries": compress(loaded.queries, (not held for held in out)),
        "holdout": compress(loaded.queries, out),
    }
    for name, file in files.items():
        write_atomic(file, map(dump_line, written[name]))
    return {
        "read": len(loaded.queries) + loaded.dropped.total(),
        **counts,
        "dropped": dict(loaded.dropped.most_common()),
        "examples": loaded.examples,
        "answers_cut": loaded.answers_cut,
        "contaminated": [pair.to_dict() for pair in loaded.overlaps],
        "not_compared": dict(loaded.not_compared),
        "files": {name: str(file) for name, file in files.items()},
    }


def contamination(settings: Queries) -> tuple[Contamination, Counter[str]]:
    """The evaluation sets that queries must not overlap with, indexed; empty without any.

    Returns:
        The index, and the rows that hold no query to compare with, by reason.

    Raises:
        DataError: one of them cannot be read, or holds no query at all.
    """
    index, drops = Contamination(settings.ngram), Drops()
    for name in settings.against:
        before = len(index)
        rows = unfolded(read_rows(resolve_path(name), columns=asked_columns))
        for _, (query, *_) in read(rows, asked, drops):
            index.add(name, query)
        if len(index) == before:
            raise DataError(
                f"The evaluation set {name} holds no query, so nothing would be kept apart from "
                f"it{f' ({drops.examples[0]})' if drops.examples else ''}. Fix it, or remove it "
                "from 'against'."
            )
    return index, drops.counts


def queries_digest(settings: Queries) -> list[str]:
    """Identifies the query set and the evaluation sets.

    A file or folder counts by its content, a data set on the hub by its name, which has a revision
    where one is given.

    Raises:
        ConfigError: see `HubName.read`.
    """
    split = settings.split if "split" in settings.model_fields_set else None
    return [_identity(settings.path, split), *map(_identity, settings.against)]


def _identity(name: str, split: str | None = None) -> str:
    path = Path(resolve_path(name))
    if path.exists():
        return digest_path(path)
    try:
        return f"hub:{HubName.read(str(path), split)}"
    except DataError:
        return f"{MISSING}{name}"  # whoever reads it says so
