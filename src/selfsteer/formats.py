"""Triples from other people's files, and our records in other programs' formats.

The authors' release (icip-cas/SSO) writes a triple as one flat record, an Alpaca record grown by
the two system messages and the plain response::

    {"instruction": "What does the bee eat?", "history": [], "system": "",
     "p_system": "Your response should be accurate. …", "n_system": "Your response should be …",
     "chosen": "The bee eats nectar.", "rejected": "The bee eats bricks.", "raw": "Okay. …"}

No format but our own says that a response was cut off; what an export leaves out is counted in
`Exported.left_out`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfsteer.contexts import context_messages
from selfsteer.errors import ConfigError, DataError
from selfsteer.records import (
    Message,
    Preference,
    Principles,
    Query,
    Triple,
    dump_line,
    dump_lines,
    read_jsonl,
)
from selfsteer.runs import write_atomic

# -- in ------------------------------------------------------------------------------------------


def read_triples(path: Path) -> list[Triple]:
    """Triples of a file, or of a folder of ``shard-*.jsonl``, in one of three shapes.

    *Triples of a run*: ``messages`` and ``responses``, read as they are.

    *The authors' release*: one object, a list, or JSONL. ``instruction`` (and ``input`` on the next
    line, as in Alpaca) is the last user turn, ``history`` the [user, assistant] pairs before it,
    ``system`` the query's own system message; ``chosen``, ``rejected`` and ``raw`` are y+, y- and
    yo. ``p_system`` and ``n_system`` are the whole system messages of the good and bad context:
    where one begins with the query's own system message, that and the white space after it are cut
    off, since our contexts put it there again; where it does not, it is kept whole and follows the
    query's own. Without both, the triple has no principles; an empty ``raw`` is an absent one.
    Features are read from the release's ``principles``; other keys are kept as they are.

    *Preferences*: TRL's conversational records (``prompt``, ``chosen``, ``rejected``); no
    principles, no plain response.

    The id is ``id``, else the release's ``idx``, else a hash of the messages. Records that share
    one are kept apart by ``-2``, ``-3`` …: a query can carry several triples.

    Raises:
        DataError: unreadable, malformed, of another shape, of more than one shape, or empty; names
            the file and the line or entry.
    """
    triples: list[Triple] = []
    first: tuple[str, str] | None = None
    for where, record in _rows(path):
        shape = _shape_of(where, record)
        first = first or (shape, where)
        if shape != first[0]:
            raise DataError(
                f"{where} is {_SHAPES[shape].title}, but {first[1]} is {_SHAPES[first[0]].title}. "
                "Give one kind of record at a time."
            )
        try:
            triple = _SHAPES[shape].read(record)
            # What cannot be written back (half a surrogate pair, NaN) would fail hours later.
            dump_line(triple).encode()
        except DataError as e:
            raise DataError(f"{where}: {e}.") from None
        except ValueError as e:
            raise DataError(f"{where} cannot be stored as UTF-8 JSON: {e}.") from None
        triples.append(triple)
    if not triples:
        raise DataError(f"{path} holds no record. Give {_ACCEPTED}.")
    return _with_distinct_ids(triples)


def _from_release(record: Mapping[str, Any]) -> Triple:
    rest = dict(record)
    asked = [_text_or_empty(rest.pop(key, None), key) for key in ("instruction", "input")]
    turns: list[Message] = []
    if system := _text_or_empty(rest.pop("system", None), "system"):
        turns.append(Message("system", system))
    history = rest.pop("history", None) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or [type(t) for t in pair] != [str, str]:
            raise DataError(
                f"history must be a list of [user, assistant] pairs, found {_short(pair)}"
            )
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    turns.append(Message("user", "\n".join(filter(None, asked))))
    identity = rest.pop("id", None)
    if identity is None:
        identity = rest.pop("idx", None)
    query = Query.from_dict({"id": identity, "messages": turns})
    responses = {
        "good": _response(rest.pop("chosen"), "chosen"),
        "bad": _response(rest.pop("rejected"), "rejected"),
    }
    raw = rest.pop("raw", None)
    if raw is not None and (plain := _response(raw, "raw")):
        responses = {"plain": plain, **responses}
    principles = _principles(rest, system)
    extra = {k: v for k, v in rest.items() if k not in ("messages", "finish_reasons")}
    return Triple(query.id, query.messages, principles, responses, extra=extra)


def _principles(rest: dict[str, Any], system: str) -> Principles | None:
    """Takes the guidelines out of a record of the release."""
    found = rest.pop("principles", None)
    entries = found if isinstance(found, list) else []
    names = [entry.get("feature") for entry in entries if isinstance(entry, Mapping)]
    features = tuple(name for name in names if isinstance(name, str))
    texts = {}
    for key in ("p_system", "n_system"):
        whole = _text_or_empty(rest.pop(key, None), key)
        texts[key] = whole
        if system and whole.startswith(system):
            tail = whole[len(system) :]
            if not tail.strip():
                raise DataError(f"{key} holds no guideline beyond the query's own system message")
            # "You are" is no message before "You are kind.": only a whole one is cut off.
            if tail[0].isspace():
                texts[key] = tail.lstrip()
    if not any(texts.values()):
        return None
    if not all(texts.values()):
        raise DataError("p_system and n_system belong together, and one of them is missing")
    return Principles(texts["p_system"], texts["n_system"], features)


def _from_preference(record: Mapping[str, Any]) -> Triple:
    texts = {name: _response(record[name], name) for name in ("chosen", "rejected")}
    reasons = record.get("finish_reasons") or {}
    if not isinstance(reasons, Mapping) or not reasons.keys() <= texts.keys():
        raise DataError(f"finish_reasons are of chosen and rejected, found {_short(reasons)}")
    return Preference.from_dict({**record, **texts, "finish_reasons": reasons}).to_triple()


def _text_or_empty(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _response(value: Any, name: str) -> str:
    """A text, or a list of one text or one assistant turn."""
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(found, Mapping) and found.get("role") == "assistant":
        found = found.get("content")
    if not isinstance(found, str):
        raise DataError(f"{name} must be one text or one assistant turn, found {_short(value)}")
    return found


@dataclass(frozen=True)
class _Shape:
    """A kind of record: its name in a message, the keys it is known by, its reader."""

    title: str
    keys: frozenset[str]
    read: Callable[[Mapping[str, Any]], Triple]


_SHAPES = {
    "triple": _Shape("a triple of a run", frozenset({"responses"}), Triple.from_dict),
    "release": _Shape(
        "a record of the SSO release",
        frozenset({"instruction", "chosen", "rejected"}),
        _from_release,
    ),
    "preference": _Shape(
        "a preference", frozenset({"prompt", "chosen", "rejected"}), _from_preference
    ),
}

_ACCEPTED = (
    "triples of a run (messages, responses), records of the SSO release (instruction, chosen, "
    "rejected, and p_system, n_system, raw, history, system) or preferences (prompt, chosen, "
    "rejected)"
)


def _shape_of(where: str, record: Mapping[str, Any]) -> str:
    found = [name for name, shape in _SHAPES.items() if shape.keys <= record.keys()]
    if len(found) == 1:
        return found[0]
    what = "more than one kind of record" if found else "no record that can be trained on"
    raise DataError(
        f"{where} is {what}: its keys are {', '.join(record) or '(none)'}. Give {_ACCEPTED}."
    )


def _with_distinct_ids(triples: Sequence[Triple]) -> list[Triple]:
    taken = {t.id for t in triples}
    seen: Counter[str] = Counter()
    distinct = []
    for triple in triples:
        identity = triple.id
        seen[triple.id] += 1
        if seen[triple.id] > 1:
            while (identity := f"{triple.id}-{seen[triple.id]}") in taken:
                seen[triple.id] += 1
        distinct.append(triple if identity == triple.id else replace(triple, id=identity))
    return distinct


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line or entry, object) of a file or of a folder of shards."""
    if not path.is_dir():
        yield from _file_rows(path)
        return
    shards = sorted(path.glob("shard-*.jsonl"))
    if not shards:
        raise DataError(
            f"{path} holds no shard-*.jsonl. Give a file, or the folder of a run that holds the "
            "shards, for example iteration-1/triples."
        )
    for shard in shards:
        yield from _file_rows(shard)


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if _is_jsonl(path):
        for number, record in read_jsonl(path):
            yield f"{path}, line {number}", record
        return
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as e:
        raise DataError(
            f"{path}, line {e.lineno} is not JSON ({e.msg} at column {e.colno}). The file must be "
            "one object, a list of objects, or one object per line."
        ) from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}).") from None
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(record, Mapping):
            raise DataError(f"{path}, entry {number} is not an object but {type(record).__name__}.")
        yield f"{path}, entry {number}", record


def _is_jsonl(path: Path) -> bool:
    """Whether each line is an object; otherwise the file is one list, or an object over lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((line.strip() for line in file if line.strip()), "")
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


# -- out -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what the format could not say, one sentence each."""

    paths: list[Path]
    count: int
    left_out: list[str]


def export(preferences: Sequence[Preference], fmt: str, folder: Path, name: str) -> Exported:
    """Writes preferences in another program's format; a file of the same name is replaced.

    Args:
        preferences: of a run.
        fmt: ``trl``: ``train.jsonl`` with the columns id, prompt, chosen, rejected, each a chat,
            which ``datasets.load_dataset(folder)`` opens. ``llama-factory``: ``NAME.json`` in
            Alpaca's ranking form, and its entry in ``dataset_info.json``, where other entries stay.
        folder: made if need be; LLaMA-Factory's own ``data`` folder will do.
        name: of the data set; ``trl`` has no place for it.

    Raises:
        ConfigError: no such format, or a name that cannot be a file's.
        DataError: nothing to export, or a ``dataset_info.json`` that cannot be added to.
    """
    if fmt == "authors":
        raise ConfigError(
            "The authors' format holds principles and plain responses, which a preference no "
            "longer has. Export the triples."
        )
    if fmt not in _WRITERS:
        raise ConfigError(f"There is no format {fmt!r}; formats are {', '.join(FORMATS)}.")
    if not preferences:
        raise DataError("There is no preference to export.")
    paths = _WRITERS[fmt](preferences, folder, name)
    return Exported(paths, len(preferences), _left_out(preferences))


def export_triples(triples: Sequence[Triple], folder: Path) -> Exported:
    """Writes ``triples.json``, a list of records of the authors' release; see `read_triples`.

    A triple without a good and a bad response has no place in it and is left out.

    Raises:
        DataError: no triple has both.
    """
    whole = [t for t in triples if {"good", "bad"} <= t.responses.keys()]
    if not whole:
        raise DataError(
            f"None of the {len(triples):,} triples has a good and a bad response, so there is "
            "nothing to export."
        )
    bare = [t for t in whole if t.principles is None]
    named = [t for t in whole if t.principles is not None and t.principles.features]
    left_out = [
        *_said(len(triples) - len(whole), triples, "without a good and a bad response, left out"),
        *_said(
            sum("plain" not in t.responses for t in whole), whole, "no plain response, raw is empty"
        ),
        *_said(len(bare), whole, "no principles, p_system and n_system are empty"),
        *_said(len(named), whole, "the features' names are left out"),
        *_left_out(whole),
    ]
    path = folder / "triples.json"
    write_atomic(path, _json_text([_release_record(t) for t in whole]))
    return Exported([path], len(whole), left_out)


def _release_record(triple: Triple) -> dict[str, Any]:
    systems = {
        context: ""
        if triple.principles is None
        else context_messages(triple.messages, triple.principles, context)[0].content
        for context in ("good", "bad")
    }
    return {
        "idx": triple.id,
        **_alpaca(triple.messages),
        "p_system": systems["good"],
        "n_system": systems["bad"],
        "chosen": triple.responses["good"],
        "rejected": triple.responses["bad"],
        "raw": triple.responses.get("plain", ""),
    }


def _alpaca(messages: Sequence[Message]) -> dict[str, Any]:
    """A conversation as Alpaca has it: last user turn, pairs before it, system message."""
    has_system = messages[0].role == "system"
    said = [m.content for m in messages if m.role != "system"]
    return {
        "instruction": said[-1],
        "history": [list(pair) for pair in zip(said[:-1:2], said[1:-1:2], strict=True)],
        "system": messages[0].content if has_system else "",
    }


def _write_trl(preferences: Sequence[Preference], folder: Path, name: str) -> list[Path]:
    # Only columns that every record has: load_dataset takes the types from the first block.
    bare = [replace(p, finish_reasons={}, extra={}) for p in preferences]
    # datasets gives a file of this name the split of this name, whatever else is in the folder.
    path = folder / "train.jsonl"
    write_atomic(path, dump_lines(bare))
    return [path]


def _write_llama_factory(preferences: Sequence[Preference], folder: Path, name: str) -> list[Path]:
    data, info = folder / f"{name}.json", folder / "dataset_info.json"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or data == info:
        raise ConfigError(
            f"A data set cannot be called {name!r}: the name is that of a file and a key of "
            "dataset_info.json. Use letters, digits, '-', '_' and '.'."
        )
    entries = {}
    if info.exists():
        try:
            entries = json.loads(info.read_text("utf-8-sig"))
        except (OSError, ValueError) as e:
            raise DataError(f"{info} is there and cannot be added to: {e}.") from None
        if not isinstance(entries, dict):
            raise DataError(f"{info} is there and cannot be added to: it is not an object.")
    entries[name] = {
        "file_name": data.name,
        "formatting": "alpaca",
        "ranking": True,
        "columns": {
            "prompt": "instruction",
            "history": "history",
            "system": "system",
            "chosen": "chosen",
            "rejected": "rejected",
        },
    }
    records = [
        {"id": p.id, **_alpaca(p.prompt), "chosen": p.chosen, "rejected": p.rejected}
        for p in preferences
    ]
    # The entry last: it must not name a file that is not there.
    write_atomic(data, _json_text(records))
    write_atomic(info, json.dumps(entries, indent=2) + "\n")  # read with the locale's encoding
    return [data, info]


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def _left_out(records: Sequence[Preference] | Sequence[Triple]) -> list[str]:
    """What none of the other formats has a place for."""
    cut = sum("length" in r.finish_reasons.values() for r in records)
    what = (
        "a response was cut off; the format cannot say so, and it will train as if it ended there"
    )
    keys = Counter(key for r in records for key in r.extra)
    return [
        *_said(cut, records, what),
        *(s for key, n in keys.items() for s in _said(n, records, f"the key {key!r} is left out")),
    ]


def _said(count: int, records: Sequence[Any], what: str) -> list[str]:
    return [f"{count:,} of {len(records):,} records: {what}."] if count else []


_WRITERS: dict[str, Callable[[Sequence[Preference], Path, str], list[Path]]] = {
    "trl": _write_trl,
    "llama-factory": _write_llama_factory,
}

#: What can be exported to; ``authors`` takes triples, the others preferences.
FORMATS = (*_WRITERS, "authors")
