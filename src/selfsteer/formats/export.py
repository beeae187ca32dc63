"""Our records to files of other programs; what a format cannot say is counted and reported.

`FORMATS` has one entry for each: a function from a record to its rows, and what is lost on the way.
"""

import hashlib
import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import Records, at, batched, dump_line, write_atomic
from selfsteer.data.records import Message, Preference, Triple
from selfsteer.errors import ConfigError, DataError, short
from selfsteer.models.reasoning import marked
from selfsteer.principles.contexts import context_messages
from selfsteer.terminal import progress_bar

#: Rows of one Parquet file: some hundred MB at the papers' 2,048 tokens per response.
ROWS_PER_SHARD = 20_000

#: Rows that are Python objects at a time, and a row group of Parquet.
ROWS_TOGETHER = 1000

Row = dict[str, Any]
#: Names of the models that wrote the chosen and the rejected answers, if known.
Models = tuple[str, str] | None


# -- a record's rows -----------------------------------------------------------------------------


def _assistant(text: str) -> Row:
    return Message("assistant", text).to_dict()


def _prompt(preference: Preference) -> list[Row]:
    return [m.to_dict() for m in preference.prompt]


def _trl(p: Preference, models: Models) -> list[Row]:
    """The four columns that every preference has."""
    return [replace(p, finish_reasons={}, extra={}, reasoning={}).to_dict()]


def _prompts(p: Preference, models: Models) -> list[Row]:
    return [{"id": p.id, "prompt": _prompt(p)}]


def _unpaired(p: Preference, models: Models) -> list[Row]:
    """The two labelled answers, the good one first."""
    return [
        {"id": p.id, "prompt": _prompt(p), "completion": [_assistant(text)], "label": label}
        for text, label in ((p.chosen, True), (p.rejected, False))
    ]


def _alpaca(messages: Sequence[Message]) -> Row:
    """A conversation as Alpaca has it: last user turn, pairs before it, system message."""
    said = [m.content for m in messages if m.role != "system"]
    return {
        "instruction": said[-1],
        "history": [list(pair) for pair in zip(said[:-1:2], said[1:-1:2], strict=True)],
        "system": messages[0].content if messages[0].role == "system" else "",
    }


def _llama_factory(p: Preference, models: Models) -> list[Row]:
    return [{"id": p.id, **_alpaca(p.prompt), "chosen": p.chosen, "rejected": p.rejected}]


def _sharegpt(p: Preference, models: Models) -> list[Row]:
    names = {"user": "human", "assistant": "gpt"}
    said = [{"from": names[m.role], "value": m.content} for m in p.prompt if m.role != "system"]
    return [
        {
            "id": p.id,
            "conversations": said,
            "system": _alpaca(p.prompt)["system"],
            "chosen": {"from": "gpt", "value": p.chosen},
            "rejected": {"from": "gpt", "value": p.rejected},
        }
    ]


def _distilabel(p: Preference, models: Models) -> list[Row]:
    """The columns of distilabel's FormatChatGenerationDPO.

    Ratings are an order, 1 for the chosen and 0 for the rejected answer, not points given.
    """
    prompt = _prompt(p)
    first = next(m.content for m in p.prompt if m.role == "user")
    row: Row = {
        "id": p.id,
        "prompt": first,
        "prompt_id": hashlib.sha256(first.encode()).hexdigest(),
        "messages": prompt,
        "generations": [p.chosen, p.rejected],
        "ratings": [1.0, 0.0],
    }
    if models is not None:
        row["generation_models"] = list(models)
    for i, (side, text) in enumerate((("chosen", p.chosen), ("rejected", p.rejected))):
        row[side] = [*prompt, _assistant(text)]
        row[f"{side}_rating"] = row["ratings"][i]
        if models is not None:
            row[f"{side}_model"] = models[i]
    return [row]


def _chat(p: Preference, models: Models) -> list[Row]:
    """The chosen conversation, for fine-tuning."""
    return [{"messages": [*_prompt(p), _assistant(p.chosen)]}]


def _parquet(p: Preference, models: Models) -> list[Row]:
    more = {"finish_reasons": dict(p.finish_reasons), "features": p.extra.get("features")}
    return [{**row, **more} for row in _trl(p, models)]


def _authors(t: Triple, models: Models) -> list[Row]:
    """A triple with a good and a bad response as the authors' release has it."""
    good, bad = (
        context_messages(t.messages, t.principles, context)[0].content if t.principles else ""
        for context in ("good", "bad")
    )
    row = {"idx": t.id, **_alpaca(t.messages), "p_system": good, "n_system": bad}
    texts = {"chosen": t.responses["good"], "rejected": t.responses["bad"]}
    return [{**row, **texts, "raw": t.responses.get("plain", "")}]


def whole(record: Preference | Triple) -> Preference | Triple:
    """The record with the thoughts that it keeps in front of their responses."""
    thoughts = {name: marked(text) for name, text in record.reasoning.items()}
    if isinstance(record, Triple):
        texts = {n: thoughts.get(n, "") + text for n, text in record.responses.items()}
        return replace(record, responses=texts)
    sides = {name: text + getattr(record, name) for name, text in thoughts.items()}
    return replace(record, **sides) if sides else record


# -- formats -------------------------------------------------------------------------------------

#: What a format cannot say in words, and whether a record has it.
Loss = tuple[str, Callable[[Any], bool]]


def _cut(*responses: str) -> Loss:
    return (
        "a response was cut off; the format cannot say so, and it will train as if it ended there",
        lambda record: any(record.finish_reasons.get(name) == "length" for name in responses),
    )


def _empty_system(record: Preference | Triple) -> bool:
    messages = record.messages if isinstance(record, Triple) else record.prompt
    return messages[0] == ("system", "")


_PAIR_CUT = _cut("chosen", "rejected")
_NO_SYSTEM: Loss = ("an empty system message is left out", _empty_system)


@dataclass(frozen=True)
class Format:
    """A format that can be exported to.

    Args:
        rows: a record's rows; the record is a triple for ``authors``, else a preference.
        losses: what of a record it cannot say.
        keeps: keys of ``extra`` that it has a place for.
        entry: how LLaMA-Factory's ``dataset_info.json`` describes it.
    """

    rows: Callable[[Any, Models], list[Row]]
    losses: tuple[Loss, ...] = ()
    keeps: tuple[str, ...] = ()
    entry: Mapping[str, Any] | None = None


FORMATS = {
    "trl": Format(_trl, (_PAIR_CUT,)),
    "trl-prompts": Format(_prompts, (("the two responses are left out", lambda p: True),)),
    "trl-unpaired": Format(_unpaired, (_PAIR_CUT,)),
    "llama-factory": Format(
        _llama_factory,
        (_NO_SYSTEM, _PAIR_CUT),
        entry={
            "formatting": "alpaca",
            "columns": {"prompt": "instruction", "history": "history"},
        },
    ),
    "llama-factory-sharegpt": Format(
        _sharegpt,
        (_NO_SYSTEM, _PAIR_CUT),
        entry={"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    ),
    "distilabel": Format(_distilabel, (_PAIR_CUT,)),
    "chat": Format(
        _chat,
        (("the id and the rejected response are left out", lambda p: True), _cut("chosen")),
    ),
    "parquet": Format(_parquet, keeps=("features",)),
    "authors": Format(
        _authors,
        (
            ("no plain response, raw is empty", lambda t: not t.responses.get("plain")),
            ("no principles, p_system and n_system are empty", lambda t: t.principles is None),
            (
                "the features' names are left out",
                lambda t: bool(t.principles and t.principles.features),
            ),
            _NO_SYSTEM,
            _cut("plain", "good", "bad"),
        ),
    ),
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what the format could not say, one sentence each."""

    paths: list[Path]
    count: int
    left_out: list[str]


def export(
    records: Records[Any],
    fmt: str,
    folder: Path,
    name: str = "",
    *,
    models: Models = None,
    card: Callable[[list[str], list[str]], str] | None = None,
    rows_per_file: int = ROWS_PER_SHARD,
) -> Exported:
    """Writes records in another program's format; a file of the same name is replaced.

    Args:
        records: triples for ``authors``, of which those with a good and a bad response are taken;
            else preferences.
        fmt: of `FORMATS`. ``llama-factory`` and ``llama-factory-sharegpt`` write ``NAME.json`` and
            its entry in ``dataset_info.json``, where other entries stay; ``authors`` writes
            ``triples.json``; ``parquet`` ``data/train-*.parquet``; all others ``train.jsonl``.
            `datasets.load_dataset(folder)` opens the last two.
        folder: made if need be; LLaMA-Factory's own ``data`` folder will do.
        name: of the data set, for LLaMA-Factory alone.
        models: who wrote the chosen and the rejected answers, for distilabel alone.
        card: for parquet: (names of the files, what is left out) → the text of ``README.md``.
        rows_per_file: of parquet.

    Raises:
        ConfigError: no such format, a name that cannot be a file's, or one that LLaMA-Factory's
            folder has for something else.
        DataError: nothing to export, or a ``dataset_info.json`` that cannot be added to.
    """
    if fmt not in FORMATS:
        raise ConfigError(
            f"Unknown format {short(fmt)}; choose one of {', '.join(FORMATS)} or reward."
        )
    form, n_in = FORMATS[fmt], len(records)
    taken: Iterable[Any] = records
    count, left_out = n_in, []
    if fmt == "authors":
        both = {"good", "bad"}
        whole = array("q", (i for i, t in enumerate(records) if both <= t.responses.keys()))
        taken, count = at(records, whole), len(whole)
        left_out = _said({"without a good and a bad response, left out": n_in - count}, n_in)
    if not count:
        raise DataError(
            f"There is nothing to export: of {n_in:,} records none has a good and a bad response."
        )
    lost = Counter(dict.fromkeys((what for what, _ in form.losses), 0))
    rows = (row for record in _noted(taken, form, lost, count) for row in form.rows(record, models))
    if fmt == "parquet":
        features = any("features" in p.extra for p in records)
        paths = _write_parquet(rows, folder, count, rows_per_file, features=features)
    elif fmt == "authors":
        paths = [folder / "triples.json"]
        write_atomic(paths[0], _json_list(rows))
    elif form.entry is not None:
        paths = _write_llama_factory(rows, form.entry, folder, name)
    else:
        # datasets gives a file of this name the split of this name, whatever else is there.
        paths = [folder / "train.jsonl"]
        write_atomic(paths[0], map(dump_line, rows))
    left_out += _said(lost, count)
    if card is not None:  # last: it must not name a file that is not there
        names = [str(path.relative_to(folder)) for path in paths]
        paths = [folder / "README.md", *paths]
        write_atomic(paths[0], card(names, left_out))
    return Exported(paths, count * 2 if fmt == "trl-unpaired" else count, left_out)


def _noted(records: Iterable[Any], form: Format, lost: Counter[str], count: int) -> Iterator[Any]:
    """The records; counts what the format has no place for as they pass."""
    with progress_bar("export", count) as bar:
        for record in records:
            lost.update(what for what, has in form.losses if has(record))
            lost.update(
                f"the key {short(key)} is left out: the format has no place for it"
                for key in record.extra
                if key not in form.keeps
            )
            yield whole(record)
            bar.advance(1)


def _said(lost: Mapping[str, int], count: int) -> list[str]:
    return [f"{n:,} of {count:,} records: {what}." for what, n in lost.items() if n]


def _write_parquet(
    rows: Iterator[Row], folder: Path, count: int, per_file: int, *, features: bool
) -> list[Path]:
    """``data/train-*.parquet``; those of an earlier export are removed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    columns = {"id": pa.string(), "prompt": chat, "chosen": chat, "rejected": chat}
    columns["finish_reasons"] = pa.struct({"chosen": pa.string(), "rejected": pa.string()})
    if features:
        columns["features"] = pa.list_(pa.string())
    schema, files = pa.schema(columns), -(-count // per_file)
    paths = [folder / "data" / f"train-{i:05d}-of-{files:05d}.parquet" for i in range(files)]
    for path in paths:
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema) as writer:
            for part in batched(islice(rows, per_file), ROWS_TOGETHER):
                writer.write_table(pa.Table.from_pylist(part, schema))
        write_atomic(path, buffer.getvalue())
    for old in set((folder / "data").glob("train-*-of-*.parquet")) - set(paths):
        old.unlink()
    return paths


def _write_llama_factory(
    rows: Iterator[Row], entry: Mapping[str, Any], folder: Path, name: str
) -> list[Path]:
    data, info = folder / f"{name}.json", folder / "dataset_info.json"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or data == info:
        raise ConfigError(
            f"A data set cannot be called {short(name)}: the name is that of a file and a key of "
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
    same = {key: key for key in ("system", "chosen", "rejected")}
    columns = {**entry["columns"], **same}
    ours = {"file_name": data.name, "ranking": True, **entry, "columns": columns}
    text = _json_list(rows)
    if name not in entries and data.exists():
        text = _unless_other(text, data)
    if entries.setdefault(name, ours) != ours:
        raise ConfigError(
            f"{info} has an entry {name} for something else, and it would be replaced. Give "
            "another folder, or rename that entry."
        )
    # The entry last: it must not name a file that is not there.
    write_atomic(data, text)
    write_atomic(info, json.dumps(entries, indent=2) + "\n")  # read with the locale's encoding
    return [data, info]


def _unless_other(text: Iterator[str], path: Path) -> Iterator[str]:
    """The text, for a file that is there: fails at its end unless it is what the file holds.

    Raises:
        ConfigError: it is another, maybe somebody's own.
    """
    made = hashlib.sha256()
    for piece in text:
        made.update(piece.encode("utf-8"))
        yield piece
    with open(path, "rb") as file:
        if made.digest() != hashlib.file_digest(file, "sha256").digest():
            raise ConfigError(
                f"{path} is there, dataset_info.json does not name it, and it would be replaced. "
                "Give another folder, or move that file."
            )


def _json_list(rows: Iterable[Row]) -> Iterator[str]:
    """A list of rows, of which there is one at least, indented as json.dumps would."""
    before = "[\n  "
    for row in rows:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, indent=2)
        yield before + text.replace("\n", "\n  ")
        before = ",\n  "
    yield "\n]\n"
