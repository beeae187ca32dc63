"""Rows of the data browser: what a stage sampled with all that the run knows of it, in SQLite.

An index is made once per state of the stage and kept in the user's cache: `Index` then filters,
sorts and pages without reading the shards again. Nothing here locks or changes the run, and no
model is asked anything: log-probs, judgements and reasons are those that the run left behind.

``python -m selfsteer.report.browser RUN SET`` makes one index and prints how far it is.
"""

import contextlib
import json
import math
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from selfsteer.data.digests import digest
from selfsteer.data.files import cache_home
from selfsteer.data.jsonl import batched, dump_line, lines
from selfsteer.data.records import RESPONSES, Preference, Query, Triple
from selfsteer.engines.base import Advance, no_news
from selfsteer.errors import ArtifactError, DataError, SelfsteerError, short
from selfsteer.judges.base import Pair, ScoringJudge, by_scores
from selfsteer.judges.load import load_judge
from selfsteer.judges.quality import GAP_SEQUENCES, steering_gaps
from selfsteer.methods import Aligning
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.report.colours import LEVELS
from selfsteer.report.logprobs import LogProbs
from selfsteer.report.page import asset, finite
from selfsteer.stages.rank import Candidates
from selfsteer.stages.teach import taught
from selfsteer.terminal import progress_bar
from selfsteer.view import RunView, Sampled, answers_of

T = TypeVar("T")

#: Part of each index's key; raised when what is kept of a row changes.
VERSION = 6
#: Triples whose log-probs are looked up together.
GROUP = 256
#: No index takes this long to build; a half-made file that is older was abandoned.
LEFT_AFTER_S = 86_400.0
#: Indices of a run that nobody has looked at for a month are removed.
UNUSED_AFTER_S = 30 * 86_400.0
#: Of an index that are mapped into memory at most; SQLite itself stops at 2 GB.
MAPPED_BYTES = 2**31
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
    folders = sorted((run.folder / "judgements").glob("*/"))
    stores = [AnswerStore(f) for f in folders if all(map(run.owns, f.iterdir()))]
    read = _from_chat if settings.kind == "chat" else partial(_from_scores, settings)
    return name, lambda pair: next(filter(None, (read(store, pair) for store in stores)), None)


def _asked(judge: Any, pair: Pair) -> Said:
    """Of a judge that costs nothing: verdict and, where it has some, scores."""
    found: dict[str, Any] = {"verdict": judge.compare_all([pair])[0].verdict}
    if isinstance(judge, ScoringJudge):
        both = [(pair.query, pair.first), (pair.query, pair.second)]
        found["scores"] = judge.score_all(both, pair.finished)
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

    sides = zip((pair.first, pair.second), pair.finished, strict=True)
    answers = [store.known(score_key(settings, pair.query, text, end)) for text, end in sides]
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
    """Whether a record was passed on, and if not, why: as the stages after it wrote it down."""

    def __init__(self, found: Sampled) -> None:
        self.stage = found.takers[0].name if found.takers else ""
        self.decided = bool(found.takers) and found.takers[0].done
        files = [stage.files for stage in found.takers if stage.done]
        self._made = [ById(f) for f in files if f and f[0].suffix == ".jsonl"]
        # a teacher keeps targets of the answers that it read, not the answers
        is_teacher = self.decided and found.takers[0].kind == "Teach"
        self._taught = taught(found.takers[0].run / self.stage) if is_teacher else {}
        self._dropped = ById(filter(None, (stage.dropped_file for stage in found.takers)))

    def record(self, identity: str) -> tuple[str, list[dict[str, Any]]]:
        """Its fate, and what each stage made of it; in the end what was dropped of it."""
        found = [stage.get(identity) for stage in self._made]
        made = [record for record in found if record]
        dropped = self._dropped.get(identity)
        if dropped is not None:
            return str(dropped["reason"]), [*made, dropped.get("record") or {}]
        is_kept = (bool(made) and len(made) == len(found)) or identity in self._taught
        return PENDING if not self.decided else KEPT if is_kept else NO_RECORD, made

    def of(self, triple: Triple) -> tuple[str, Triple]:
        """Its fate, and what the stages made of it: what is trained on, if it was kept."""
        fate, records = self.record(triple.id)
        for record in records:
            if "chosen" in record:
                triple = _with(triple, Preference.from_dict(record).to_triple())
            elif record.get("responses"):
                triple = _with(triple, Triple.from_dict(record))
        return fate, triple


def _with(triple: Triple, made: Triple) -> Triple:
    """The triple with the other one's responses in place of those of the same names."""

    def both(own: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
        return {name: x for name, x in own.items() if name not in made.responses} | dict(new)

    return replace(
        triple,
        responses=both(triple.responses, made.responses),
        finish_reasons=both(triple.finish_reasons, made.finish_reasons),
        reasoning=both(triple.reasoning, made.reasoning),
    )


# -- the index -------------------------------------------------------------------------------------


def cache_folder(run: Path) -> Path:
    """Where the indices of a run are: in the user's cache, or else in the temporary folder.

    Not in the run folder: an index that came with the run of somebody else would be believed.

    Raises:
        ArtifactError: others can write there.
    """
    name = digest(str(run.resolve()))
    places = (cache_home() / "view" / name, Path(tempfile.gettempdir()) / f"selfsteer-view-{name}")
    for mine in places:
        try:
            mine.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=mine):
                break
        except OSError as e:
            why = e
    else:
        raise ArtifactError(
            f"No index can be written: {' and '.join(map(str, places))} cannot be used "
            f"({why.strerror}). Set SELFSTEER_CACHE to a folder of your own."
        )
    found = mine.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ArtifactError(
            f"{mine} is a link, or somebody else's, or open to others: what they put there "
            "would be shown. Remove it, or set SELFSTEER_CACHE to a folder of your own."
        )
    os.utime(mine)
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

    Raises:
        ArtifactError: it cannot be written.
    """
    target = index_file(found)
    home, stem = target.parent, target.name.rpartition(".")[0]
    if target.exists():
        with contextlib.suppress(ArtifactError):  # damaged: made again
            Index(target).close()
            return target
    for other in home.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            if other.name != home.name and time.time() - other.stat().st_mtime > UNUSED_AFTER_S:
                shutil.rmtree(other, ignore_errors=True)
    for left in home.glob(f".{stem}.*"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                left.unlink()
    descriptor, name = tempfile.mkstemp(dir=home, prefix=f".{stem}.")
    rows, marks = Rows(found), ", ".join("?" * (len(COLUMNS) + 2))
    try:
        with contextlib.closing(sqlite3.connect(name)) as database, database:
            database.executescript(SCHEMA)
            insert = f"INSERT INTO rows ({', '.join(COLUMNS)}, text, record) VALUES ({marks})"
            for part in batched(rows, GROUP):
                database.executemany(insert, part)
                advance(len(part), 0)
            database.execute("INSERT INTO about VALUES (?)", [json.dumps(rows.about())])
        os.fsync(descriptor)
        os.replace(name, target)
    except sqlite3.Error as e:
        raise ArtifactError(
            f"The index {target} cannot be written ({e}). Free some room, or set SELFSTEER_CACHE "
            "to a folder where there is some."
        ) from None
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)
    for old in home.glob(f"{stem}.*"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


class _Competing(NamedTuple):
    """A query, the answers that compete, by name, and each of them as it was scored."""

    query: Query
    answers: dict[str, str]
    triples: list[Triple]


def _competing(value: Mapping[str, Any]) -> _Competing:
    """Reads candidates; raises DataError where an answer or the principles are none."""
    found = Candidates.from_dict(value)
    given, answers = found.query.to_dict(), answers_of(found.to_dict())
    # as `PrincipleContrast` does
    triples = [Triple.from_dict({**given, "responses": {"plain": x}}) for x in answers.values()]
    return _Competing(found.query, answers, triples)


class Rows:
    """The rows of a set one after the other, as the table holds them."""

    def __init__(self, found: Sampled) -> None:
        self.shards, self.ranked = found.shards, found.ranked
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
            "clip": self.logprobs.clip,
        }

    def __iter__(self) -> Iterator[list[Any]]:
        return self._of_candidates() if self.ranked else self._of_triples()

    def _of_triples(self) -> Iterator[list[Any]]:
        for part in batched(self._read(Triple.from_dict), GROUP):
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

    def _of_candidates(self) -> Iterator[list[Any]]:
        for part in batched(self._read(_competing), GROUP):
            tokens = iter(self.logprobs.tokens([t for _, c in part for t in c.triples], "plain"))
            for value, candidates in part:
                found = {name: next(tokens) for name in candidates.answers}
                self.count += 1
                yield self._ranked(value, candidates, {n: t for n, t in found.items() if t})

    def _ranked(
        self, value: dict[str, Any], candidates: "_Competing", tokens: dict[str, Any]
    ) -> list[Any]:
        fate, made = self.fates.record(candidates.query.id)
        pairs = [Preference.from_dict(record) for record in made if "chosen" in record]
        pair = pairs[0] if pairs else None
        roles = {pair.rejected: "rejected", pair.chosen: "chosen"} if pair else {}
        scores = pair.extra.get("scores") if pair else None
        self.coloured += bool(tokens)
        record = {
            "triple": value,
            "answers": [
                {"name": name, "role": roles.get(text), "score": scores[i] if scores else None}
                for i, (name, text) in enumerate(candidates.answers.items())
            ],
            "trained_on": {},
            "gaps": {},
            "judgement": None,
            "tokens": tokens,
        }
        principles = value.get("principles") or {}
        texts = [
            *candidates.answers.values(),
            *(principles.get(side, "") for side in ("good", "bad")),
        ]
        features = principles.get("features") or []
        difference = len(pair.chosen) - len(pair.rejected) if pair else None
        figures = [None, None, None, difference]
        return self._cells(candidates.query, texts, features, fate, figures, record)

    def _read(self, kind: Callable[[dict[str, Any]], T]) -> Iterator[tuple[dict[str, Any], T]]:
        """Each line as stored and as a record; what is none, or not whole, is counted."""
        for shard in self.shards:
            with open(shard, "rb") as file:
                for line in file:
                    try:
                        value = json.loads(line)
                        record = kind(value)
                    except (ValueError, DataError, TypeError, KeyError):
                        self.unreadable += 1
                    else:
                        yield value, record

    def _row(
        self,
        value: dict[str, Any],
        triple: Triple,
        made: Triple,
        fate: str,
        gaps: dict[str, float],
        tokens: dict[str, Any],
    ) -> list[Any]:
        whole = {"good", "bad"} <= set(made.responses)
        judgement: Said = None
        with contextlib.suppress(SelfsteerError):  # a query that is not of the judge's world
            if whole and self.judged:
                judgement = self.judged(Pair.of(made))
        # a steering gap is one of good and bad answers
        is_plain = made.responses.get("bad") == made.responses.get("plain")
        gap = math.nan if is_plain else sum(gaps.values())
        difference = len(made.responses["good"]) - len(made.responses["bad"]) if whole else None
        principles = triple.principles
        texts = [*triple.responses.values()]
        texts += [principles.good, principles.bad] if principles else []
        features = list(principles.features) if principles else []
        record = {
            "triple": value,
            "trained_on": {r: t for r, t in made.responses.items() if t != triple.responses.get(r)},
            "gaps": {} if math.isnan(gap) else gaps,
            "judgement": judgement and {"judge": self.judge, **judgement},
            "tokens": tokens,
        }
        figures = [
            judgement["verdict"] if judgement else None,
            None if math.isnan(gap) else gap,
            disagreement(judgement),
            difference,
        ]
        return self._cells(triple.query, texts, features, fate, figures, record)

    def _cells(
        self,
        query: Query,
        texts: list[str],
        features: Sequence[str],
        fate: str,
        figures: list[Any],
        record: dict[str, Any],
    ) -> list[Any]:
        """A row as the table holds it; ``figures`` are the columns from ``verdict`` on."""
        said = " ".join(query.text.split())
        searched = [query.id, *(m.content for m in query.messages), *texts]
        return [
            query.id,
            said if len(said) <= QUERY_CHARS else said[: QUERY_CHARS - 1] + "…",
            json.dumps(features, ensure_ascii=False),
            fate,
            *figures,
            "\n".join(searched).casefold(),
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

    def __post_init__(self) -> None:
        """Raises DataError: an unknown order."""
        if self.sort and self.sort not in SORTS:
            raise DataError(f"Rows are sorted by {', '.join(SORTS)}, not by {short(self.sort)}.")


class Index:
    """A set's rows, opened for reading.

    Raises:
        FileNotFoundError: it is gone.
        ArtifactError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.stat()  # SQLite's own error does not say why
        # SQLite lets one thread after the other use it
        self._database = sqlite3.connect(
            f"file:{quote(str(path))}?mode=ro", uri=True, check_same_thread=False
        )
        # a search reads every text: mapped, and with Python's own search, that takes half as long
        self._database.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
        self._database.create_function("holds", 2, lambda text, words: words in text)
        try:
            ((about,),) = self._select("json FROM about")
            self.about: dict[str, Any] = json.loads(about)
        except (sqlite3.Error, ValueError):
            self.close()
            raise ArtifactError(f"{path} is damaged. Remove it; it is made again.") from None
        self.find = lru_cache(maxsize=32)(self._find)
        self.summary = lru_cache(maxsize=1)(self._summary)

    def close(self) -> None:
        """Ends the reading."""
        self._database.close()

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
        figures = ("verdict", *SORTS)
        (there,) = self._select(f"{', '.join(f'count({name})' for name in figures)} FROM rows")
        filled = [name for name, n in zip(figures, there, strict=True) if n]
        return {
            **self.about,
            **counted,
            "features": dict(self._select(named)),
            "filled": filled,
        }

    def _find(self, wanted: Wanted) -> list[int]:
        """Row numbers of what is wanted, in its order; rows without a figure come last."""
        dropped = wanted.fate == "dropped"
        asked = {
            f"fate NOT IN ('{KEPT}', '{PENDING}', ?)": wanted.fate if dropped else "",
            "fate = ?": "" if dropped else wanted.fate,
            "verdict = ?": wanted.verdict,
            "EXISTS (SELECT 1 FROM json_each(features) WHERE value = ?)": wanted.feature,
            "holds(text, ?)": wanted.q.casefold(),
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
    with progress_bar("indexing answers", len(sets)) as bar:
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
        "levels": LEVELS,
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
