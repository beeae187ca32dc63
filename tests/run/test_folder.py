import errno
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.digests import derive_seed, digest, digest_path
from selfsteer.data.jsonl import disk_errors, read_shards, write_atomic
from selfsteer.data.records import Dropped
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.run import folder as run_folder
from selfsteer.run.folder import RunFolder, StageResult, logged, read_dropped, refuse, run_shards
from selfsteer.run.stage import COSTS_ONLY, Stage

# -- files ----------------------------------------------------------------------------------------


def test_write_atomic_replaces_and_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_atomic(path, "né\n")
    assert path.read_bytes() == b"n\xc3\xa9\n"
    write_atomic(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, "replace", full)
        with pytest.raises(ArtifactError, match=r"disk is full.*a\.json"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]  # what would keep the disk full
    write_atomic(path, "newer")
    assert path.read_text() == "newer"


@pytest.mark.parametrize(
    "error", [OSError(errno.EFBIG, "File too large"), ValueError("I/O error (os error 27)")]
)
def test_a_limit_of_files_is_not_called_a_full_disk(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ArtifactError, match=r"larger than a file may be here.*ulimit -f"),
        disk_errors(tmp_path / "model"),
    ):
        raise error


def test_write_atomic_leaves_nothing_of_pieces_that_break_off(tmp_path: Path) -> None:
    def pieces() -> Iterator[str]:
        yield "one\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.json", pieces())
    assert list(tmp_path.iterdir()) == []


def test_write_atomic_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"file.*cannot be written"):
        write_atomic(tmp_path / "file" / "a.json", "x")


def test_digest_is_of_the_value_and_not_of_its_spelling() -> None:
    assert digest({"a": 1, "b": [1.5, "é"]}) == digest({"b": [1.5, "é"], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest(["a", "b"]) != digest(["b", "a"])
    assert len(digest("x")) == 16


def test_digest_path_sees_content_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("2")
    first = digest_path(folder)
    assert digest_path(folder) == first
    os.utime(folder / "a", (0, 0))  # times do not count
    assert digest_path(folder) == first
    copy = tmp_path / "elsewhere"
    (copy / "sub").mkdir(parents=True)
    (copy / "sub" / "b").write_text("2")
    (copy / "a").write_text("1")
    assert digest_path(copy) == first
    seen = {first}
    (folder / "a").write_text("3")
    seen.add(digest_path(folder))
    (folder / "a").rename(folder / "c")
    seen.add(digest_path(folder))
    (folder / "c").unlink()
    seen.add(digest_path(folder))
    assert len(seen) == 4


def test_digest_path_of_a_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = digest_path(tmp_path)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    odd.write_text("b")
    seen = {before, digest_path(tmp_path)}
    odd.rename(odd.with_name(os.fsdecode(b"\xfe.txt")))
    assert len(seen | {digest_path(tmp_path)}) == 3


def test_digest_path_of_a_large_file_sees_both_ends_and_the_size(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    size = 17 << 20
    seen = set()
    for position in (None, 0, size - 1):
        with open(file, "wb") as f:
            f.truncate(size)
            if position is not None:
                f.seek(position)
                f.write(b"x")
        seen.add(digest_path(file))
    with open(file, "r+b") as f:
        f.truncate(size + 1)
    seen.add(digest_path(file))
    assert len(seen) == 4


def test_seeds_are_the_same_in_every_version() -> None:
    """SHA-256 of ``0/triples/1``, first 8 bytes big-endian, halved."""
    assert derive_seed(0, "triples", 1) == 0xCEEA9F2EEBF825CB >> 1
    assert derive_seed(0, "triples", 1) == derive_seed("0", "triples", "1")
    seeds = {derive_seed(s, n, i) for s in range(5) for n in ("a", "b") for i in range(20)}
    assert len(seeds) == 200
    assert all(0 <= s < 2**63 for s in seeds)


# -- the lock -------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from selfsteer.run.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        run = RunFolder(tmp_path / "run")
        with (
            pytest.raises(ArtifactError, match=rf"in use by process {other.pid} on "),
            run.locked(),
        ):
            pass
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.wait(20) == 0
        with run.locked():
            held_by = (run / "lock").read_text()
    assert held_by.startswith(f"process {os.getpid()} on ")
    assert held_by.count("\n") == 1


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with (
        run.locked(),
        pytest.raises(ArtifactError, match=f"process {os.getpid()}"),
        run.locked(),
    ):
        pass


def test_a_folder_that_another_machine_took_over_is_left_to_it(tmp_path: Path) -> None:
    """Where locks are not shared, both would hold one: the later one goes on."""
    run = RunFolder(tmp_path)
    with run.locked():
        run.append("ledger.jsonl", {"event": "begin", "stage": "a", "fingerprint": "f"})
        (run / "lock").write_text("process 7 on elsewhere since 2026-11-29 12:00:00\n")
        with pytest.raises(ArtifactError, match=r"taken over by process 7 on elsewhere.*locks"):
            run.append("ledger.jsonl", {"event": "finish", "stage": "a", "fingerprint": "f"})
        (run / "lock").unlink()
        with pytest.raises(ArtifactError, match="lock is gone"):
            run.append("ledger.jsonl", {"event": "finish", "stage": "a", "fingerprint": "f"})
    assert [e["event"] for e in run.ledger()] == ["begin"]


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    run = RunFolder(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot be locked \(No locks"), run.locked():
        pass


# -- ledger and stages ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Made(Stage):
    """A stage that makes one file and returns, or raises, what it is given."""

    result: StageResult | BaseException = field(metadata=COSTS_ONLY)
    setting: Any = 1
    title: str = field(default="one", kw_only=True)

    makes = ("{name}.jsonl",)

    def run(self, run: RunFolder) -> StageResult:
        if isinstance(self.result, BaseException):
            raise self.result
        write_atomic(run / self.outputs[0], "made\n")
        return self.result


def drops(**reasons: int) -> Counter[str]:
    return Counter(reasons)


def test_a_finished_stage_is_done_until_its_inputs_or_outputs_change(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = Made(StageResult(5, 3, drops(empty=1, unfinished=1), notes={"a": 1}))
    assert not run.is_done(first)
    assert run.stale([first]) == []
    run.execute(first)
    assert run.is_done(first)
    begin, finish = run.ledger()
    assert (begin["event"], begin["stage"], begin["kind"]) == ("begin", "one", "Made")
    assert begin["versions"]["torch"]
    assert {k: finish[k] for k in ("event", "n_in", "n_out", "dropped", "notes", "outputs")} == {
        "event": "finish",
        "n_in": 5,
        "n_out": 3,
        "dropped": {"empty": 1, "unfinished": 1},
        "notes": {"a": 1},
        "outputs": ["one.jsonl", "one.dropped.jsonl"],
    }
    other = Made(StageResult(1, 1), setting=2)
    assert not run.is_done(other)
    assert [e["stage"] for e in run.stale([other])] == ["one"]
    assert [e["stage"] for e in run.stale([])] == ["one"]
    assert run.stale([first]) == []
    (run / "one.jsonl").unlink()
    assert not run.is_done(first)


def test_a_stage_that_began_and_broke_is_not_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.execute(Made(KeyboardInterrupt()))
    assert [e["event"] for e in run.ledger()] == ["begin"]
    assert not run.is_done(Made(StageResult(1, 1)))
    assert run.stale([Made(StageResult(1, 1))]) == []
    assert len(run.stale([Made(StageResult(1, 1), setting=2)])) == 1


def test_counts_that_do_not_add_up_are_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ArtifactError, match="one lost count: 5 in, 3 out, 1 dropped"):
        run.execute(Made(StageResult(5, 3, drops(empty=1))))
    assert not run.is_done(Made(StageResult(5, 3)))
    run.execute(Made(StageResult(5, 8, one_to_one=False)))
    assert run.is_done(Made(StageResult(5, 8)))


def test_nothing_left_is_an_error_that_lists_the_drops(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ArtifactError, match=r"of 5 records.*4 unfinished, 1 empty"):
        run.execute(Made(StageResult(5, 0, drops(empty=1, unfinished=4))))
    assert not run.is_done(Made(StageResult(5, 0)))
    with pytest.raises(ArtifactError, match="there were none"):
        run.execute(Made(StageResult(0, 0), title="two"))


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_of_the_ledger_is_left_out_and_written_after(
    tmp_path: Path, cut: int
) -> None:
    run = RunFolder(tmp_path)
    run.execute(Made(StageResult(1, 1)))
    run.execute(Made(StageResult(1, 1), title="two"))
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    whole = 4 if cut == 1 else 3  # without its line end alone, the last entry is still whole
    assert len(run.ledger()) == whole
    assert run.is_done(Made(StageResult(1, 1)))
    assert run.is_done(Made(StageResult(1, 1), title="two")) == (cut == 1)
    run.execute(Made(StageResult(1, 1), title="two"))
    assert len(run.ledger()) == whole + 2
    assert run.is_done(Made(StageResult(1, 1), title="two"))


@pytest.mark.parametrize("log", ["ledger.jsonl", "metrics.jsonl"])
def test_a_line_too_deep_to_be_read_is_as_one_that_was_cut_short(tmp_path: Path, log: str) -> None:
    run = RunFolder(tmp_path)
    run.execute(Made(StageResult(1, 1)))
    with open(run / log, "a") as file:
        file.write('{"stage": ' + "[" * 100_000)
    assert len(run.ledger()) == 2
    assert logged(run / "metrics.jsonl") == {}
    run.rewind("metrics.jsonl", "policy", 0)


def test_outputs_that_are_no_names_are_damage(tmp_path: Path) -> None:
    entry = {"event": "finish", "stage": "x", "fingerprint": "y", "outputs": [5]}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ArtifactError, match="damaged in line 1"):
        RunFolder(tmp_path).damaged([])


def test_a_clock_that_goes_backwards_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = RunFolder(tmp_path), [2e9]

    def earlier() -> float:
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr("time.time", earlier)
    first, second = Made(StageResult(1, 1)), Made(StageResult(1, 1), title="two")
    run.execute(first)
    run.execute(second)
    run.supersede(filter(None, [run.last("one")]))
    assert not run.is_done(first)
    run.execute(first)
    assert run.is_done(first)
    assert run.is_done(second)
    assert all(e["seconds"] >= 0 for e in run.ledger() if e["event"] == "finish")


def test_a_full_disk_leaves_a_ledger_that_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.execute(Made(StageResult(1, 1)))

    def full(path: Any, mode: str) -> Any:
        return open("/dev/full" if path.name == "ledger.jsonl" else path, mode)

    with monkeypatch.context() as patch:
        patch.setattr("selfsteer.run.folder.open", full, raising=False)
        with pytest.raises(ArtifactError, match=r"disk is full.*ledger\.jsonl"):
            run.execute(Made(StageResult(1, 1), title="two"))
    run.execute(Made(StageResult(1, 1), title="two"))
    assert run.is_done(Made(StageResult(1, 1)))
    assert run.is_done(Made(StageResult(1, 1), title="two"))


def test_superseded_work_is_moved_and_not_deleted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for made in ("first", "second"):
        run.execute(Made(StageResult(1, 1)))
        (run / "one.jsonl").write_text(made)
        run.supersede(run.stale([]))
        assert not (run / "one.jsonl").exists()
        assert not run.is_done(Made(StageResult(1, 1)))
        assert run.stale([Made(StageResult(1, 1), setting=2)]) == []
    kept = sorted(p.read_text() for p in (run / "superseded").rglob("one.jsonl"))
    assert kept == ["first", "second"]


def test_refusal_names_the_stages_and_the_way_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    stages = [{"stage": n} for n in ("a", "b", "c", "d")]
    with pytest.raises(ConfigError, match=r"a, b, c ….*--redo"):
        refuse(run, stages)


# -- shards ---------------------------------------------------------------------------------------


class Worker:
    """Doubles numbers, drops multiples of three; remembers which shards it was asked for."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.stop_at = stop_at

    def __call__(self, store: Path, items: Sequence[int]) -> list[dict[str, int] | Dropped]:
        number = items[0] // 4
        if number == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(number)
        return [{"x": 2 * i} if i % 3 else Dropped(str(i), "three", {"x": i}) for i in items]


ITEMS = list(range(10))
DOUBLED = [{"x": x} for x in (2, 4, 8, 10, 14, 16)]


def snapshot(folder: Path) -> dict[str, bytes]:
    """A folder of shards and what was dropped of it."""
    beside = folder.with_name(f"{folder.name}.dropped.jsonl")
    return {p.name.removeprefix(folder.name): p.read_bytes() for p in (*folder.iterdir(), beside)}


def test_shards_hold_everything_in_order(tmp_path: Path) -> None:
    worker = Worker()
    result = run_shards(tmp_path, ITEMS, 4, worker)
    assert worker.asked == [0, 1, 2]
    assert list(read_shards(tmp_path)) == DOUBLED
    assert (result.n_in, result.n_out, result.dropped) == (10, 6, {"three": 4})
    lines = [len((tmp_path / f"shard-0000{i}.jsonl").read_text().splitlines()) for i in range(3)]
    assert lines == [2, 3, 1]
    dropped = list(read_dropped(tmp_path.with_name(f"{tmp_path.name}.dropped.jsonl")))
    assert dropped == [Dropped(str(i), "three", {"x": i}) for i in (0, 3, 6, 9)]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    run_shards(tmp_path / "a", ITEMS, 4, Worker())
    with pytest.raises(KeyboardInterrupt):
        run_shards(tmp_path / "b", ITEMS, 4, Worker(stop_at=2))
    worker, skipped = Worker(), list[int]()
    result = run_shards(tmp_path / "b", ITEMS, 4, worker, skipped.append)
    assert worker.asked == [2]
    assert skipped == [4, 4]
    assert (result.n_in, result.n_out, result.dropped) == (10, 6, {"three": 4})
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "shard-00001.jsonl").write_bytes(b'{"x": 8}\n{"x"'),
        lambda folder: (folder / "shard-00001.jsonl").write_bytes(b'{"x": 8}\n'),
        lambda folder: (folder / "shard-00001.jsonl").write_bytes(b""),
        lambda folder: (folder / "shard-00001.jsonl").unlink(),
        lambda folder: (folder / "shard-00001.done.json").unlink(),
        lambda folder: (folder / "shard-00001.done.json").write_bytes(b'{"n_in": 4, "n_'),
        lambda folder: (folder / "shard-00001.done.json").write_bytes(b"{}"),
        lambda folder: (folder / "shard-00001.done.json").write_bytes(b"[]"),
    ],
    ids=[
        "half a line",
        "line lost",
        "empty",
        "no shard",
        "no mark",
        "half a mark",
        "mark without counts",
        "mark of another kind",
    ],
)
def test_a_damaged_shard_is_done_again(tmp_path: Path, damage: Any) -> None:
    folder = tmp_path / "a"
    run_shards(folder, ITEMS, 4, Worker())
    whole = snapshot(folder)
    damage(folder)
    worker = Worker()
    result = run_shards(folder, ITEMS, 4, worker)
    assert worker.asked == [1]
    assert result.n_out == 6
    assert snapshot(folder) == whole


def test_shards_that_are_asked_for_at_once_have_the_same_borders(tmp_path: Path) -> None:
    """The shard in the middle is there already; the others come in one call."""
    folder, calls = tmp_path / "a", list[tuple[str, Sequence[int]]]()
    run_shards(folder, ITEMS, 4, Worker())
    whole = snapshot(folder)
    for number in (0, 2):
        (folder / f"shard-0000{number}.jsonl").unlink()

    def work(store: Path, items: Sequence[int]) -> list[dict[str, int] | Dropped]:
        calls.append((store.name, items))
        return Worker()(store, items)

    for _ in range(2):
        result = run_shards(folder, ITEMS, 4, work, at_once=True)
        assert calls == [("answers-all", [0, 1, 2, 3, 8, 9])]
        assert (result.n_in, result.n_out, result.dropped) == (10, 6, {"three": 4})
        assert snapshot(folder) == whole


def test_shards_that_are_asked_for_at_once_may_end_between_two_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No item is counted twice, and no answer is gone."""
    whole, folder = Counter[str](), tmp_path / "a"

    def work(tally: Counter[str], store: Path, items: Sequence[int]) -> Iterator[dict[str, int]]:
        store.parent.mkdir(exist_ok=True)
        store.with_suffix(".jsonl").touch()
        for item in items:
            tally["items"] += 1
            yield {"x": item}

    def full(path: Path, *args: Any) -> None:
        if path.name == "shard-00001.jsonl":
            raise KeyboardInterrupt
        write_atomic(path, *args)

    run_shards(tmp_path / "whole", ITEMS, 4, partial(work, whole), tally=whole)
    tally = Counter[str]()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomic", full)
        with pytest.raises(KeyboardInterrupt):
            run_shards(folder, ITEMS, 4, partial(work, tally), tally=tally, at_once=True)
    assert (folder / "shard-00000.done.json").exists()
    assert (folder / "answers-all.jsonl").exists()
    tally = Counter()
    run_shards(folder, ITEMS, 4, partial(work, tally), tally=tally, at_once=True)
    assert tally == whole == {"items": 10}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_a_shard_of_another_size_is_done_again(tmp_path: Path) -> None:
    run_shards(tmp_path, ITEMS[:6], 4, Worker())
    worker = Worker()
    run_shards(tmp_path, ITEMS, 4, worker)
    assert worker.asked == [1, 2]
    assert list(read_shards(tmp_path)) == DOUBLED


# -- drops -----------------------------------------------------------------------------------------

LOST = [Dropped("a", "empty"), Dropped("b", "empty", {"x": "é"}), Dropped("c", "too_long")]


def test_drops_are_counted_and_written_and_a_broken_stage_leaves_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for _ in range(2):  # a second try says what the first one said
        with run.drops("iteration-1/filter") as drops:
            for one in LOST:
                drops.add(one)
        assert drops.counts == {"empty": 2, "too_long": 1}
        assert list(read_dropped(run / "iteration-1/filter.dropped.jsonl")) == LOST

    def breaks() -> None:
        with run.drops("iteration-1/filter") as drops:
            drops.add(LOST[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks()
    assert list(tmp_path.rglob("*")) == [tmp_path / "iteration-1"]


def test_a_stage_without_drops_has_no_file_of_them(tmp_path: Path) -> None:
    """Neither its own, nor what one that was killed left there."""
    run = RunFolder(tmp_path)
    (run / ".one.dropped.jsonl.partial").write_text("of one that was killed")
    (run / "one.dropped.jsonl").write_text("of another try")
    with run.drops("one"):
        pass
    assert list(tmp_path.iterdir()) == []
    assert list(read_dropped(run / "one.dropped.jsonl")) == []


def test_a_digest_sees_a_change_anywhere_in_a_large_file(tmp_path: Path) -> None:
    """Merged adapters change weights in the middle of a file and leave both its ends alone."""
    a, b = tmp_path / "a", tmp_path / "b"
    data = bytearray(20 << 20)
    a.write_bytes(data)
    data[10 << 20] = 1
    b.write_bytes(data)
    assert digest_path(a) != digest_path(b)


def test_rewinding_a_log_drops_what_a_resumed_training_writes_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for stage_name, step in (("a", 1), ("b", 1), ("a", 2), ("a", 3)):
        run.append("log.jsonl", {"stage": stage_name, "step": step})
    run.rewind("log.jsonl", "a", 1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"stage": "a", "step": 1}, {"stage": "b", "step": 1}]
    run.rewind("none.jsonl", "a", 0)
