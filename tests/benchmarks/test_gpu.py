"""The GPU's script on a CPU: its checks can fail, and no part takes the others with it."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ("--device", "cpu", "--tiny")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    yield import_module("gpu")
    sys.path.remove(str(FOLDER))
    for name in ("gpu", "step_speed", "sampling_speed"):
        del sys.modules[name]


def part_of(bench: Any, folder: Path, seconds: float = 1000.0) -> Any:
    return bench.Part(bench.arguments(TINY), folder / "found.json", seconds)


def test_layouts_that_differ_fail_the_check(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_of(bench, tmp_path)
    bench.layouts_agree(part, "llama")
    plant = bench.tree.plant

    def one_further(sequences: Any) -> Any:
        row = plant(sequences)
        return row._replace(position_ids_1T=row.position_ids_1T + row.position_ids_1T // 8)

    monkeypatch.setattr(bench.tree, "plant", one_further)
    bench.layouts_agree(part, "llama")
    found = json.loads((tmp_path / "found.json").read_text())["checks"]
    wrong = [c["name"] for c in found[4:] if not c["ok"]]
    assert [c["ok"] for c in found[:4]] == [True] * 4
    assert wrong == ["tree = one by one, llama, float32", "tree = one by one, llama, bfloat16"]
    moved = found[0]["one_wrong_prompt_token_moves"]
    assert moved > 10 * bench.VALUE_TOLERANCE, "the tolerance would let a wrong token pass"


def test_a_case_that_breaks_or_does_not_fit_is_named(bench: Any, tmp_path: Path) -> None:
    part, ran = part_of(bench, tmp_path), list[str]()

    def breaks() -> None:
        raise ValueError("no such kernel")

    def slow() -> None:
        part.end -= 10_000  # as if it had taken the whole share

    part.each({"first": breaks, "second": slow, "third": lambda: ran.append("third")})
    assert not ran
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["errors"]["first"][-1] == "ValueError: no such kernel"
    assert found["skipped"]["third"].startswith("0 s were left of the part's share")


def test_a_part_that_dies_or_hangs_leaves_the_others(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = bench.nothing() | {"checks": [{"name": "sums", "ok": True, "gap": 0.25}]}
    scripts = {
        "card": "import os, signal; input(); os.kill(os.getpid(), signal.SIGSEGV)",
        "steps": "import time; input(); write(); time.sleep(60)",
        "sharding": "float(input()); write()",
    }

    def start(name: str, words: Sequence[str], folder: Path) -> Any:
        path = str(folder / f"{name}.json")
        ready = f"open({path!r}, 'w').write({json.dumps(bench.nothing())!r})"
        write = f"write = lambda: open({path!r}, 'w').write({json.dumps(fine)!r})"
        command = [sys.executable, "-S", "-c", f"{ready}\n{write}\n{scripts[name]}"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)

    monkeypatch.setattr(bench, "start", start)
    monkeypatch.setattr(bench, "GRACE_S", 0.1)
    output = tmp_path / "gpu.json"
    words = ["--minutes", "0.03", "--only", *scripts, "--output", str(output), *TINY]
    result = bench.run(bench.arguments(words), words)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    card, steps, sharding = result["parts"].values()
    assert card["errors"] == {"process": ["ended with exit code -11"]}
    assert "the part's share of the time" in steps["skipped"]["the rest"]
    assert steps["checks"] == sharding["checks"] == fine["checks"]
    assert not bench.good(result)
    page = output.with_suffix(".md").read_text()
    assert "| sums | passed | gap 0.25 |" in page
    assert "## Error in card: process" in page
    assert "- steps: the rest: ended after" in page
    del result["parts"]["card"]
    assert bench.good(result)
    sharding["checks"][0]["ok"] = False
    assert not bench.good(result)


@pytest.mark.slow
def test_all_of_it_in_small(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), *TINY, "--minutes", "5"]
    command += ["--output", str(output)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    parts = json.loads(output.read_text())["parts"]
    assert list(parts) == list(bench.PARTS)
    assert sum(len(p["checks"]) for p in parts.values()) == 22
    assert [list(p["skipped"]) for p in parts.values() if p["skipped"]] == [
        ["flex_attention, gradients"],
        [f"8B with LoRA, pbaa, {bench.steps.COMPACT}"],
    ]
    assert set(parts["steps"]["figures"]["1B, pbaa"]["rows"]) == {
        "released", bench.steps.COMPACT, "ours", "ours, reference pass counted in",
    }  # fmt: skip
    assert output.with_suffix(".md").read_text() in ended.stdout
