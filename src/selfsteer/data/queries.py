"""Loads query sets of every common shape and curates them; what is left out is counted by reason.

| shape | a row is one if it has | the query |
|---|---|---|
| preference | `chosen`, `rejected`, `completions` or `prompt_id` | `prompt` or `instruction`, else the turns of `chosen` before its answer |
| ShareGPT | `conversations` | the turns up to the last human one, `system` before them |
| own | `prompt` (text or chat) or `messages` | that, `system` before it |
| Alpaca | `instruction` | `instruction`, a non-empty `input` on the next line, `history` and `system` before them |

The first shape that fits is taken.
"""  # noqa: E501

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer.data import curate
from selfsteer.data.digests import digest_path
from selfsteer.data.files import file_rows
from selfsteer.data.jsonl import dump_line, write_atomic
from selfsteer.data.records import Message, Query
from selfsteer.data.stored import shelf
from selfsteer.errors import ConfigError, DataError
from selfsteer.recipe.sections import Queries, resolve_path
from selfsteer.terminal import progress_bar

_ANSWERED = ("chosen", "rejected", "completions", "prompt_id")
_COLUMNS = {"id", "prompt", "messages", "system", "instruction", "input", "history"}
_COLUMNS |= {"conversations", *_ANSWERED}

#: Where they are there but empty, the row is an empty query.
_TEXTS = ("prompt", "instruction")

_SHARDS = (".parquet", ".jsonl", ".csv")

_SPEAKERS = {"human": "user", "user": "user", "system": "system"}
_SPEAKERS |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant")


class Loaded(NamedTuple):
    """A query set: queries in id order, drops by reason, and what else was found.

    ``answers_cut`` counts kept queries behind whose last user turn an answer was cut off;
    ``overlaps`` are the pairs that made queries ``contaminated``; ``not_compared`` counts the rows
    of evaluation sets that hold no query to compare with, by reason.
    """

    queries: Sequence[Query]
    dropped: Counter[str]
    answers_cut: int
    overlaps: list[curate.Overlap]
    not_compared: Counter[str]


def load_queries(settings: Queries, folder: Path | None = None) -> Loaded:
    """Reads and curates a query set.

    In reading order each query is checked for its bounds, duplicates, contamination and the limit,
    the first reason counts. Near-duplicates are then dropped in id order, so that the limit is an
    upper bound.

    Args:
        settings: what to read and to keep.
        folder: where the queries wait on disk; memory then holds about 0.5 kB of each, and the
            index of near-duplicates another 1 kB. None: they are all in memory.

    Raises:
        ConfigError: a split of a file.
        DataError: unreadable, malformed (names file and line), empty, or two different queries
            with one id.
    """
    path = resolve_path(settings.path)
    if "split" in settings.model_fields_set and Path(path).exists():
        raise ConfigError(
            f"split {settings.split!r} has no effect: {settings.path} is no datasets name but a "
            "file or folder, all of which is read. Remove it."
        )
    streamed = not Path(path).exists()
    out_of_bounds = curate.bounds(settings.min_chars, settings.max_chars, settings.scripts)
    duplicates = curate.Duplicates()
    evaluation, not_compared = contamination(settings)
    found = shelf(folder)
    numbers: dict[str, int] = {}
    dropped: Counter[str] = Counter()
    overlaps: list[curate.Overlap] = []
    cut: set[str] = set()
    for where, row in _counted(_rows(path, settings.split)):
        if settings.limit is not None and len(found) == settings.limit:
            if streamed:  # the rest of a data set of any size is not fetched to be counted
                break
            dropped["over_limit"] += 1
            continue
        parsed = _parse(where, row)
        if isinstance(parsed, str):
            dropped[parsed] += 1
            continue
        query, answer_cut = parsed
        reason = out_of_bounds(query) or duplicates.add(query)
        if reason is None and len(evaluation) and (pairs := evaluation.find(query)):
            overlaps += pairs
            reason = "contaminated"
        if reason is not None:
            dropped[reason] += 1
            continue
        if query.id in numbers:
            raise DataError(
                f"{where}: the id {query.id!r} is already that of another query. Make ids unique, "
                "or leave them out."
            )
        numbers[query.id] = len(found)
        found.append(query)
        if answer_cut:
            cut.add(query.id)
    kept = shelf(folder)
    in_order = array("q", (numbers[i] for i in sorted(numbers)))
    del numbers, duplicates  # most of the memory that grows with the queries
    threshold = settings.near_duplicates
    index = None if threshold is None else curate.NearDuplicates(threshold, kept)
    with progress_bar("near-duplicates" if index else "sorting", len(found)) as bar:
        for n in in_order:
            if index is None:
                kept.append(found[n])
            elif index.add(found[n]) is not None:
                dropped["near_duplicate"] += 1
            bar.advance(1)
    if not kept:
        if dropped:
            drops = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
            raise DataError(
                f"{settings.path} has no query left: {drops}. Loosen what dropped them."
            )
        raise DataError(
            f"{settings.path} holds no query. Give one JSON object per line, for example "
            '{"prompt": "Why is the sky blue?"}.'
        )
    answers_cut = sum(q.id in cut for q in kept) if cut else 0
    return Loaded(kept, dropped, answers_cut, overlaps, not_compared)


def _counted(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Any]]:
    with progress_bar("reading queries", None) as bar:
        for row in rows:
            yield row
            bar.advance(1)


def write_curated(settings: Queries, to: Path, holdout: float | None) -> dict[str, Any]:
    """Curates a query set into ``to``, the hold-out and the contaminated pairs beside it.

    Args:
        settings: what to read and to keep.
        to: a JSONL file; ``NAME.holdout.jsonl`` and ``NAME.contaminated.jsonl`` are named after it.
        holdout: share of the queries that goes into the hold-out, in (0, 1); None: no hold-out.

    Returns:
        Counts, pairs, and the files written.

    Raises:
        ConfigError: the output is the input or no .jsonl, or the share is not one.
        DataError: see `load_queries`; or a side of the split is empty.
    """
    if holdout is not None and not 0 < holdout < 1:
        raise ConfigError(f"--holdout must be a share between 0 and 1, found {holdout:g}.")
    if to.suffix != ".jsonl":
        raise ConfigError(f"{to} would hold JSONL; choose a --to that ends in .jsonl.")
    sources = (settings.path, *settings.against)
    files = {"queries": to}
    if holdout is not None:
        files["holdout"] = to.with_name(f"{to.stem}.holdout.jsonl")
    if settings.against:
        files["contaminated"] = to.with_name(f"{to.stem}.contaminated.jsonl")
    for file in files.values():
        if any(Path(s).resolve() == file.resolve() for s in sources):
            raise ConfigError(f"{file} is read here and cannot be written; choose another --to.")
    loaded = load_queries(settings, to.absolute().parent)
    out = bytearray(len(loaded.queries))
    if holdout is not None:
        out = bytearray(curate.held_out(q, holdout) for q in loaded.queries)
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
        "read": len(loaded.queries) + sum(loaded.dropped.values()),
        **counts,
        "dropped": dict(loaded.dropped.most_common()),
        "answers_cut": loaded.answers_cut,
        "contaminated": [pair.to_dict() for pair in loaded.overlaps],
        "not_compared": dict(loaded.not_compared),
        "files": {name: str(file) for name, file in files.items()},
    }


def contamination(settings: Queries) -> tuple[curate.Contamination, Counter[str]]:
    """The evaluation sets that queries must not overlap with, indexed; empty without any.

    Returns:
        The index, and the rows that hold no query to compare with, by reason.

    Raises:
        DataError: one of them cannot be read, or holds no query at all.
    """
    index, left_out = curate.Contamination(settings.ngram), Counter[str]()
    for name in settings.against:
        before = len(index)
        for where, row in _counted(_rows(*_named_split(name))):
            found = _parse(where, row)
            if isinstance(found, str):
                left_out[found] += 1
            else:
                index.add(name, found[0])
        if len(index) == before:
            raise DataError(
                f"The evaluation set {name} holds no query, so nothing would be kept apart from "
                "it. Mend it, or take it out of 'against'."
            )
    return index, left_out


def queries_digest(settings: Queries) -> list[str]:
    """Identifies the query set and the evaluation sets: their content, or the datasets names."""
    found = []
    for name, split in (
        (resolve_path(settings.path), settings.split),
        *map(_named_split, settings.against),
    ):
        path = Path(name)
        found.append(digest_path(path) if path.exists() else f"datasets:{name}:{split}")
    return found


def _named_split(name: str) -> tuple[str, str]:
    """``NAME[SPLIT]`` of a datasets name; files have no split."""
    match = re.fullmatch(r"(.+)\[(\w+)\]", name)
    if match and not Path(name).exists():
        return match[1], match[2]
    return resolve_path(name), "train"


# -- shapes --------------------------------------------------------------------------------------


def _parse(where: str, row: Mapping[str, Any]) -> tuple[Query, bool] | str:
    """The query of a row and whether an answer was cut off behind it, or why there is none.

    A row of somebody else's shape that holds no conversation is left out; one of our own that is
    malformed, and any that is of no shape, is an error.
    """
    row = {k: v for k, v in row.items() if v is not None}
    try:
        fields, ours = _fields(row)
        turns = fields["messages"]
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        if not isinstance(turns, list):
            raise DataError(f"a conversation must be a list of turns, found {turns!r:.80}")
        whole = len(turns)
        while len(turns) > 1 and _role(turns[-1]) == "assistant":
            turns = turns[:-1]
        if not ours and (reason := _no_conversation(turns)):
            return reason
        query = Query.from_dict({**fields, "messages": turns})
        dump_line(query).encode()
    except DataError as e:
        raise DataError(f"{where}: {e}.") from None
    except ValueError as e:
        raise DataError(f"{where} cannot be stored as UTF-8 JSON: {e}.") from None
    return query, len(turns) < whole


def _fields(row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """``messages`` (a text or turns), ``system``, ``id`` of a row, and whether it is our shape."""
    fields: dict[str, Any] = {k: row[k] for k in ("id", "system") if k in row}
    if any(k in row for k in _ANSWERED):
        fields = {"id": row["prompt_id"]} | fields if "prompt_id" in row else fields
        if "prompt" in row:
            return {**fields, "messages": row["prompt"]}, False
        if "instruction" in row:
            return {**fields, **_alpaca(row)}, False
        if isinstance(row.get("chosen"), list):
            return {**fields, "messages": row["chosen"]}, False
    elif "conversations" in row:
        return {**fields, "messages": _sharegpt(row["conversations"])}, False
    elif "prompt" in row or "messages" in row:
        if "prompt" in row and "messages" in row:
            raise DataError(
                "a query needs exactly one of 'prompt' and 'messages', found the keys "
                f"{', '.join(map(str, row))}"
            )
        if isinstance(row.get("messages"), str):
            raise DataError(
                f"messages must be a list of turns, found the text {row['messages']!r:.80}; a text "
                "goes under 'prompt'"
            )
        rest = {k: v for k, v in row.items() if k not in ("prompt", "messages")}
        return {**rest, "messages": row.get("prompt", row.get("messages"))}, True
    elif "instruction" in row:
        return {**fields, **_alpaca(row)}, False
    raise DataError(
        f"no known shape of query, found the columns {', '.join(map(str, row)) or '(none)'}; give "
        "'prompt' or 'messages', 'instruction' (Alpaca), or 'conversations' (ShareGPT)"
    )


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history must be a list of [user, assistant] pairs, found {history!r:.80}")
    turns = []
    for pair in history:
        if not isinstance(pair, list) or [type(t) for t in pair] != [str, str]:
            raise DataError(
                f"history must be a list of [user, assistant] pairs, found {pair!r:.80}"
            )
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"instruction and input must be texts, found {parts!r:.80}")
    turns.append(Message("user", "\n".join(filter(str.strip, parts))))
    return {"messages": turns}


def _sharegpt(conversation: Any) -> list[dict[str, Any]]:
    if not isinstance(conversation, list):
        raise DataError(f"conversations must be a list of turns, found {conversation!r:.80}")
    turns = []
    for turn in conversation:
        who = (turn.get("from") or turn.get("role")) if isinstance(turn, Mapping) else None
        if not isinstance(who, str) or who not in _SPEAKERS:
            raise DataError(
                f"a turn of 'conversations' must be from one of {', '.join(_SPEAKERS)}, found "
                f"{turn!r:.80}"
            )
        text = turn.get("value") if turn.get("value") is not None else turn.get("content")
        turns.append({"role": _SPEAKERS[who], "content": text})
    return turns


def _role(turn: Any) -> Any:
    if isinstance(turn, Message):
        return turn.role
    return turn.get("role") if isinstance(turn, Mapping) else None


def _no_conversation(turns: list[Any]) -> str | None:
    """Why turns, cut behind the last user turn, cannot be asked; malformed ones pass."""
    roles = [_role(t) for t in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if "user" not in spoken:
        return "no_user_turn"
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        return "turns_do_not_alternate"
    last = turns[-1].content if isinstance(turns[-1], Message) else turns[-1].get("content")
    return "empty_query" if isinstance(last, str) and not last.strip() else None


# -- files ---------------------------------------------------------------------------------------


def _rows(path: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    file = Path(path)
    if file.is_file():
        yield from _file_rows(file)
    elif file.is_dir():
        for shard in _shards(file):
            yield from _file_rows(shard)
    elif (
        re.fullmatch(r"\.[A-Za-z]\w*", file.suffix)
        or path.count("/") > 1
        or path.startswith((".", "/"))
    ):
        raise DataError(f"There is no query file {path}.")
    else:
        yield from _dataset(path, split)


def _shards(folder: Path) -> list[Path]:
    kinds = {s: sorted(folder.glob(f"*{s}")) for s in _SHARDS}
    found = [s for s, files in kinds.items() if files]
    if len(found) != 1:
        what = f"holds {' and '.join(found)} files" if found else "is a folder without query files"
        raise DataError(
            f"{folder} {what}; give a file, or a folder of {', '.join(_SHARDS)} files of one kind."
        )
    return kinds[found[0]]


def _file_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, row in file_rows(file, lambda names: _known_columns(file, names)):
        if file.suffix == ".csv":  # an empty cell is an absent one, but for the text
            row = {k: v for k, v in row.items() if v or k in _TEXTS}
        yield where, row


def _known_columns(file: Path, names: Sequence[str]) -> list[str]:
    """Those of a table's columns that are read; says what it has before others are left unread."""
    known = [name for name in names if name in _COLUMNS]
    if not (_COLUMNS - {"id", "system", "input", "history"}) & set(known):
        raise DataError(
            f"{file} has no known shape of query, found the columns {', '.join(names)}. Name the "
            "column of the prompts 'prompt'."
        )
    return known


def _dataset(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            where = f"{name}[{split}], row {number}"
            known = {k: v for k, v in row.items() if k in _COLUMNS}
            yield where, known or dict.fromkeys(row, "")
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(
            f"There is no query file {name!r}, and as a datasets name it cannot be loaded: "
            f"{reason}."
        ) from e
