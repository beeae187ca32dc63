"""Rows of the data browser: a stage's triples with all that the run knows of each, in SQLite.

An index is made once per state of the stage and kept in ``RUN/.view``: `Index` then filters, sorts
and pages without reading the shards again. Nothing here locks or changes the run, and no model is
asked anything: log-probs, judgements and reasons are those that the run left behind.

``python -m selfsteer.report.browser RUN SET`` makes one index and prints how far it is.
"""

import contextlib
import json
import math
import os
import sqlite3
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import batched, dump_line, lines
from selfsteer.data.records import RESPONSES, Preference, Triple
from selfsteer.engines.base import Advance, no_news
from selfsteer.errors import ArtifactError, DataError, SelfsteerError, short
from selfsteer.judges.base import Pair, ScoringJudge, by_scores
from selfsteer.judges.load import load_judge
from selfsteer.judges.quality import GAP_SEQUENCES, steering_gaps
from selfsteer.methods import Aligning
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.report.logprobs import LogProbs
from selfsteer.report.page import asset, finite
from selfsteer.terminal import progress_bar
from selfsteer.view import RunView, Sampled

#: Part of each index's key; raised when what is kept of a row changes.
VERSION = 4
#: Triples whose log-probs are looked up together.
GROUP = 256
#: No index takes this long to build; a half-made file that is older was abandoned.
LEFT_AFTER_S = 86_400.0
#: Characters of a query in the list.
QUERY_CHARS = 160

#: Not decided yet, passed on, lost without a record of why; other fates are reasons of the stage.
PENDING, KEPT, NO_RECORD = "pending", "kept", "no record kept"

SORTS = ("gap", "disagreement", "length_difference")

#: What the list shows, and what it is filtered and sorted by.
COLUMNS = ("id", "query", "features", "fate", "verdict", *SORTS)
#: ``text`` is searched; ``record``, compressed, has all the rest.
SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE rows (n INTEGER PRIMARY KEY, {", ".join(COLUMNS)}, text, record);
CREATE INDEX ids ON rows (id);
CREATE TABLE about (json);
"""


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


#: What a judge said of good against bad, as the page shows it; None: it was not asked.
Said = dict[str, Any] | None


def judged(run: RunView) -> tuple[str, Callable[[Pair], Said]]:
    """The name of the recipe's judge, and what it said of a pair; no model is asked anything."""
    from selfsteer.judges.store import AnswerStore

    settings = run.recipe.judge if isinstance(run.recipe, Aligning) else None
    if settings is None:
        return "", lambda pair: None
    name = f"{settings.kind}:{settings.model or settings.path or ''}".rstrip(":")
    if settings.model is None:
        return name, partial(_asked, load_judge(settings))
    stores = [AnswerStore(folder) for folder in sorted((run.folder / "judgements").glob("*/"))]
    read = _from_chat if settings.kind == "chat" else partial(_from_scores, settings)
    return name, lambda pair: next(filter(None, (read(store, pair) for store in stores)), None)


def _asked(judge: Any, pair: Pair) -> Said:
    """Of a judge that costs nothing: verdict and, where it has some, scores."""
    found: dict[str, Any] = {"verdict": judge.compare_all([pair])[0].verdict}
    if isinstance(judge, ScoringJudge):
        found["scores"] = judge.score_all([(pair.query, pair.first), (pair.query, pair.second)])
    return found


def _from_chat(store: Any, pair: Pair) -> Said:
    """Of a chat model: the verdict, and both orders in its own words."""
    from selfsteer.judges.chat import stored_judgement

    both = stored_judgement(pair, store.known)
    if both is None:
        return None
    judgement, texts = both
    sides = [{"first": "good", "second": "bad"}, {"first": "bad", "second": "good"}]
    orders = [
        {"first": side["first"], "said": side.get(said, said), "text": text}
        for side, said, text in zip(sides, judgement.shown or (), texts, strict=True)
    ]
    return {"verdict": judgement.verdict, "reason": judgement.reason, "orders": orders}


def _from_scores(settings: JudgeConfig, store: Any, pair: Pair) -> Said:
    """Of a model that scores: the verdict and both scores."""
    from selfsteer.judges.scoring import score_key

    answers = [store.known(score_key(settings, pair.query, t)) for t in (pair.first, pair.second)]
    if None in answers:
        return None
    a, b = (answer["score"] for answer in answers)
    return {"verdict": by_scores(a, b, settings.tie_margin), "scores": [a, b]}


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
                    self._places |= {str(v.get("id")): (path, start) for v in lines(line)}
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


def index_file(found: Sampled) -> Path:
    """Where the index of a set is, or will be, as the set is now."""
    home = cache_folder(found.round.run.folder)
    return home / f"{found.name.replace('/', '-')}.{key_of(found)}"


def build(found: Sampled, advance: Advance = no_news) -> Path:
    """Makes the index of a set, unless it is there, and removes older ones; returns its file.

    Args:
        found: the set.
        advance: told how many rows are done, now and then.
    """
    target = index_file(found)
    home, stem = target.parent, target.name.rpartition(".")[0]
    if target.exists():
        return target
    for left in home.glob(f".{stem}.*"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                left.unlink()
    descriptor, name = tempfile.mkstemp(dir=home, prefix=f".{stem}.")
    os.close(descriptor)
    rows, marks = Rows(found), ", ".join("?" * (len(COLUMNS) + 2))
    with contextlib.closing(sqlite3.connect(name)) as database, database:
        database.executescript(SCHEMA)
        insert = f"INSERT INTO rows ({', '.join(COLUMNS)}, text, record) VALUES ({marks})"
        for part in batched(rows, GROUP):
            database.executemany(insert, part)
            advance(len(part), 0)
        database.execute("INSERT INTO about VALUES (?)", [json.dumps(rows.about())])
    os.replace(name, target)
    for old in home.glob(f"{stem}.*"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


class Rows:
    """The rows of a set one after the other, as the table holds them."""

    def __init__(self, found: Sampled) -> None:
        self.shards = found.shards
        self.logprobs, self.fates = LogProbs(found.round), Fates(found)
        self.judge, self.judged = "", None
        with contextlib.suppress(SelfsteerError):
            self.judge, self.judged = judged(found.round.run)
        self.count = self.unreadable = self.coloured = 0

    def about(self) -> dict[str, Any]:
        """What is to be said of the whole, once all rows were made."""
        why = self.logprobs.why_not or "these responses were not scored"
        return {
            "of": self.count,
            "unreadable": self.unreadable,
            "decided_by": self.fates.stage,
            "judge": self.judge or None,
            "why_no_colour": "" if self.coloured else why,
        }

    def __iter__(self) -> Iterator[list[Any]]:
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
                self.count += 1
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
    ) -> list[Any]:
        whole = {"good", "bad"} <= set(triple.responses)
        judgement: Said = None
        with contextlib.suppress(SelfsteerError):  # a query that is not of the judge's world
            if whole and self.judged:
                pair = Pair(made.query, made.responses["good"], made.responses["bad"])
                judgement = self.judged(pair)
        gap = sum(gaps.values())
        difference = len(made.responses["good"]) - len(made.responses["bad"]) if whole else None
        principles = triple.principles
        said = " ".join(triple.messages[-1].content.split())
        texts = [triple.id, *(m.content for m in triple.messages), *triple.responses.values()]
        texts += [principles.good, principles.bad] if principles else []
        record = {
            "triple": value,
            "trained_on": {r: t for r, t in made.responses.items() if t != triple.responses.get(r)},
            "gaps": {} if math.isnan(gap) else gaps,
            "judgement": judgement and {"judge": self.judge, **judgement},
            "tokens": tokens,
        }
        return [
            triple.id,
            said if len(said) <= QUERY_CHARS else said[: QUERY_CHARS - 1] + "…",
            json.dumps(principles.features if principles else [], ensure_ascii=False),
            fate,
            judgement["verdict"] if judgement else None,
            None if math.isnan(gap) else gap,
            disagreement(judgement),
            difference,
            "\n".join(texts).casefold(),
            zlib.compress(json.dumps(record).encode(), 1),
        ]


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
    """A set's rows, opened for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # SQLite lets one thread after the other use it
        self._database = sqlite3.connect(
            f"file:{quote(str(path))}?mode=ro", uri=True, check_same_thread=False
        )
        ((about,),) = self._select("json FROM about")
        self.about: dict[str, Any] = json.loads(about)
        self.find = lru_cache(maxsize=32)(self._find)
        self.summary = lru_cache(maxsize=1)(self._summary)

    def _select(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._database.execute(f"SELECT {query}", values).fetchall()

    def counts(self, column: str) -> dict[str, int]:
        """How often each value occurs, frequent ones first."""
        found = f"{column}, count(*) FROM rows WHERE {column} NOTNULL GROUP BY 1 ORDER BY 2 DESC"
        return dict(self._select(found))

    def _summary(self) -> dict[str, Any]:
        """What is to be said of the whole set."""
        named = "value, count(*) FROM rows, json_each(features) GROUP BY 1 ORDER BY 2 DESC"
        counted = {"fates": self.counts("fate"), "verdicts": self.counts("verdict")}
        return {**self.about, **counted, "features": dict(self._select(named))}

    def _find(self, wanted: Wanted) -> list[int]:
        """Row numbers of what is wanted, in its order; rows without a figure come last.

        Raises:
            DataError: an unknown order.
        """
        if wanted.sort and wanted.sort not in SORTS:
            raise DataError(f"rows are sorted by {', '.join(SORTS)}, not by {short(wanted.sort)}.")
        dropped = wanted.fate == "dropped"
        asked = {
            f"fate NOT IN ('{KEPT}', '{PENDING}', ?)": wanted.fate if dropped else "",
            "fate = ?": "" if dropped else wanted.fate,
            "verdict = ?": wanted.verdict,
            "EXISTS (SELECT 1 FROM json_each(features) WHERE value = ?)": wanted.feature,
            "instr(text, ?)": wanted.q.casefold(),
        }
        given = {condition: value for condition, value in asked.items() if value}
        where = " AND ".join(given) or "1"
        upwards = "ASC" if wanted.ascending else "DESC"
        order = f"{wanted.sort} ISNULL, {wanted.sort} {upwards}, n" if wanted.sort else "n"
        return [
            n
            for (n,) in self._select(f"n FROM rows WHERE {where} ORDER BY {order}", *given.values())
        ]

    def page(self, wanted: Wanted, offset: int, limit: int) -> list[dict[str, Any]]:
        """Rows of the list; ``n`` is a row's number in the set."""
        return list(map(self._row, self.find(wanted)[offset : offset + limit]))

    def _row(self, number: int) -> dict[str, Any]:
        (row,) = self._select(f"{', '.join(COLUMNS)} FROM rows WHERE n = ?", number)
        found = dict(zip(COLUMNS, row, strict=True))
        return {"n": number, **found, "features": json.loads(found["features"])}

    def number(self, identity: str) -> int | None:
        """The row of a triple."""
        return next((n for (n,) in self._select("n FROM rows WHERE id = ?", identity)), None)

    def records(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The whole rows, in the order given."""
        for number in numbers:
            ((record,),) = self._select("record FROM rows WHERE n = ?", number)
            yield {**self._row(number), **json.loads(zlib.decompress(record))}

    def export(self, wanted: Wanted) -> Iterator[str]:
        """The triples wanted as JSONL, each with what the list says of it, in stored order."""
        return map(export_line, self.records(sorted(self.find(wanted))))


def export_line(record: Mapping[str, Any]) -> str:
    """A triple as it is stored, with its fate, verdict and figures beside."""
    extra = {k: record[k] for k in ("fate", "verdict", *SORTS) if record[k] is not None}
    return dump_line({**record["triple"], **extra})


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
            count = index.about["of"]
            step = max(math.ceil(count * len(sets) / cap), 1)  # spread evenly over the set
            shown = list(index.records(range(1, count + 1, step)))
            while len(shown) > 1 and len(json.dumps(shown)) > most_bytes // len(sets):
                shown = shown[::2]
            rows += [{"set": found.name, **r} for r in shown]
            cut = ""
            if len(shown) < count:
                cut = f"this page holds {len(shown):,} of {count:,}; selfsteer view shows all"
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
        raise ArtifactError(f"{run} has no triples called {short(name)}.")
    found.round.run.check(found.shards[0].parent)
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
