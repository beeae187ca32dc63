"""The benchmark of many records, on few: files go when they are read, and a stage can be ended."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
STAGES = ("queries", "principles, picked", "sampling, scripted engine", "preferences", "export trl")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))  # for data_speed
    spec = importlib.util.spec_from_file_location("million", FOLDER / "million.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(bench: Any, patch: pytest.MonkeyPatch, folder: Path, *given: str) -> list[dict[str, Any]]:
    paths = ("--work", str(folder / "work"), "--output", str(folder))
    patch.setattr(sys, "argv", ["million.py", "--sizes", "80", *paths, *given])
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "MILLION_ANSWER_WORDS"):
        patch.setenv(name, "1")  # main() sets them
    bench.main()
    rows: list[dict[str, Any]] = json.loads((folder / "million.json").read_text())["rows"]
    return rows


def test_files_go_when_no_stage_left_reads_them_and_it_goes_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfsteer.engines.load import Engines

    monkeypatch.setattr(Engines, "sampler", Engines.sampler)  # the scripted one goes again
    monkeypatch.setattr(bench, "apart", lambda *args: bench.measure(*args[:3]))
    given = ("--answer-words", "20", "--remove", "--only")
    ran(bench, monkeypatch, tmp_path, *given, *STAGES[:2])
    here = tmp_path / "work" / "80"
    assert [p.name for p in here.iterdir()] == ["principles.jsonl"]
    rows = ran(bench, monkeypatch, tmp_path, *given, *STAGES[2:])
    assert [(r["task"], r["out"], r["answer_words"]) for r in rows] == [(t, 80, 20) for t in STAGES]
    assert [p for p in here.iterdir() if "dropped" not in p.name] == [here / "export-trl"]
    (exported,) = (here / "export-trl").glob("*.jsonl")
    first = json.loads(exported.read_text().splitlines()[0])
    assert len(first["chosen"][0]["content"].split()) == 20
    assert "At 80 records an answer has 20 words" in (tmp_path / "million.md").read_text()


def test_a_stage_that_was_ended_is_on_the_page(bench: Any) -> None:
    whole = {"task": "queries", "records": 10, "date": "2026-12-01", "us_per_record": 90.0}
    whole |= {"added_mb": 1.0, "written_mb": 2.0}
    ended = {"task": "preferences", "records": 30, "date": "2026-12-01", "on_disk": 4}
    ended |= {"stopped_after": 60.0, "seconds": 99.0, "peak_mb": 70, "written_mb": 1.0}
    header = {"cores": 2, "cpu": "X", "seed": 0}
    header["versions"] = {"python": "3", "numpy": "2", "torch": "2"}
    page = bench.table([whole, ended], header)
    assert "| preferences |" not in page
    assert "at 30" not in page
    assert "30 records: stopped after 60 minutes (99 s of CPU time) in preferences, with 4" in page
