"""Sizes and digests of a stage's files: what they tell, and when they are looked at."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import write_atomic
from selfsteer.errors import ArtifactError
from selfsteer.run import folder
from selfsteer.run.folder import RunFolder, StageResult, read_ledger, sealed
from selfsteer.run.stage import Artifact, Stage, Where
from selfsteer.run.sums import REMOVED, fault_of, sums_of


@dataclass(frozen=True)
class Shards(Stage):
    """Two shards, a mark, and what it dropped."""

    title = "shards"

    def run(self, run: RunFolder) -> StageResult:
        for name in ("shard-00000.jsonl", "shard-00001.jsonl", "shard-00000.done.json"):
            write_atomic(run / self.name / name, f'{{"of": "{name}"}}\n')
        write_atomic(run / f"{self.name}.dropped.jsonl", "{}\n")
        return StageResult(2, 2)


@dataclass(frozen=True)
class Pair(Stage):
    """A file and a folder."""

    title = "pair"
    makes = ("{folder}/pair.json", "{folder}/pair")

    def run(self, run: RunFolder) -> StageResult:
        write_atomic(run / "pair.json", "{}\n")
        write_atomic(run / "pair" / "a.jsonl", '{"a": 1}\n')
        return StageResult(1, 1)


@dataclass(frozen=True)
class Reader(Stage):
    """Reads one artifact by itself and others by name."""

    one: Artifact
    others: dict[str, Artifact]
    title = "reader"

    def run(self, run: RunFolder) -> StageResult:
        return StageResult(1, 1)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "run")
    found.path.mkdir()
    found.execute(Shards())
    return found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda f: flip(f / "shard-00001.jsonl"), "shard-00001.jsonl is damaged: its content"),
    "cut": (lambda f: (f / "shard-00001.jsonl").write_text("{"), "has 1 bytes, not 28"),
    "gone": (lambda f: (f / "shard-00000.done.json").unlink(), "00000.done.json is missing"),
    "more": (lambda f: shutil.copy(f / "shard-00000.jsonl", f / "shard-2.jsonl"), "one too many"),
    "drops": (lambda f: f.with_name("shards.dropped.jsonl").unlink(), "dropped.jsonl is missing"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_file_that_is_not_as_it_was_is_named(run: RunFolder, kind: str) -> None:
    damage, said = FAULTS[kind]
    run.check(Shards())
    damage(run / "shards")
    with pytest.raises(ArtifactError, match=f"{said}.*Stage shards.*--redo"):
        run.check(Shards())
    ((entry, fault),) = run.damaged([Shards()])
    assert entry["event"] == "finish"
    assert said in str(fault)


def test_what_is_gone_as_a_whole_is_made_again(run: RunFolder) -> None:
    shutil.rmtree(run / "shards")
    run.check(Shards())
    assert not run.is_done(Shards())


def test_what_is_left_of_a_stage_is_compared_before_it_is_used_again(tmp_path: Path) -> None:
    run, stage = RunFolder(tmp_path), Pair(where=Where(folder="."))
    run.execute(stage)
    (run / "pair.json").unlink()
    run.check(stage)
    assert not run.is_done(stage)
    flip(run / "pair" / "a.jsonl")
    ((_, fault),) = run.damaged([stage])
    assert "a.jsonl is damaged" in str(fault)
    shutil.rmtree(run / "pair")
    assert run.damaged([stage]) == []


def test_the_ledger_is_read_again_only_where_it_has_changed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> Iterator[dict[str, Any]]:
        read.append(path)
        return read_ledger(path)

    monkeypatch.setattr(folder, "read_ledger", counted)
    again = RunFolder(run.path)
    for _ in range(3):
        assert again.is_done(Shards())
        assert not again.damaged([Shards()])
        assert not again.stale([Shards()])
    assert len(read) == 1
    run.supersede([{"stage": "shards", "fingerprint": Shards().fingerprint, "outputs": []}])
    assert not again.is_done(Shards())
    assert len(read) == 2


def test_a_copy_is_the_same(run: RunFolder, tmp_path: Path) -> None:
    moved = RunFolder(shutil.copytree(run.path, tmp_path / "moved"))
    assert moved.is_done(Shards())
    moved.check(Shards())
    flip(moved / "shards" / "shard-00000.jsonl")
    run.check(Shards())
    with pytest.raises(ArtifactError, match="moved"):
        moved.check(Shards())


def test_weights_that_were_removed_on_purpose_are_not_missed(tmp_path: Path) -> None:
    weights = tmp_path / "m" / "model.safetensors"
    write_atomic(weights, b"12345678")
    sums = sums_of(tmp_path, ["m"])
    weights.unlink()
    assert fault_of(tmp_path, sums) == f"{weights} is missing"
    (weights.parent / REMOVED).touch()
    assert fault_of(tmp_path, sums) is None


def test_large_files_can_be_left_to_their_sizes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"12345678")
    sums, sizes = sums_of(tmp_path, ["."]), sums_of(tmp_path, ["."], most=4)
    path.write_bytes(b"12345679")
    assert fault_of(tmp_path, sums, most=4) is None
    assert fault_of(tmp_path, sizes) is None
    assert fault_of(tmp_path, sums, most=8) == f"{path} is damaged: its content has changed"
    path.write_bytes(b"1")
    assert fault_of(tmp_path, sizes) == f"{path} is damaged: it has 1 bytes, not 8"


def test_weights_and_large_files_need_not_be_there_until_they_are_read(tmp_path: Path) -> None:
    for name, size in (("w.safetensors", 2), ("large.bin", 8), ("small.bin", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    sums = sums_of(tmp_path, ["."])
    for name in ("w.safetensors", "large.bin"):
        (tmp_path / name).unlink()
        assert fault_of(tmp_path, sums, most=4) is None
        assert fault_of(tmp_path, {name: sums[name]}) == f"{tmp_path / name} is missing"
    (tmp_path / "small.bin").unlink()
    assert fault_of(tmp_path, sums, most=4) == f"{tmp_path / 'small.bin'} is missing"


def test_a_stage_knows_the_makers_of_all_that_it_reads() -> None:
    maker = Shards()
    made, given = Artifact(Path("shards"), maker), Artifact(Path("given"))
    assert Reader(given, {"a": made, "b": given}).makers == [maker]
    assert Reader(made, {}).makers == [maker]


# -- the ledger -----------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_the_ledger_is_told_or_costs_no_more_than_a_line(
    run: RunFolder,
) -> None:
    """Where it breaks the line's JSON or its seal, it looks like a line that a kill cut short."""
    path, before = run / "ledger.jsonl", run.ledger()
    data, known = path.read_bytes(), {k for entry in before for k in entry}
    told = 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            found = run.ledger()
        except ArtifactError as e:
            told += "ledger.jsonl is damaged in line" in str(e)
        else:  # what is left of a seal is no key of an entry
            assert all({k: e[k] for k in e if k in known} in before for e in found), place
    assert told > len(data) / 3 * 0.9


def test_a_ledger_that_lost_a_stage_is_told(run: RunFolder) -> None:
    (run / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(
        ArtifactError, match=r"does not know stage shards, which made shards.*move that"
    ):
        run.damaged([Shards()])
    shutil.rmtree(run / "shards")
    assert run.damaged([Shards()]) == []


@pytest.mark.parametrize("line", ["null", "[]", "7", '{"event": 1}', "\udcff", "x", "}"])
def test_a_line_that_no_kill_leaves_is_told(run: RunFolder, line: str) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ArtifactError, match=r"damaged in line 3.*from a copy"):
        run.ledger()


def test_any_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    entry = {"event": "finish", "stage": "é", "fingerprint": "f", "notes": {"a": {"b": 1}}}
    line = sealed(json.dumps(entry, ensure_ascii=False)).encode()
    for cut in range(len(line)):
        path.write_bytes(line + b"\n" + line[:cut] + b"\n" + line + b"\n")
        assert list(read_ledger(path)) == [entry, entry]
