"""Damaged run folders: every command that reads one says which file it is, or does not need it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from selfsteer.report import server
from tests.e2e.support import Here, fails


def flipped(data: bytes) -> bytes:
    """One bit of the byte in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "null": lambda data: b"null",
    "not text": lambda data: b"\xff",
    "wrong types": lambda data: b'{"event": 1, "models": [], "preferences": {}}\n',
    "flipped": flipped,
    "cut": lambda data: data[: len(data) // 2],
}

#: Files of no stage: `run --dry-run` does not read them, or has other words for them.
OTHERS = {"metrics.jsonl", "progress.json", "resolved.json", "ledger.jsonl", "sources.json"}


@pytest.fixture
def run(smoke: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke, tmp_path / "run")


def stored(run: Path) -> list[Path]:
    """The files of stages, in a fixed order."""
    kinds = {".json", ".jsonl", ".safetensors"}
    found = [p for p in sorted(run.rglob("*")) if p.suffix in kinds and p.is_file()]
    return [p for p in found if p.relative_to(run).parts[0] not in ("scores", "judgements")]


def commands(run: Path, to: Path) -> list[tuple[str, ...]]:
    return [
        ("show", str(run)),
        ("show", str(run), "--json"),
        ("run", str(run), "--dry-run"),
        ("report", str(run), "--out", str(to / "r.html")),
        ("view", str(run), "--no-browser", "--port", "0"),
        ("compare", str(run)),
        ("export", str(run), "--to", str(to / "e")),
    ]


@pytest.mark.parametrize(
    ("name", "damage", "readers"),
    [
        ("evaluation.json", "empty", "show report run view compare"),
        ("iteration-1/quality.json", "null", "show report run view"),
        ("ledger.jsonl", "null", "show report run view compare export"),
        ("evaluation/exhibit.json", "not text", "show report run view"),
        ("evaluation.json", "wrong types", "show report run view compare"),
        ("ledger.jsonl", "flipped", "show report run view compare export"),
        ("resolved.json", "wrong types", "show report view compare export"),
        ("iteration-1/preferences/shard-00000.jsonl", "flipped", "report run view export"),
        ("evaluation/answers-base.jsonl", "cut", "run view compare"),
        ("metrics.jsonl", "cut", "report compare"),
    ],
)
def test_each_command_names_the_damaged_file_that_it_reads(
    run: Path, here: Here, tmp_path: Path, name: str, damage: str, readers: str
) -> None:
    path = run / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for command in commands(run, tmp_path):
        if command[0] in readers.split():
            with mock.patch.object(server, "serve"):
                fails(here(*command), 3, str(path), "from a copy")


def every_damage(run: Path, here: Here, damages: Callable[[int], list[str]]) -> None:
    """Damages a file at a time, and asks for the run's state and its summary."""
    found = 0
    for number, path in enumerate(stored(run)):
        name = path.relative_to(run).as_posix()
        whole = path.read_bytes()
        for damage in damages(number):
            path.write_bytes(DAMAGES[damage](whole))
            if path.read_bytes() == whole:
                continue
            shown, state = here("show", run), here("run", run, "--dry-run")
            assert "Traceback" not in shown.err + state.err, (name, damage)
            assert shown.code in (0, 3), (name, damage, shown.err)
            if name not in OTHERS and path.suffix != ".safetensors":
                fails(state, 3, str(path))
                found += 1
        path.write_bytes(whole)
    assert found > 20


def test_a_run_tells_the_damage_of_any_of_its_files(run: Path, here: Here) -> None:
    every_damage(run, here, lambda number: [list(DAMAGES)[number % len(DAMAGES)]])


@pytest.mark.slow
def test_a_run_tells_any_damage_of_any_of_its_files(run: Path, here: Here) -> None:
    every_damage(run, here, lambda number: list(DAMAGES))


def test_what_is_damaged_is_made_again_when_asked(run: Path, here: Here) -> None:
    """Of a stage in the middle, and of the last one; the rest stays."""
    paths = [run / "evaluation.json", run / "iteration-1" / "preferences" / "shard-00000.jsonl"]
    whole = [p.read_bytes() for p in paths]
    ledger = (run / "ledger.jsonl").read_bytes()
    for path in paths:
        path.write_bytes(flipped(path.read_bytes()))
    fails(here("run", run), 3, "damaged", "--redo")
    assert (run / "ledger.jsonl").read_bytes() == ledger
    ended = here("run", run, "--redo")
    assert ended.code == 0, ended.err
    assert [p.read_bytes() for p in paths] == whole
    made = re.findall(r"^\[./2\] (\S+)", ended.err, re.M)
    assert made == ["iteration-1/preferences", "evaluation"]
    assert len(list(run.glob("superseded/*/evaluation.json"))) == 1
