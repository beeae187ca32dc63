"""Rows of the data browser: a stage's triples with all that the run knows of each, in Parquet.

An index is made once per state of the stage and kept in ``RUN/.view``: `Index` then filters, sorts
and pages without reading the shards again. Nothing here locks or changes the run, and no model is
asked anything: log-probs, judgements and reasons are those that the run left behind.

``python -m selfsteer.report.browser RUN SET`` makes one index and prints how far it is.
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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import batched, dump_line, write_atomic
from selfsteer.data.records import RESPONSES, Preference, Query, Triple
from selfsteer.engines.base import Advance, no_news
from selfsteer.errors import ArtifactError, DataError, SelfsteerError
from selfsteer.judges.base import Pair, by_scores
from selfsteer.judges.load import load_judge
from selfsteer.judges.quality import GAP_SEQUENCES, steering_gaps
from selfsteer.methods import Aligning
from selfsteer.report.logprobs import LogProbs
from selfsteer.report.page import asset, finite
from selfsteer.terminal import progress_bar
from selfsteer.view import RunView, Sampled, objects

#: Part of each index's key; raised when what is kept of a row changes.
VERSION = 3
#: Rows per group of the Parquet file: what reading one triple costs.
GROUP = 256
#: No index takes so long; what is half made and older is nobody's.
LEFT_AFTER_S = 86_400.0
#: Characters of a query in the list.
QUERY_CHARS = 160

#: Not decided yet, passed on, lost without a record of why; other fates are reasons of the stage.
PENDING, KEPT, NO_RECORD = "pending", "kept", "no record kept"

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


def key_of(found: Sampled) -> str:
    """Changes when an index would have to be made again."""
    run = found.round.run.folder
    stages = [[s.name, s.done, s.fingerprint] for s in found.round.stages]
    files = []
    stores = [p for name in ("scores", "judgements") for p in (run / name).glob("*/*")]
    for path in [*found.shards, *sorted(stores)]:
        with contextlib.suppress(FileNotFoundError):
            there = path.stat()
            files.append([str(path.relative_to(run)), there.st_size, there.st_mtime_ns])
    return digest([VERSION, found.name, stages, files])


# -- what a run knows of a triple ------------------------------------------------------------------


class Judged:
    """What the recipe's judge said of good against bad; no judge with a model is asked anything."""

    def __init__(self, run: RunView) -> None:
        from selfsteer.judges.store import AnswerStore

        self.settings = run.recipe.judge if isinstance(run.recipe, Aligning) else None
        self.name = ""
        self._judge: Any = None
        self._stores: list[AnswerStore] = []
        if self.settings is None:
            return
        if self.settings.kind in ("oracle", "human"):
            with contextlib.suppress(SelfsteerError):
                self._judge = load_judge(self.settings)
        else:
            folders = sorted((run.folder / "judgements").glob("*/"))
            self._stores = [AnswerStore(f) for f in folders]
        self.name = f"{self.settings.kind}:{self.settings.model or self.settings.path or ''}"
        self.name = self.name.rstrip(":")

    def of(self, triple: Triple) -> dict[str, Any] | None:
        """Verdict, scores or both orders with the judge's own words; None: it was not asked."""
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
                if found := self._stored(store, pair):
                    return {"judge": self.name, **found}
        return None

    def _stored(self, store: Any, pair: Pair) -> dict[str, Any]:
        assert self.settings is not None
        if self.settings.kind == "chat":
            from selfsteer.judges.chat import stored_judgement

            both = stored_judgement(pair, store.known)
            if both is None:
                return {}
            judgement, texts = both
            sides = [{"first": "good", "second": "bad"}, {"first": "bad", "second": "good"}]
            orders = [
                {"first": side["first"], "said": side.get(said, said), "text": text}
                for side, said, text in zip(sides, judgement.shown or (), texts, strict=True)
            ]
            return {"verdict": judgement.verdict, "reason": judgement.reason, "orders": orders}
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


class ById:
    """Lines of JSONL files by the id of their record; only their places are in memory."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        for path in paths:
            with open(path, "rb") as file:
                start = 0
                for line in file:
                    self._places |= {str(v.get("id")): (path, start) for v in objects(line)}
                    start += len(line)

    def get(self, identity: str) -> dict[str, Any] | None:
        """The record; None where there is none."""
        if identity not in self._places:
            return None
        path, start = self._places[identity]
        with open(path, "rb") as file:
            file.seek(start)
            return dict(json.loads(file.readline()))


class Fates:
    """Whether a triple was passed on, and if not, why: as the stages after it wrote it down."""

    def __init__(self, found: Sampled) -> None:
        self.stage = found.takers[0].name if found.takers else ""
        self.decided = bool(found.takers) and found.takers[0].done
        self._kept = ById(found.takers[0].files if self.decided else ())
        dropped = (stage.dropped_file for stage in found.takers)
        self._dropped = ById(path for path in dropped if path.exists())

    def of(self, triple: Triple) -> tuple[str, Triple]:
        """Its fate, and what the stage made of it: what is trained on, if it was kept."""
        dropped, kept = self._dropped.get(triple.id), self._kept.get(triple.id)
        fate = PENDING if not self.decided else KEPT if kept else NO_RECORD
        record = kept
        if dropped is not None:
            fate, record = str(dropped["reason"]), dropped.get("record")
        if not record:
            return fate, triple
        is_pair = "chosen" in record
        made = Preference.from_dict(record).to_triple() if is_pair else Triple.from_dict(record)
        return fate, replace(triple, responses={**triple.responses, **made.responses})


# -- the index -------------------------------------------------------------------------------------


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


def index_folder(found: Sampled) -> Path:
    """Where the index of a set is, or will be, as the set is now."""
    home = cache_folder(found.round.run.folder)
    return home / f"{found.name.replace('/', '-')}.{key_of(found)}"


def build(found: Sampled, advance: Advance = no_news) -> Path:
    """Makes the index of a set, unless it is there, and removes older ones; returns its folder.

    Args:
        found: the set.
        advance: told how many rows are done, now and then.
    """
    target = index_folder(found)
    home, stem = target.parent, target.name.rpartition(".")[0]
    if (target / "about.json").exists():
        return target
    for left in home.glob(f".{stem}.*"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=home, prefix=f".{stem}."))
    rows = Rows(found)
    light: list[dict[str, Any]] = []
    with pq.ParquetWriter(partial / "rows.parquet", RECORDS, compression="zstd") as file:
        for part in batched(rows, GROUP):
            light += [row for row, _ in part]
            heavy = pa.Table.from_pylist([record for _, record in part], schema=RECORDS)
            file.write_table(heavy, row_group_size=GROUP)
            advance(len(part), 0)
    columns = pa.Table.from_pylist(light, schema=COLUMNS)
    pq.write_table(columns, partial / "columns.parquet")
    about = {"set": found.name, "rows": len(light), **rows.about()}
    write_atomic(partial / "about.json", json.dumps(about) + "\n", sync=False)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    for old in home.glob(f"{stem}.*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


class Rows:
    """The rows of a set one after the other, each in two parts: for the list, and the rest."""

    def __init__(self, found: Sampled) -> None:
        self.shards = found.shards
        self.logprobs, self.fates = LogProbs(found.round), Fates(found)
        self.judged = Judged(found.round.run)
        self.unreadable = self.coloured = 0

    def about(self) -> dict[str, Any]:
        """What is to be said of the whole, once all rows were made."""
        why = self.logprobs.why_not or "these responses were not scored"
        return {
            "unreadable": self.unreadable,
            "decided_by": self.fates.stage,
            "judge": self.judged.name or None,
            "why_no_colour": "" if self.coloured else why,
        }

    def __iter__(self) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        for part in batched(self._triples(), GROUP):
            fates = [self.fates.of(triple) for _, triple in part]
            made = [triple for _, triple in fates]
            gaps = steering_gaps({s: self.logprobs.means(made, s) for s in GAP_SEQUENCES})
            tokens = {r: self.logprobs.tokens(made, r) for r in RESPONSES}
            for i, ((value, triple), (fate, trained_on)) in enumerate(
                zip(part, fates, strict=True)
            ):
                own = {side: float(values[i]) for side, values in gaps.items()}
                shown = {r: t[i] for r, t in tokens.items() if t[i]}
                self.coloured += bool(shown)
                yield self._row(value, triple, trained_on, fate, own, shown)

    def _triples(self) -> Iterator[tuple[dict[str, Any], Triple]]:
        """Each line as stored and as a triple; what is none, or not whole, is counted."""
        for shard in self.shards:
            with open(shard, "rb") as file:
                for line in file:
                    try:
                        value = json.loads(line)
                        triple = Triple.from_dict(value)
                    except (ValueError, DataError, TypeError, KeyError):
                        self.unreadable += 1
                    else:
                        yield value, triple

    def _row(
        self,
        value: dict[str, Any],
        triple: Triple,
        made: Triple,
        fate: str,
        gaps: dict[str, float],
        tokens: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, str]]:
        whole = {"good", "bad"} <= set(triple.responses)
        judgement = self.judged.of(made) if whole else None
        gap = sum(gaps.values())
        difference = len(made.responses["good"]) - len(made.responses["bad"]) if whole else None
        principles = triple.principles
        query = " ".join(triple.messages[-1].content.split())
        row = {
            "id": triple.id,
            "query": query if len(query) <= QUERY_CHARS else query[: QUERY_CHARS - 1] + "…",
            "features": list(principles.features) if principles else [],
            "fate": fate,
            "verdict": judgement["verdict"] if judgement else None,
            "gap": None if math.isnan(gap) else gap,
            "disagreement": disagreement(judgement),
            "length_difference": difference,
        }
        texts = [triple.id, *(m.content for m in triple.messages), *triple.responses.values()]
        texts += [principles.good, principles.bad] if principles else []
        changed = {r: t for r, t in made.responses.items() if t != triple.responses.get(r)}
        record = {
            "triple": value,
            "trained_on": changed,
            "gaps": {} if math.isnan(gap) else gaps,
            "judgement": judgement,
            "tokens": tokens,
        }
        return row, {
            "text": "\n".join(texts).casefold(),
            "record": json.dumps(record, ensure_ascii=False),
        }


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


def embedded(run: RunView, cap: int = 200, most_bytes: int = 1_500_000) -> dict[str, Any] | None:
    """What ``browser_section.html.j2`` needs in a page without a server; None without triples.

    Args:
        run: the run.
        cap: rows of all sets together at most.
        most_bytes: of their JSON at most.
    """
    sets = run.sampled
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
        "run": run.folder.resolve().name,
        "sets": [s.name for s in sets],
        "rows": finite(rows),
        "about": about,
        "exported": ["fate", "verdict", *SORTS],
    }
    return {"start": start, "browser_style": asset("browser.css")} if rows else None


def main(run: str, name: str) -> None:
    """Makes one index; prints ``done total`` lines."""
    found = next((s for s in RunView.open(Path(run)).sampled if s.name == name), None)
    if found is None:
        raise ArtifactError(f"{run} has no triples called {name!r}.")
    done, total = 0, sum(path.read_bytes().count(b"\n") for path in found.shards)

    def advance(items: int, tokens: int) -> None:
        nonlocal done
        done += items
        print(done, total, flush=True)

    build(found, advance)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SelfsteerError as e:
        sys.exit(str(e))
