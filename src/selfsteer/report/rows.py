"""Rows of the data browser: a stage's triples with all that the run knows of each, in Parquet.

An index is made once per state of the stage and kept in ``RUN/.view``: `Index` then filters, sorts
and pages without reading the shards again. Nothing here locks or changes the run, and no model is
asked anything: log-probs, judgements and reasons are those that the run left behind.

``python -m selfsteer.report.rows RUN SET`` makes one index and prints how far it is.
"""

import contextlib
import json
import math
import os
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import dump_line, write_atomic
from selfsteer.data.records import RESPONSES, Triple
from selfsteer.errors import ArtifactError, DataError, SelfsteerError
from selfsteer.report import summary
from selfsteer.report.page import asset, finite
from selfsteer.run.folder import RunFolder
from selfsteer.terminal import progress_bar

#: Part of each index's key; raised when what is kept of a row changes.
VERSION = 2
#: Rows per group of the Parquet file: what reading one triple costs.
GROUP = 256
#: No index takes so long; what is half made and older is nobody's.
LEFT_AFTER_S = 86_400.0
#: Characters of a query in the list.
QUERY_CHARS = 160

#: Not decided yet; the other fates are ``kept`` and the reasons of hygiene and filter.
PENDING = "pending"
KEPT = "kept"

SORTS = ("gap", "disagreement", "length_difference")

#: What the list shows, and what it is filtered and sorted by; the record has all the rest.
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("query", pa.string()),
        ("features", pa.list_(pa.string())),
        ("fate", pa.string()),
        ("verdict", pa.string()),
        ("gap", pa.float64()),
        ("disagreement", pa.float64()),
        ("length_difference", pa.int64()),
    ]
)
RECORDS = pa.schema([("text", pa.string()), ("record", pa.string())])


@dataclass(frozen=True)
class RowSet:
    """One stage's triples: ``iteration-1/triples`` or what a generator wrote, ``…/samples``."""

    run: Path
    name: str

    @property
    def where(self) -> str:
        """The iteration's folder in the run."""
        return self.name.rpartition("/")[0]

    @property
    def next_stage(self) -> str:
        """The stage that drops some of them."""
        return f"{self.where}/{'filter' if self.name.endswith('/triples') else 'preferences'}"

    def shards(self) -> list[Path]:
        """Finished shards, in order; a link that leads out of the run is left out."""
        home = self.run.resolve()
        found = sorted((self.run / self.name).glob("shard-*.jsonl"))
        return [p for p in found if p.resolve().is_relative_to(home)]

    def key(self) -> str:
        """Changes when an index would have to be made again."""
        entries = {e["stage"]: e for e in RunFolder(self.run).ledger() if "stage" in e}
        mine = {n: [e["event"], e["fingerprint"]] for n, e in entries.items() if self.where in n}
        files = []
        stores = [p for name in ("scores", "judgements") for p in (self.run / name).glob("*/*")]
        for path in [*self.shards(), *sorted(stores)]:
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                files.append([str(path.relative_to(self.run)), found.st_size, found.st_mtime_ns])
        return digest([VERSION, self.name, mine, files])


def row_sets(run: Path) -> list[RowSet]:
    """What can be browsed in a run, in the order in which it was made."""
    found = [
        RowSet(run, str(folder.relative_to(run)))
        for pattern in (
            "iteration-*/triples",
            "iteration-*/samples",
            "baseline/iteration-*/samples",
        )
        for folder in run.glob(pattern)
    ]
    # triples before samples, the tenth iteration behind the second
    order = {s: (s.where.count("/"), len(s.name), s.where, s.name[::-1]) for s in found}
    return sorted((s for s in found if s.shards()), key=lambda s: order[s])


def read_triples(shards: Iterable[Path]) -> Iterator[tuple[dict[str, Any], Triple] | None]:
    """Each line as stored and as a triple; None for a line that is none, whole or not."""
    for shard in shards:
        with open(shard, "rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                    yield value, Triple.from_dict(value)
                except (ValueError, DataError, TypeError, KeyError):
                    yield None


# -- what a run knows of a triple -----------------------------------------------------------------


class Scores:
    """Per-token log-probs under the policy at the start of an iteration, and whose text they are.

    ``why_not`` says in a sentence why there are none.
    """

    def __init__(self, rows: RowSet, recipe: Any) -> None:
        self.chat: Any = None
        self.places: dict[bytes, tuple[Path, int]] = {}  # file, row in it
        self.why_not = ""
        folders = [f for f in (rows.run / "scores").glob("*") if _is_policy(f, rows.where, recipe)]
        if not folders:
            self.why_not = "the run has not scored these responses under its policy yet"
            return
        from selfsteer.models.store import NOT_WHOLE, read_chunk
        from selfsteer.report.gather import tokenizers

        # neighbours in a set are neighbours in the files of each of its sequences
        self._read = lru_cache(maxsize=16)(read_chunk)
        self.chat = next(tokenizers(summary.load(rows.run)), None)
        if self.chat is None:
            self.why_not = "the policy's tokenizer is not on this machine"
            return
        if not self.chat.tokenizer.is_fast:
            self.why_not = "the tokenizer does not say where its tokens stand in a text"
            self.chat = None
            return
        for path in (p for f in folders for p in sorted(f.glob("scores-*.npz"))):
            try:
                keys, _ = self._read(path)
            except NOT_WHOLE:
                continue
            self.places.update((key, (path, row)) for row, key in enumerate(keys))

    def of(self, triple: Triple, name: str) -> np.ndarray | None:
        """Log-probs of ``context/response``; None where the run has not scored it."""
        from selfsteer.models.store import sequence_key

        if self.chat is None:
            return None
        try:
            place = self.places.get(sequence_key(self.chat.sequence(triple, name)))
        except DataError:
            return None
        return self._read(place[0])[1][place[1]] if place else None

    def mean(self, triple: Triple, name: str) -> float | None:
        """Mean per token, nats."""
        found = self.of(triple, name)
        return None if found is None else float(found.astype(np.float64).mean())

    def tokens(self, triple: Triple, response: str) -> dict[str, list[float]] | None:
        """Of a response under the plain context: characters of each token, and its log-prob.

        The end-of-turn token has none of the text; nor has a token whose character another one
        ends.
        """
        values = self.of(triple, f"plain/{response}")
        if values is None:
            return None
        text = triple.responses[response]
        offsets = self.chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        ends = [end for _, end in offsets][: len(values)]
        chars = np.diff([0, *np.maximum.accumulate(np.array(ends, dtype=int))]).tolist()
        chars += [0] * (len(values) - len(chars))
        return {"chars": chars, "logps": [round(float(v), 2) for v in values]}


def _is_policy(folder: Path, where: str, recipe: Any) -> bool:
    """Whether a folder of scores belongs to the policy that an iteration starts from."""
    from selfsteer.models.store import ABOUT
    from selfsteer.recipe.sections import resolve_path

    try:
        model = Path(json.loads((folder / ABOUT).read_bytes())["model"]).parts
    except (OSError, ValueError, KeyError, TypeError):
        return False
    number = int(where.rpartition("-")[2])
    if number == 1:
        return model[-2:] == Path(resolve_path(recipe.policy.model)).parts[-2:]
    mine = model[-2:] == (f"iteration-{number - 1}", "policy")
    return mine and (model[-3:-2] == ("baseline",)) == where.startswith("baseline/")


class Judged:
    """What the recipe's judge said of good against bad; no judge is asked anything."""

    def __init__(self, run: Path, recipe: Any) -> None:
        from selfsteer.judges.store import AnswerStore

        self.settings = recipe.judge
        self.name = ""
        self._judge: Any = None
        self._stores: list[Any] = []
        if self.settings is None:
            return
        if self.settings.kind in ("oracle", "human"):
            from selfsteer.judges.base import load_judge

            with contextlib.suppress(SelfsteerError):
                self._judge = load_judge(self.settings)
        else:
            self._stores = [AnswerStore(f) for f in (run / "judgements").glob("*") if f.is_dir()]
        self.name = f"{self.settings.kind}:{self.settings.model or self.settings.path or ''}"
        self.name = self.name.rstrip(":")

    def of(self, triple: Triple) -> dict[str, Any] | None:
        """Verdict, scores or both orders with the judge's own words; None: it was not asked."""
        from selfsteer.data.records import Query
        from selfsteer.judges.base import Pair

        query = Query(triple.id, triple.messages)
        pair = Pair(query, triple.responses["good"], triple.responses["bad"])
        with contextlib.suppress(SelfsteerError):
            if self._judge is not None:
                found: dict[str, Any] = {"verdict": self._judge.compare_all([pair])[0].verdict}
                if hasattr(self._judge, "score_all"):
                    both = [(query, pair.first), (query, pair.second)]
                    found["scores"] = self._judge.score_all(both)
                return {"judge": self.name, **found}
            for store in self._stores:
                found = self._stored(store, pair)
                if found:
                    return {"judge": self.name, **found}
        return None

    def _stored(self, store: Any, pair: Any) -> dict[str, Any]:
        if self.settings.kind == "chat":
            from selfsteer.judges.chat import stored_judgement

            both = stored_judgement(pair, store.known)
            if both is None:
                return {}
            judgement, texts = both
            sides = [{"first": "good", "second": "bad"}, {"first": "bad", "second": "good"}]
            shown = judgement.shown or ("tie", "tie")
            orders = [
                {"first": side["first"], "said": side.get(said, said), "text": text}
                for side, said, text in zip(sides, shown, texts, strict=False)
            ]
            return {"verdict": judgement.verdict, "reason": judgement.reason, "orders": orders}
        from selfsteer.judges.base import by_scores
        from selfsteer.judges.reward import score_key

        answers = [store.known(score_key(pair.query, t)) for t in (pair.first, pair.second)]
        if None in answers:
            return {}
        a, b = (answer["score"] for answer in answers)
        return {"verdict": by_scores(a, b, self.settings.tie_margin), "scores": [a, b]}


def disagreement(judgement: Mapping[str, Any] | None) -> float | None:
    """How far the judge contradicts the principles: the bad response's lead in score.

    Without scores 1 where the bad response won, 0.5 where neither did, 0 where the good one won.
    """
    if judgement is None or judgement["verdict"] == "unparseable":
        return None
    scores = judgement.get("scores")
    if scores and None not in scores:
        return float(scores[1] - scores[0])
    return {"first": 0.0, "second": 1.0}.get(judgement["verdict"], 0.5)


class Fates:
    """Whether a triple went on to the next stage, and if not, why."""

    def __init__(self, rows: RowSet, recipe: Any) -> None:
        from selfsteer.principles.catalogue import load_catalogue

        self.recipe, self.stage = recipe, rows.next_stage
        last = RunFolder(rows.run).last(self.stage)
        self.counts: dict[str, int] = {}
        self.decided = last is not None and last["event"] == "finish"
        self._kept: set[str] = set()
        self.catalogue = load_catalogue(recipe.principles.catalogue)
        if self.decided and last is not None:
            self.counts = last["dropped"]
            folder = rows.run / rows.where
            paths = [folder / "filtered.jsonl"]
            if self.stage.endswith("/preferences"):
                paths = sorted((folder / "preferences").glob("shard-*.jsonl"))
            for path in paths:
                with open(path, "rb") as file:
                    self._kept.update(str(json.loads(line)["id"]) for line in file if line.strip())

    def cleaned(self, triple: Triple) -> tuple[Triple, str]:
        """The triple as it is trained on, and hygiene's reason to drop it, if any."""
        from selfsteer.stages.filter import Left, unfit

        tidied = Left((), self.recipe.hygiene, self.catalogue).tidied(triple)
        return tidied, unfit(tidied, self.recipe.hygiene) or ""

    def of(self, triple: Triple, unclean: str) -> str:
        """`KEPT`, `PENDING`, hygiene's reason, or empty where only the filter can say."""
        if not self.decided:
            return PENDING
        if triple.id in self._kept:
            return KEPT
        return unclean

    def by_filter(self, ids: list[str], means: Mapping[str, list[float | None]]) -> dict[str, str]:
        """Reasons of the triples that neither hygiene dropped nor the next stage kept.

        Args:
            ids: of all that hygiene kept.
            means: v1's six sequences → their mean log-probs, where the run has scored them.
        """
        from selfsteer.recipe.sections import Bound
        from selfsteer.stages.filter import steering_filter

        out = dict.fromkeys((i for i in ids if i not in self._kept), self._by_length())
        settings = self.recipe.active_filter
        grid = np.array(list(means.values()), dtype=float)
        if settings is None or not len(ids) or np.isnan(grid).any():
            return out
        values = dict(zip(means, grid, strict=True))
        off = Bound(rule="off")
        steps = {
            "steering_order": settings.model_copy(update={"near_on_policy": off, "gap": off}),
            "off_policy": settings.model_copy(update={"gap": off}),
            "small_gap": settings,
        }
        for reason, step in reversed(steps.items()):
            mask, _ = steering_filter(values, step)
            out.update({i: reason for i, keep in zip(ids, mask, strict=True) if not keep})
        return {i: reason for i, reason in out.items() if i not in self._kept}

    def _by_length(self) -> str:
        names = [n for n in ("length_gap", "length_unmatched") if self.counts.get(n)]
        return " or ".join(names) or "unknown"


# -- the index ------------------------------------------------------------------------------------


def cache_folder(run: Path) -> Path:
    """Where the indices of a run are: in it, or in the system's temporary folder if it cannot be.

    Raises:
        ArtifactError: ``.view`` is a link, which could lead anywhere; or others can write in the
            temporary folder.
    """
    folder = run / ".view"
    if folder.is_symlink():
        raise ArtifactError(f"{folder} is a link; remove it, it may only be a folder.")
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        mine = Path(tempfile.gettempdir()) / f"selfsteer-view-{digest(str(run.resolve()))}"
        mine.mkdir(mode=0o700, exist_ok=True)
        found = mine.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ArtifactError(
                f"{mine} is a link, or somebody else's, or open to others: what they put there "
                "would be shown. Remove it, or set TMPDIR to a folder of your own."
            ) from None
        return mine


def build(rows: RowSet, advance: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Makes the index of a set, unless it is there, and removes older ones; returns its folder.

    Args:
        rows: the set.
        advance: told (rows done, rows there are) now and then.
    """
    from selfsteer.judges.quality import GAP_SEQUENCES
    from selfsteer.methods import recipe_of
    from selfsteer.recipe.read import load_values
    from selfsteer.stages.filter import FILTER_SEQUENCES

    home, key = cache_folder(rows.run), rows.key()
    stem = rows.name.replace("/", "-")
    target = home / f"{stem}.{key}"
    if (target / "about.json").exists():
        return target
    for left in home.glob(f".{stem}.*"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=home, prefix=f".{stem}."))
    shards = rows.shards()
    total = sum(_count_lines(p) for p in shards)
    given = load_values(str(summary.recipe_file(rows.run)))
    recipe = recipe_of(given, f"recipe of {rows.run}")
    scores, judged, fates = Scores(rows, recipe), Judged(rows.run, recipe), Fates(rows, recipe)
    light: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
    ids: list[str] = []
    means: dict[str, list[float | None]] = {name: [] for name in FILTER_SEQUENCES}
    heavy: dict[str, list[str]] = {"text": [], "record": []}
    unreadable = coloured = 0
    with pq.ParquetWriter(partial / "rows.parquet", RECORDS, compression="zstd") as file:
        for n, found in enumerate(read_triples(shards), 1):
            if found is None:
                unreadable += 1
                continue
            value, triple = found
            whole = {"good", "bad"} <= set(triple.responses)
            clean, unclean = fates.cleaned(triple) if whole else (triple, "")
            judgement = judged.of(clean) if whole else None
            m = {s: scores.mean(clean, s) for s in GAP_SEQUENCES} if scores.places else {}
            gaps = _gaps(m)
            tokens = {r: scores.tokens(clean, r) for r in RESPONSES if r in clean.responses}
            tokens = {r: t for r, t in tokens.items() if t}
            coloured += bool(tokens)
            if fates.decided and not unclean:
                ids.append(triple.id)
                for s, column in means.items():
                    column.append(m[s] if s in m else scores.mean(clean, s))
            row = {
                "id": triple.id,
                "query": _short(triple.messages[-1].content),
                "features": list(triple.principles.features) if triple.principles else [],
                "fate": fates.of(triple, unclean),
                "verdict": judgement["verdict"] if judgement else None,
                "gap": sum(gaps.values()) if gaps else None,
                "disagreement": disagreement(judgement),
                "length_difference": (
                    len(clean.responses["good"]) - len(clean.responses["bad"]) if whole else None
                ),
            }
            for name, cell in row.items():
                light[name].append(cell)
            record = {
                "triple": value,
                "trained_on": {
                    r: t for r, t in clean.responses.items() if t != triple.responses[r]
                },
                "gaps": gaps,
                "judgement": judgement,
                "tokens": tokens,
            }
            heavy["text"].append(_searched(triple))
            heavy["record"].append(json.dumps(record, ensure_ascii=False))
            if len(heavy["text"]) == GROUP:
                file.write_table(pa.table(heavy, schema=RECORDS), row_group_size=GROUP)
                heavy = {"text": [], "record": []}
            if n % GROUP == 0:
                advance(n, total)
        if heavy["text"]:
            file.write_table(pa.table(heavy, schema=RECORDS), row_group_size=GROUP)
    reasons = fates.by_filter(ids, means)
    light["fate"] = [
        fate or reasons.get(i, "unknown")
        for i, fate in zip(light["id"], light["fate"], strict=True)
    ]
    pq.write_table(pa.table(light, schema=COLUMNS), partial / "columns.parquet")
    about = {
        "set": rows.name,
        "rows": len(light["id"]),
        "unreadable": unreadable,
        "decided_by": fates.stage,
        "judge": judged.name or None,
        "coloured": coloured,
        "why_no_colour": "" if coloured else scores.why_not or "these responses were not scored",
    }
    write_atomic(partial / "about.json", json.dumps(about) + "\n", sync=False)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    for old in home.glob(f"{stem}.*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    advance(total, total)
    return target


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= QUERY_CHARS else line[: QUERY_CHARS - 1] + "…"


def _gaps(means: Mapping[str, float | None]) -> dict[str, float]:
    """The two steering gaps of one triple; none where a sequence is not scored."""
    found = {s: v for s, v in means.items() if v is not None}
    if len(found) < len(means) or not found:
        return {}
    return {
        "good": found["good/good"] - found["bad/good"],
        "bad": found["bad/bad"] - found["good/bad"],
    }


def _searched(triple: Triple) -> str:
    principles = [triple.principles.good, triple.principles.bad] if triple.principles else []
    turns = [m.content for m in triple.messages]
    return "\n".join([triple.id, *turns, *triple.responses.values(), *principles]).casefold()


@dataclass(frozen=True)
class Wanted:
    """What part of a set somebody looks at, in which order."""

    q: str = ""
    fate: str = ""
    verdict: str = ""
    feature: str = ""
    sort: str = ""
    ascending: bool = False


class Index:
    """A set's rows, opened: what the list needs is in memory, texts stay on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_bytes())
        self.columns = pq.read_table(folder / "columns.parquet", schema=COLUMNS)
        self._file = pq.ParquetFile(folder / "rows.parquet")
        self._at = {i: n for n, i in enumerate(self.columns["id"].to_pylist())}
        self.find = lru_cache(maxsize=32)(self._find)
        self.summary = lru_cache(maxsize=1)(self._summary)

    def counts(self, column: str) -> dict[str, int]:
        """How often each value occurs, frequent ones first."""
        found = pc.value_counts(self.columns[column]).to_pylist()
        pairs = {v["values"]: v["counts"] for v in found if v["values"] is not None}
        return dict(sorted(pairs.items(), key=lambda p: -p[1]))

    def _summary(self) -> dict[str, Any]:
        """What is to be said of the whole set."""
        features = Counter(f for row in self.columns["features"].to_pylist() for f in row)
        return {
            "of": self.about["rows"],
            "fates": self.counts("fate"),
            "verdicts": self.counts("verdict"),
            "features": dict(features.most_common()),
            **{k: self.about[k] for k in ("unreadable", "decided_by", "judge", "why_no_colour")},
        }

    def _find(self, wanted: Wanted) -> np.ndarray:
        """Row numbers of what is wanted, in its order; rows without a figure come last.

        Raises:
            DataError: an unknown order.
        """
        mask = np.ones(self.columns.num_rows, dtype=bool)
        if wanted.fate == "dropped":
            mask &= ~self._is("fate", KEPT) & ~self._is("fate", PENDING)
        elif wanted.fate:
            mask &= self._is("fate", wanted.fate)
        if wanted.verdict:
            mask &= self._is("verdict", wanted.verdict)
        if wanted.feature:
            named = self.columns["features"].combine_chunks()
            of = pc.list_parent_indices(named).to_numpy()
            hits = pc.equal(pc.list_flatten(named), wanted.feature).to_numpy(zero_copy_only=False)
            mask &= np.isin(np.arange(len(mask)), of[hits])
        if wanted.q:
            mask &= self._holding(wanted.q)
        rows = np.flatnonzero(mask)
        if not wanted.sort:
            return rows
        if wanted.sort not in SORTS:
            raise DataError(f"rows are sorted by {', '.join(SORTS)}, not by {wanted.sort!r}.")
        values = self.columns[wanted.sort].cast(pa.float64()).to_numpy()[rows]
        key = values if wanted.ascending else -values
        return rows[np.argsort(key, kind="stable")]  # NaN sorts behind everything

    def _holding(self, words: str) -> np.ndarray:
        """(N,) mask of rows whose id, query, responses or principles hold the words."""
        wanted = words.casefold()
        parts = [
            pc.match_substring(batch["text"], wanted).to_numpy(zero_copy_only=False)
            for batch in self._file.iter_batches(columns=["text"], batch_size=4 * GROUP)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def _is(self, column: str, value: str) -> np.ndarray:
        same = pc.fill_null(pc.equal(self.columns[column], value), False)
        return np.asarray(same.to_numpy())

    def page(self, wanted: Wanted, offset: int, limit: int) -> list[dict[str, Any]]:
        """Rows of the list; ``n`` is a row's number in the set."""
        numbers = self.find(wanted)[offset : offset + limit]
        rows: list[dict[str, Any]] = self.columns.take(pa.array(numbers)).to_pylist()
        return [{"n": int(n), **row} for n, row in zip(numbers, rows, strict=True)]

    def number(self, identity: str) -> int | None:
        """The row of a triple."""
        return self._at.get(identity)

    def records(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The whole rows, in the order given; ascending numbers cost least."""
        group, texts = -1, list[str]()
        for number in map(int, numbers):
            if number // GROUP != group:
                group = number // GROUP
                texts = self._file.read_row_group(group, columns=["record"])["record"].to_pylist()
            row = self.columns.slice(number, 1).to_pylist()[0]
            yield {"n": number, **row, **json.loads(texts[number % GROUP])}

    def export(self, wanted: Wanted) -> Iterator[str]:
        """The triples wanted as JSONL, each with what the list says of it, in stored order."""
        for record in self.records(np.sort(self.find(wanted))):
            yield export_line(record)


def export_line(record: Mapping[str, Any]) -> str:
    """A triple as it is stored, with its fate, verdict and figures beside."""
    extra = {k: record[k] for k in ("fate", "verdict", *SORTS) if record[k] is not None}
    return dump_line({**record["triple"], **extra})


def sample(index: Index, cap: int, most_bytes: int) -> list[dict[str, Any]]:
    """Rows spread evenly over a set, as many as two limits allow, for a page without a server."""
    count = index.about["rows"]
    step = max(math.ceil(count / cap), 1)
    while True:
        found = list(index.records(range(0, count, step)))
        if len(found) <= 1 or sum(len(json.dumps(r)) for r in found) <= most_bytes:
            return found
        step *= 2


def embedded(run: Path, cap: int = 200, most_bytes: int = 1_500_000) -> dict[str, Any] | None:
    """What ``browser_section.html.j2`` needs in a page without a server; None without triples.

    Args:
        run: the run folder.
        cap: rows of all sets together at most.
        most_bytes: of their JSON at most.
    """
    sets = row_sets(run)
    rows, about = [], {}
    with progress_bar("indexing triples", len(sets)) as bar:
        for found in sets:
            index = Index(build(found))
            shown = sample(index, max(cap // len(sets), 1), most_bytes // len(sets))
            rows += [{"set": found.name, **r} for r in shown]
            total, cut = index.about["rows"], ""
            if len(shown) < total:
                cut = f"this page holds {len(shown):,} of {total:,}; selfsteer view shows all"
            about[found.name] = {**index.summary(), "of": len(shown), "cap": cut}
            bar.advance(1)
    start = {
        "run": run.resolve().name,
        "sets": [s.name for s in sets],
        "rows": finite(rows),
        "about": about,
        "exported": ["fate", "verdict", *SORTS],
    }
    return {"start": start, "browser_style": asset("browser.css")} if rows else None


def main(run: str, name: str) -> None:
    """Makes one index; prints ``done total`` lines."""
    rows = next((s for s in row_sets(Path(run)) if s.name == name), None)
    if rows is None:
        raise ArtifactError(f"{run} has no triples called {name!r}.")
    build(rows, lambda done, total: print(done, total, flush=True))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SelfsteerError as e:
        sys.exit(str(e))
