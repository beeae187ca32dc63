"""A run on a Ray cluster of this machine: the same preferences as in process, whatever dies."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.e2e.support import Here, environment, fails, finished, process, spawn, until

pytest.importorskip("ray", reason="the engine ray needs ray: pip install 'selfsteer[ray]'")

#: PBAA on 16 queries up to its preferences: 8 shards of two answers each to deal out.
PBAA = (
    "method=pbaa",
    "baseline=null",
    "generator=null",
    "evaluation=null",
    "judge=null",
    "queries.limit=32",
    "principles.mode=picked",
    "principles.features=random",
    "principles.max_new_tokens=null",
    "principles.batch_size=null",
    "sampling.shard_size=2",
    "policy.threads=1",
)
#: Two replicas also where there is one core.
TWO = "sampling.engine={kind: ray, replicas: 2, resources: {num_cpus: 0.5}}"


def arguments(folder: Path, name: str, *more: str) -> tuple[str, ...]:
    return ("run", "smoke", f"runs_dir={folder}", f"name={name}", *PBAA, *more)


def made(run: Path) -> dict[str, bytes]:
    """Everything that was sampled, and the marks with its counts."""
    found = sorted((run / "iteration-1").rglob("*.json*"))
    return {str(p.relative_to(run)): p.read_bytes() for p in found}


def replicas_of(pid: int) -> list[int]:
    """Process ids of the actors below a process, the oldest first."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    parents = {int(child): int(parent) for child, parent, _ in rows}

    def below(child: int) -> bool:
        while child not in (0, pid):
            child = parents.get(child, 0)
        return child == pid

    return sorted(int(r[0]) for r in rows if "Replica" in r[2] and below(int(r[0])))


@pytest.mark.slow
def test_replicas_answer_as_one_process_does_and_a_killed_one_costs_nothing(tmp_path: Path) -> None:
    plain = spawn(*arguments(tmp_path, "plain"), "--until", "preferences")
    assert plain.returncode == 0, plain.stderr
    run = tmp_path / "ray"
    with process(*arguments(tmp_path, "ray", TWO), "--until", "preferences") as running:
        killed = None
        while running.poll() is None:
            if killed is None and list(run.glob("iteration-1/samples/*.done.json")):
                killed = next(iter(replicas_of(running.pid)), None)
                if killed is not None:
                    os.kill(killed, signal.SIGKILL)
            time.sleep(0.05)
        _, said = running.communicate()
    assert running.returncode == 0, said
    assert killed is not None
    assert made(run) == made(tmp_path / "plain")
    entry = finished(run)["iteration-1/samples"]
    assert (entry["n_in"], entry["n_out"]) == (32, 32 - sum(entry["dropped"].values()))
    assert "ray: 1 node" in said
    for noise in ("Traceback", "Warning", "INFO", "ray::"):
        assert noise not in said
    assert not (run / "session_latest").exists()


@contextmanager
def node(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A node of a cluster that the command line starts; all of it ends with its first process."""
    start = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    running = subprocess.Popen(
        [*start, "--object-store-memory=80000000", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert running.stdout is not None
        said = ""
        while "Ray runtime started" not in said:
            line = running.stdout.readline()
            assert line, said
            said += line
        yield running
    finally:
        running.kill()
        running.communicate()


def answered(run: Path) -> int:
    """How many answers of a stage under way are stored."""
    return sum(p.read_text().count('"sum"') for p in run.glob("iteration-1/samples/answers-*"))


@pytest.mark.slow
def test_a_killed_node_and_a_killed_driver_cost_what_was_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster of two nodes, with room for one replica each, that goes on with the first one."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = ("queries.limit=64", "sampling.shard_size=16", "sampling.batch_size=2")
    plain = spawn(*arguments(tmp_path, "plain", *small), "--until", "preferences")
    assert plain.returncode == 0, plain.stderr
    engine = f"sampling.engine={{kind: ray, replicas: 2, address: '127.0.0.1:{port}'}}"
    command = (*arguments(tmp_path, "ray", *small, engine), "--until", "preferences")
    run = tmp_path / "ray"

    def shards() -> dict[str, int]:
        """When each finished shard was written."""
        done = run.glob("iteration-1/samples/shard-*.jsonl")
        return {p.name: p.stat().st_mtime_ns for p in done if p.with_suffix(".done.json").exists()}

    with ExitStack() as stack:
        # the names of its sockets are limited to 107 characters
        short = stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}")
        first = stack.enter_context(node(*head))
        second = stack.enter_context(node(f"--address=127.0.0.1:{port}"))
        with process(*command) as running:
            until(lambda: bool(replicas_of(second.pid)) and answered(run) > 0, running)
            second.kill()
            had = len(shards())
            until(lambda: len(shards()) > had, running)
            running.kill()
            _, said = running.communicate()
        before = shards()
        assert 0 < len(before) < 4, said
        assert said.count("a replica on the Ray cluster was lost") == 1
        ended = spawn(*command, engine.replace("replicas: 2", "replicas: 1"))
        assert ended.returncode == 0, ended.stderr
        assert first.poll() is None
    assert {name: shards()[name] for name in before} == before
    assert made(run) == made(tmp_path / "plain")


def test_a_recipe_asks_for_more_replicas_than_there_is_room_for(tmp_path: Path, here: Here) -> None:
    many = "sampling.engine={kind: ray, replicas: 9000}"
    ended = here(*arguments(tmp_path, "many", many), "--until", "preferences")
    fails(ended, 2, "room for", "9000 are asked for", "Lower replicas or resources")
    assert not list(tmp_path.rglob("shard-*"))
