"""SIGTERM in the middle of a training, as a scheduler sends it: nothing is done twice."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.support import process, spawn

ARGS = (
    *("run", "pbaa", "name=kt", "seed=1"),
    "policy={model: 'package:selfsteer.testbed/checkpoint', threads: 1}",
    "queries={path: 'package:selfsteer.testbed/queries/align.jsonl', limit: 64}",
    "principles={mode: picked, batch_size: 64}",
    *("sampling.max_new_tokens=96", "sampling.batch_size=64", "sampling.shard_size=64"),
    "training={learning_rate: 1.0e-4, batch_size: 8, epochs: 4, save_every_steps: 1000}",
)


def steps(run: Path) -> list[int]:
    """What the training has logged."""
    log = run / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on_after_its_last_step(tmp_path: Path) -> None:
    run = tmp_path / "kt"
    with process(*ARGS, f"runs_dir={tmp_path}") as running:
        while len(steps(run)) < 5:
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        asked = time.monotonic()
        os.kill(running.pid, signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert running.returncode == 143
    last = err.strip().splitlines()[-1]
    done = steps(run)
    assert done == list(range(1, len(done) + 1))
    (kept,) = (run / "iteration-1" / "policy.partial").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{done[-1]}"
    go_on = shlex.split(last.partition("Go on with: ")[2])
    assert go_on == ["selfsteer", "run", str(run)]
    ended = spawn(*go_on[1:])
    assert ended.returncode == 0, ended.stderr
    assert f"resuming after step {done[-1]}" in ended.stderr
    assert steps(run) == list(range(1, steps(run)[-1] + 1))
