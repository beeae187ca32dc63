"""A run whose answers come from a server that fails in every way that servers fail."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fakes
from tests.e2e.support import Here, fails, finished, ledger, process
from tests.fakes import FAULTS, Handler, Server, completion, sends, serving, status

#: PBAA on 16 queries up to its preferences; nothing trained answers, so one server will do.
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
    "sampling.shard_size=4",
    "sampling.max_new_tokens=64",
)
KEY = "sk-never-to-be-seen"
PORT_HOLDS = "sampling.engine={{kind: openai, base_url: '{url}', model: canned, {more}}}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as found:
        yield found


def arguments(server: Server, folder: Path, name: str, **more: Any) -> tuple[Any, ...]:
    settings = {"backoff": 0.01, "timeout": 90, "concurrency": 4, "retries": 8, **more}
    text = ", ".join(f"{k}: {json.dumps(v)}" for k, v in settings.items())
    engine = PORT_HOLDS.format(url=server.url, more=text)
    return ("run", "smoke", f"runs_dir={folder}", f"name={name}", *PBAA, engine)


def ask(here: Here, server: Server, folder: Path, name: str, **more: Any) -> Any:
    return here(*arguments(server, folder, name, **more), "--until", "preferences")


def made(run: Path) -> dict[str, bytes]:
    """Everything that was sampled."""
    return {
        str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("iteration-1/**/*.jsonl"))
    }


@pytest.fixture
def undisturbed(server: Server, tmp_path: Path, here: Here) -> dict[str, bytes]:
    """The samples and preferences of the same recipe and server without a fault."""
    ended = ask(here, server, tmp_path, "calm")
    assert ended.code == 0, ended.err
    found = made(tmp_path / "calm")
    assert sum(t.count(b"\n") for n, t in found.items() if "preferences" in n) == 16
    entry = finished(tmp_path / "calm")["iteration-1/samples"]
    (counts,) = entry["notes"]["asked"].values()
    assert counts["requests"] == len(server.asked) == 32 + 8, "two answers a query, and the probe"
    assert "32 requests" not in ended.err
    assert f"{counts['prompt_tokens']:,} tokens in" in ended.err
    server.asked.clear()
    return found


def test_what_a_server_answers_otherwise_is_not_mixed_with_what_was_made_before(
    server: Server, tmp_path: Path, here: Here, undisturbed: dict[str, bytes]
) -> None:
    """Samples that are deleted are asked for again; the pairs of the old ones are not kept."""
    run = tmp_path / "calm"
    shutil.rmtree(run / "iteration-1" / "samples")
    server.answer = lambda body: f"Again, {fakes.say(body)}"
    fails(ask(here, server, tmp_path, "calm"), 2, "work of iteration-1/preferences", "--redo")
    fails(ask(here, server, tmp_path, "calm"), 2, "came out differently")
    ended = here(*arguments(server, tmp_path, "calm"), "--until", "preferences", "--redo")
    assert ended.code == 0, ended.err
    now = made(run)
    assert now.keys() == undisturbed.keys()
    for name in (n for n in now if "preferences" in n):
        chosen = [json.loads(line)["chosen"][0]["content"] for line in now[name].splitlines()]
        assert all(text.startswith("Again, ") for text in chosen)
    assert len(list(run.glob("superseded/*/iteration-1/preferences"))) == 1


def test_a_run_survives_every_fault_that_passes(
    server: Server, tmp_path: Path, here: Here, undisturbed: dict[str, bytes]
) -> None:
    """One fault of each kind in one run, two in a row of the first: the same preferences."""
    faults = list(FAULTS.values())
    server.faults = {10 + 2 * i: f for i, f in enumerate(faults)}
    server.faults[11] = faults[0]
    ended = ask(here, server, tmp_path, "rough", timeout=3)
    assert ended.code == 0, ended.err
    assert made(tmp_path / "rough") == undisturbed
    (counts,) = finished(tmp_path / "rough")["iteration-1/samples"]["notes"]["asked"].values()
    assert counts["retried"] >= len(faults) + 1, "a busy machine may be late with others too"
    assert counts["failed"] == {}


def test_what_fails_for_good_and_what_is_cut_off_is_counted(
    server: Server, tmp_path: Path, here: Here, undisturbed: dict[str, bytes]
) -> None:
    server.always = lambda h: bird(h) or cut(h)
    ended = ask(here, server, tmp_path, "lossy", retries=1)
    assert ended.code == 0, ended.err
    dropped = finished(tmp_path / "lossy")["iteration-1/samples"]["dropped"]
    (counts,) = finished(tmp_path / "lossy")["iteration-1/samples"]["notes"]["asked"].values()
    assert dropped["request_failed:malformed_json"] > 0
    assert dropped["unfinished"] > 0
    assert (
        counts["failed"]["request_failed:malformed_json"]
        >= dropped["request_failed:malformed_json"]
    )
    kept = lines(made(tmp_path / "lossy"))
    assert kept < lines(undisturbed), "what is there is as in the undisturbed run"
    assert len(kept) == 16 - sum(dropped.values())


def bird(h: Handler) -> bool:
    """One prompt in four fails, whenever it is asked."""
    return seeded(h) % 8 == 0 and FAULTS["malformed_json"](h)


def cut(h: Handler) -> bool:
    return seeded(h) % 8 == 1 and sends(completion("Bees d", reason="length"))(h)


def seeded(h: Handler) -> int:
    """The request's seed; the probe's count as none that fails."""
    return int(h.body["seed"]) if h.body["max_tokens"] == 64 else 5


def lines(found: dict[str, bytes]) -> set[bytes]:
    return {x for n, t in found.items() if "preferences" in n for x in t.splitlines()}


def test_a_server_that_dies_leaves_the_shards_so_far(
    server: Server, tmp_path: Path, here: Here, undisturbed: dict[str, bytes]
) -> None:
    server.always = lambda h: len(h.server.asked) > 20 and status(503, f"gone, {KEY}")(h)
    ended = ask(here, server, tmp_path, "dies", retries=1)
    fails(ended, 3, "no usable answer to several requests", "http_503", "Finished answers")
    assert KEY not in ended.err
    shards = sorted(p.name for p in (tmp_path / "dies/iteration-1/samples").glob("shard-*.jsonl"))
    assert shards == ["shard-00000.jsonl"]
    server.always = None
    asked = len(server.asked)
    assert ask(here, server, tmp_path, "dies").code == 0
    assert made(tmp_path / "dies") == undisturbed
    assert len(server.asked) - asked == 3 * 8 - 4 + 8, "what was not answered, and the probe"


def test_limits_stop_the_stage_and_a_higher_one_goes_on(
    server: Server, tmp_path: Path, here: Here, undisturbed: dict[str, bytes]
) -> None:
    ended = ask(here, server, tmp_path, "poor", max_requests=30)
    fails(ended, 3, "max_requests 30", "30 requests", "raise the limit")
    assert len(server.asked) == 30
    fails(ask(here, server, tmp_path, "poor", max_requests=30), 3, "max_requests 30")
    assert len(server.asked) == 30, "the limit is the run's, not the command's"
    assert ask(here, server, tmp_path, "poor", max_requests=80).code == 0
    assert made(tmp_path / "poor") == undisturbed


@pytest.mark.slow
def test_kill_minus_nine_inside_a_shard(
    server: Server, tmp_path: Path, undisturbed: dict[str, bytes], here: Here
) -> None:
    """And while it works, a second command on the folder is refused."""
    args = (*arguments(server, tmp_path, "killed"), "--until", "preferences")
    stop = False

    def waits(h: Handler) -> bool:
        while len(h.server.asked) > 8 + 8 + 3 and not stop:
            time.sleep(0.02)
        return False

    server.always = waits
    with process(*args) as running:
        deadline = time.monotonic() + 240
        while len(server.asked) < 8 + 8 + 4:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second = ask(here, server, tmp_path, "killed")
        fails(second, 3, "is in use by process")
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    stop, server.always = True, None
    shards = sorted(p.name for p in (tmp_path / "killed/iteration-1/samples").glob("shard-*.jsonl"))
    assert shards == ["shard-00000.jsonl"]
    asked = len(server.asked)
    assert ask(here, server, tmp_path, "killed").code == 0
    assert made(tmp_path / "killed") == undisturbed
    assert 3 * 8 - 3 <= len(server.asked) - asked - 8 <= 3 * 8


def test_the_key_is_nowhere(server: Server, tmp_path: Path, here: Here) -> None:
    ended = ask(here, server, tmp_path, "secret")
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in ended.err + ended.out
    files = [p for p in (tmp_path / "secret").rglob("*") if p.is_file()]
    assert len(files) > 10
    assert [p for p in files if KEY.encode() in p.read_bytes()] == []


def test_a_server_that_ignores_the_temperature_ends_the_run_and_fails_the_check(
    server: Server, tmp_path: Path, here: Here
) -> None:
    server.answer = lambda body: "Always the same."
    ended = ask(here, server, tmp_path, "greedy")
    fails(ended, 3, "ignores temperature", "do_sample")
    run, recipe, *rest = arguments(server, tmp_path, "looked-at")
    check = here("check", recipe, *rest, "--queries", 4, "--json")
    assert check.code == 3, check.err
    engine = json.loads(check.out)["checks"]["engine"]
    assert engine["status"] == "FAILED"
    assert "ignores temperature" in engine["found"]
    assert run == "run"
    assert not (tmp_path / "looked-at").exists()


def test_a_server_that_is_not_there_is_told_before_any_work(
    server: Server, tmp_path: Path, here: Here
) -> None:
    server.shutdown()
    server.server_close()
    fails(ask(here, server, tmp_path, "none"), 3, "Nothing answers at")
    assert not [e for e in ledger_or_none(tmp_path / "none") if e["event"] == "begin"]


def ledger_or_none(run: Path) -> list[dict[str, Any]]:
    return ledger(run) if (run / "ledger.jsonl").exists() else []


def test_the_whole_method_through_servers_that_it_launches(tmp_path: Path, here: Here) -> None:
    """Writer, policy, generator and trained policies, each served in its turn and gone after."""
    launch = f"{sys.executable} {fakes.__file__} {{model}} {{port}}"
    engine = f"{{kind: openai, launch: '{launch}'}}"
    args = (
        *("run", "smoke", f"runs_dir={tmp_path}", "name=served", "judge=null"),
        *("queries.limit=8", "evaluation.queries.limit=4", "sampling.batch_size=null"),
        *("principles.batch_size=null", f"sampling.engine={engine}"),
    )
    ended = here(*args)
    assert ended.code == 0, ended.err
    asked = {n: e["notes"].get("asked") for n, e in finished(tmp_path / "served").items()}
    assert asked["iteration-1/principles"]
    assert asked["iteration-1/triples"]
    assert asked["iteration-1/samples"]
    assert set(asked["evaluation"]) == {"base", "sso/iteration-1", "pbaa/iteration-1"}
    usage = [json.loads(p.read_bytes()) for p in (tmp_path / "served/usage").iterdir()]
    assert len(usage) == 1
    assert usage[0]["failed"] == {}
    assert not (tmp_path / "served/logs").exists()


def have(*modules: str) -> bool:
    return all(importlib.util.find_spec(m) for m in modules)


@pytest.mark.slow
@pytest.mark.skipif(
    not have("fastapi", "uvicorn"), reason="transformers serve needs fastapi and uvicorn"
)
def test_transformers_serve_answers_like_the_engine_in_process(tmp_path: Path, here: Here) -> None:
    """The tiny model over HTTP, greedily: the very texts of the engine in process."""
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    serve = f"{program} serve {{model}} --dtype float32 --host 127.0.0.1 --port {{port}}"
    engine = f"{{kind: openai, launch: '{serve}'}}"
    common = ("run", "smoke", f"runs_dir={tmp_path}", *PBAA, "queries.limit=4")
    greedy = ("sampling.temperature=0", "sampling.top_p=1", "policy.dtype=float32")
    for name, more in (("http", [f"sampling.engine={engine}"]), ("here", [])):
        ended = here(*common, *greedy, *more, f"name={name}", "--until", "samples")
        assert ended.code == 0, ended.err
    assert made(tmp_path / "http") == made(tmp_path / "here")
