"""Our records to files of other programs; what a format cannot say is counted and reported."""

import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from selfsteer.data import shapes
from selfsteer.data.jsonl import Records, at, batched, dump_line, write_atomic
from selfsteer.data.records import Preference, Triple
from selfsteer.errors import ConfigError, DataError
from selfsteer.terminal import progress_bar

R = TypeVar("R", Triple, Preference)

#: Rows of one Parquet file: some hundred MB at the papers' 2,048 tokens per response.
ROWS_PER_SHARD = 20_000

#: Rows that are Python objects at a time.
ROWS_TOGETHER = 1000


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what the format could not say, one sentence each."""

    paths: list[Path]
    count: int
    left_out: list[str]


def export(
    preferences: Records[Preference],
    fmt: str,
    folder: Path,
    name: str,
    *,
    models: tuple[str, str] | None = None,
) -> Exported:
    """Writes preferences in another program's format; a file of the same name is replaced.

    Args:
        preferences: of a run.
        fmt: ``llama-factory`` and ``llama-factory-sharegpt`` write ``NAME.json`` and its entry in
            ``dataset_info.json``, where other entries stay. All others write ``train.jsonl``,
            which ``datasets.load_dataset(folder)`` opens: ``trl`` (id, prompt, chosen, rejected),
            ``trl-prompts`` (id, prompt), ``trl-unpaired`` (id, prompt, completion, label; two
            records a preference), ``distilabel`` (the columns of its FormatChatGenerationDPO),
            ``chat`` (messages: the chosen side, for fine-tuning).
        folder: made if need be; LLaMA-Factory's own ``data`` folder will do.
        name: of the data set, for LLaMA-Factory alone.
        models: who wrote the chosen and the rejected answers, for distilabel alone.

    Raises:
        ConfigError: no such format, or a name that cannot be a file's.
        DataError: nothing to export, or a ``dataset_info.json`` that cannot be added to.
    """
    if fmt == "authors":
        raise ConfigError(
            "The authors' format holds principles and plain responses, which a preference no "
            "longer has. Export the triples."
        )
    if fmt == "parquet":
        raise ConfigError("A Parquet data set has a card that tells of its run: export the run.")
    if fmt not in FORMATS:
        raise ConfigError(f"There is no format {fmt!r}; formats are {', '.join(FORMATS)}.")
    if not len(preferences):
        raise DataError("There is no preference to export.")
    count = len(preferences)
    sides = {"trl-prompts": (), "chat": ("chosen",)}.get(fmt, ("chosen", "rejected"))
    lost = _Lost(count, sides)
    passing = map(lost.note, _counted(preferences))
    records: Iterable[Mapping[str, Any]]
    left_out = []
    match fmt:
        case "trl":
            records = map(shapes.write_preference, passing)
        case "trl-prompts":
            records = map(shapes.write_prompt, passing)
            left_out += _said(count, count, "the two responses are left out")
        case "trl-unpaired":
            records = (half for p in passing for half in shapes.write_halves(p))
            count *= 2
        case "chat":
            records = map(shapes.write_chat, passing)
            left_out += _said(count, count, "the id and the rejected response are left out")
        case "distilabel":
            records = (shapes.write_pair(p, models) for p in passing)
        case "llama-factory":
            records = map(shapes.write_alpaca, passing)
        case _:
            records = map(shapes.write_sharegpt, passing)
    if fmt in _LLAMA_FACTORY:
        paths = _write_llama_factory(records, fmt, folder, name)
        left_out += _said(lost.systemless, count, "an empty system message is left out")
    else:
        # datasets gives a file of this name the split of this name, whatever else is there.
        paths = [folder / "train.jsonl"]
        write_atomic(paths[0], map(dump_line, records))
    return Exported(paths, count, [*left_out, *lost.sentences()])


def export_triples(triples: Records[Triple], folder: Path) -> Exported:
    """Writes ``triples.json``, a list of records of the authors' release; see `read_triples`.

    A triple without a good and a bad response has no place in it and is left out.

    Raises:
        DataError: no triple has both.
    """
    both = {"good", "bad"}
    whole = array("q", (i for i, t in enumerate(triples) if both <= t.responses.keys()))
    count, n_in = len(whole), len(triples)
    if not whole:
        raise DataError(
            f"None of the {n_in:,} triples has a good and a bad response, so there is nothing to "
            "export."
        )
    lost = _Lost(count, ("plain", "good", "bad"))
    no_plain = bare = named = 0

    def written() -> Iterator[Mapping[str, Any]]:
        nonlocal no_plain, bare, named
        for t in map(lost.note, _counted(at(triples, whole), count)):
            no_plain += not t.responses.get("plain")
            bare += t.principles is None
            named += t.principles is not None and bool(t.principles.features)
            yield shapes.write_release(t)

    path = folder / "triples.json"
    write_atomic(path, _json_list(written()))
    left_out = [
        *_said(n_in - count, n_in, "without a good and a bad response, left out"),
        *_said(no_plain, count, "no plain response, raw is empty"),
        *_said(bare, count, "no principles, p_system and n_system are empty"),
        *_said(named, count, "the features' names are left out"),
        *_said(lost.systemless, count, "an empty system message is left out"),
        *lost.sentences(),
    ]
    return Exported([path], count, left_out)


def export_parquet(
    preferences: Records[Preference],
    folder: Path,
    card: Callable[[list[str], list[str]], str],
    rows: int = ROWS_PER_SHARD,
) -> Exported:
    """Writes ``data/train-*.parquet`` and a card that names them, for ``datasets.load_dataset``.

    The columns are id, prompt, chosen, rejected (chats), finish_reasons, and the names of the
    features where the preferences have them.

    Args:
        preferences: of a run.
        folder: made if need be; shards of an earlier export are removed.
        card: (the files' names, relative to the folder; what is left out, one sentence each) → the
            text of ``README.md``.
        rows: of one file.

    Raises:
        DataError: nothing to export.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = len(preferences)
    if not count:
        raise DataError("There is no preference to export.")
    chat = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    reasons = pa.struct({"chosen": pa.string(), "rejected": pa.string()})
    columns = {
        "id": pa.string(),
        "prompt": chat,
        "chosen": chat,
        "rejected": chat,
        "finish_reasons": reasons,
    }
    if any("features" in p.extra for p in preferences):
        columns["features"] = pa.list_(pa.string())
    lost = _Lost(count, (), kept=frozenset({"features"}))
    shards = -(-count // rows)
    names = [f"data/train-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]
    passing = map(lost.note, _counted(preferences))
    schema = pa.schema(columns)
    for name in names:
        pieces = [
            pa.Table.from_pylist(list(map(_parquet_row, part)), schema=schema)
            for part in batched(islice(passing, rows), ROWS_TOGETHER)
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables(pieces).combine_chunks(), buffer)
        write_atomic(folder / name, buffer.getvalue())
    left_out = lost.sentences()
    # The card last: it must not name a file that is not there.
    write_atomic(folder / "README.md", card(names, left_out))
    for old in (folder / "data").glob("train-*-of-*.parquet"):
        if f"data/{old.name}" not in names:
            old.unlink()
    paths = [folder / "README.md", *(folder / name for name in names)]
    return Exported(paths, count, left_out)


def _parquet_row(preference: Preference) -> dict[str, Any]:
    return {
        **shapes.write_preference(preference),
        "finish_reasons": dict(preference.finish_reasons),
        "features": preference.extra.get("features"),
    }


_LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "llama-factory": {
        "formatting": "alpaca",
        "columns": {"prompt": "instruction", "history": "history"},
    },
    "llama-factory-sharegpt": {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
    },
}


def _write_llama_factory(
    records: Iterable[Mapping[str, Any]], fmt: str, folder: Path, name: str
) -> list[Path]:
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
    form = _LLAMA_FACTORY[fmt]
    same = {key: key for key in ("system", "chosen", "rejected")}
    entries[name] = {
        "file_name": data.name,
        "formatting": form["formatting"],
        "ranking": True,
        "columns": {**form["columns"], **same},
    }
    # The entry last: it must not name a file that is not there.
    write_atomic(data, _json_list(records))
    write_atomic(info, json.dumps(entries, indent=2) + "\n")  # read with the locale's encoding
    return [data, info]


def _json_list(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A list of records, of which there is one at least, indented as json.dumps would."""
    before = "[\n  "
    for record in records:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=2)
        yield before + text.replace("\n", "\n  ")
        before = ",\n  "
    yield "\n]\n"


def _counted(records: Iterable[R], count: int | None = None) -> Iterator[R]:
    total = len(records) if count is None and isinstance(records, Sized) else count
    with progress_bar("export", total) as bar:
        for record in records:
            yield record
            bar.advance(1)


class _Lost:
    """What a format has no place for, counted as the records pass."""

    def __init__(
        self, records: int, sides: tuple[str, ...], kept: frozenset[str] = frozenset()
    ) -> None:
        """``sides``: responses of which it matters that they were cut off; ``kept``: other keys."""
        self._records, self._sides, self._kept = records, sides, kept
        self._cut = 0
        self._keys: Counter[str] = Counter()
        #: records whose system message is empty
        self.systemless = 0

    def note(self, record: R) -> R:
        """Counts one and gives it back."""
        messages = record.messages if isinstance(record, Triple) else record.prompt
        self.systemless += messages[0] == ("system", "")
        self._cut += any(record.finish_reasons.get(side) == "length" for side in self._sides)
        self._keys.update(key for key in record.extra if key not in self._kept)
        return record

    def sentences(self) -> list[str]:
        """One each for cut responses and for every key without a place."""
        what = (
            "a response was cut off; the format cannot say so, and it will train as if it ended "
            "there"
        )
        keys = ((n, f"the key {key!r} is left out") for key, n in self._keys.items())
        return [s for n, w in ((self._cut, what), *keys) for s in _said(n, self._records, w)]


def _said(count: int, records: int, what: str) -> list[str]:
    """A sentence about some of the records; none where it is about none."""
    return [f"{count:,} of {records:,} records: {what}."] if count else []


#: What can be exported to; ``authors`` takes triples, the others preferences.
FORMATS = (
    "trl",
    "trl-prompts",
    "trl-unpaired",
    *_LLAMA_FACTORY,
    "distilabel",
    "chat",
    "parquet",
    "authors",
)
