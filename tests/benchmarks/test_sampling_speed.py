"""The comparison of engines on the tiny model: every contestant answers, the page shows each."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sampling_speed.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("sampling_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_engines_answer_the_same_prompts(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def in_process(name: str, args: Any, plan: Path) -> Iterator[Any]:
        ask = bench.builder(name)(json.loads(plan.read_text()))
        yield lambda workload: bench.timed(ask, workload)

    monkeypatch.setattr(sys, "argv", ["sampling_speed.py", "--tiny", "--out", str(tmp_path)])
    monkeypatch.setattr(bench, "contestant", in_process)  # a process each takes seconds to start
    monkeypatch.setattr(bench, "floor", lambda *args: 123.0)  # it sets this process's threads
    bench.main()
    found = json.loads((tmp_path / "sampling_engines.json").read_text())
    assert list(found["workloads"]) == ["prompts", "features"]
    assert found["prompt_tokens"]["features"] > 3 * found["prompt_tokens"]["prompts"]
    for rows in found["workloads"].values():
        assert list(rows) == [bench.OURS, bench.GENERATE, bench.CONTINUOUS]
        assert rows[bench.OURS]["ours_faster_seconds"] == 1.0
        # six prompts, eight new tokens at most
        assert all(6 <= row["runs"][0]["tokens"] <= 48 for row in rows.values())
    page = (tmp_path / "sampling_engines.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("| transformers generate |") == 2


def test_a_contestant_answers_from_its_own_process(bench: Any, tmp_path: Path) -> None:
    args = bench.arguments(["--tiny", "--threads", "1"])
    (tmp_path / "plan.json").write_text(json.dumps(bench.planned(args)))
    with bench.contestant(bench.OURS, args, tmp_path / "plan.json") as ask:
        assert 6 <= ask("prompts")["tokens"] <= 48
        assert ask("warm up")["tokens"] <= 16


def test_ratios_are_medians_of_those_within_a_repeat(bench: Any) -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"tokens": 100, "seconds": s, "cpu_seconds": 2 * s} for s in seconds]

    row = bench.rates(runs(10.0, 30.0, 20.0), runs(5.0, 10.0, 5.0))
    assert row["tokens_per_second"] == 5.0  # 100/20; ratios 2, 3 and 4
    assert row["tokens_per_cpu_second"] == 2.5
    assert row["ours_faster_seconds"] == pytest.approx(3.0)
    assert row["spread_seconds"] == [pytest.approx(100 / 30), 10.0]
