"""Two gloo ranks on a CPU: the same as one, sharded or not; deaths, refusals, resumption."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from selfsteer.recipe.sections import resolve_path
from selfsteer.run.ranks import environment_of
from selfsteer.stages import fit
from tests.e2e.patched import hold_out_four
from tests.e2e.support import TESTBED, Ended, Here, environment, fails, ledger, process, until

PATCHED = Path(__file__).with_name("patched.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

#: Losses of two ranks and one differ by the order in which gradients are added.
LARGEST, MEAN = 2e-5, 1e-5


#: A checkpoint after every step, and none is removed: time to see the first one. None of it
#: changes a result.
CLOSELY = ("generator.save_every_steps=1", "training.save_every_steps=1", "keep.checkpoints=9")


def launched(*args: object, **more: str) -> Ended:
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def again(run: Path, folder: Path, *stages: str) -> Path:
    """A copy of a finished run in which these trainings are to be done again.

    Ranks round otherwise than one process, so what was made from the old weights has to go, too:
    ``--redo``.
    """
    copy = shutil.copytree(run, folder)
    for stage in stages:
        shutil.rmtree(copy / stage)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(m) + "\n" for m in lines if m["stage"] not in stages]
    (copy / "metrics.jsonl").write_text("".join(kept))
    return copy


def losses(run: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [m["loss"] for m in lines if m["stage"] == stage and "loss" in m]


def assert_same_training(one: Path, two: Path, stage: str) -> None:
    """Loss by loss, and in the weights compared with how far the training moved them."""
    a, b = losses(one, stage), losses(two, stage)
    assert len(a) == len(b) > 2
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    found = f"{stage}: max {max(apart):.2g}, mean {sum(apart) / len(apart):.2g} nats apart"
    assert max(apart) < LARGEST, found
    assert sum(apart) / len(apart) < MEAN, found
    mine, theirs = (load_file(run / stage / "model.safetensors") for run in (one, two))
    base = AutoModelForCausalLM.from_pretrained(resolve_path(TESTBED), dtype=torch.float32)
    start = base.state_dict()
    assert mine.keys() == theirs.keys()
    moved = max(float((mine[n] - start[n]).abs().max()) for n in mine)
    largest = max(float((mine[n] - theirs[n]).abs().max()) for n in mine)
    mean = max(float((mine[n] - theirs[n]).abs().mean()) for n in mine)
    assert moved > 1e-4
    # Adam moves a weight whose gradient is all rounding as far as any other: on CPUs with AVX-512
    # one was 6.5 % apart
    assert largest < 0.1 * moved, f"{stage}: weights {largest:.2g} apart, moved {moved:.2g}"
    assert mean < 1e-3 * moved, f"{stage}: weights {mean:.2g} apart on average"


def test_two_ranks_train_like_one_and_one_goes_on_after_they_were_stopped(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    """A checkpoint of two ranks is right for one: a step's queries do not depend on the ranks."""
    stage = "iteration-1/policy"
    run = again(smoke, tmp_path / "two", stage)
    with process("run", run, "tracking=[tensorboard]", "--nproc", "2", *CLOSELY) as running:
        until((run / f"{stage}.partial/checkpoint-1/complete").exists, running)
        workers = ranks_of(running.pid)
        running.terminate()
        _, err = running.communicate(timeout=300)
        assert not psutil.wait_procs(workers, timeout=120)[1]
    fails(Ended(running.returncode, "", err), 143, f"Go on with: selfsteer run {run} --nproc 2")
    assert err.count(f"[1/1] {stage}") == 1  # one rank speaks
    assert len(list(run.glob("tracking/events.out.*"))) == 1
    ended = here("run", run, "--redo")
    assert ended.code == 0, ended.err
    assert "resuming after step" in ended.err
    assert_same_training(smoke, run, stage)


def test_ranks_that_had_not_begun_end_without_a_word(tmp_path: Path) -> None:
    def importing(rank: psutil.Process) -> bool:
        with suppress(OSError):
            return "pydantic_core" in Path(f"/proc/{rank.pid}/maps").read_text()
        return False

    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=r", "--nproc", "2")
    with process(*args) as running:
        until(lambda: sum(map(importing, ranks_of(running.pid))) == 2, running)
        workers = ranks_of(running.pid)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=300)
        assert not psutil.wait_procs(workers, timeout=120)[1]
    assert running.returncode == 130
    said = "selfsteer: interrupted; finished work is kept, and the same command resumes"
    assert err.splitlines() == [said]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "profile"), [(1, "ddp"), (2, "fsdp2")])
def test_two_launchers_that_meet_train_like_one_process(
    ranks: int, profile: str, smoke: Path, tmp_path: Path
) -> None:
    """As two nodes with one file system: each has a launcher, and the launchers meet at a port."""
    stage = "iteration-1/policy"
    run = again(smoke, tmp_path / "two", stage)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", ranks]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--rdzv-id", "test"]
    sharded = environment_of(profile, 2 * ranks)
    nodes = [
        subprocess.Popen(
            [
                *map(str, (sys.executable, *words, "--node-rank", k, "-m", "selfsteer")),
                *map(str, ("run", run, "--redo")),
            ],
            env=environment(**sharded),
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    errors = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    # the first rank speaks, on whichever node it is
    assert "".join(errors).count(f"[1/1] {stage}") == 1
    assert_same_training(smoke, run, stage)


@pytest.mark.slow
def test_sharded_ranks_select_like_one_and_go_on_after_a_death(
    smoke: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by torchrun, sharded as accelerate's own launcher would have it."""
    stage = "iteration-1/generator"
    one, two = (again(smoke, tmp_path / name, stage) for name in ("one", "two"))
    monkeypatch.setattr(fit, "hold_out", hold_out_four)
    alone = here("run", one, "--until", "generator", "--redo")
    assert alone.code == 0, alone.err
    words = [*TORCHRUN, PATCHED, "run", two, "--until", "generator", "--redo", "--json"]
    sharded = environment_of("fsdp2", 2)
    died = launched(*words, *CLOSELY, **sharded, DIES_AFTER="2")
    assert died.code != 0
    partial = two / f"{stage}.partial"
    parts = {p.name for p in (partial / "checkpoint-1/pytorch_model_fsdp_0").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp"} <= parts
    # parts are not taken for whole weights
    fails(here("run", two), 2, "sharding fsdp", "profile")
    ended = launched(*words, **sharded, NEVER_WHOLE="1")
    assert ended.code == 0, ended.err
    assert "resuming after step" in ended.err
    assert isinstance(json.loads(ended.out), dict)  # one rank prints, and one writes the ledger
    events = [e["event"] for e in ledger(two) if e["stage"] == stage]
    assert events == ["begin", "finish", "begin", "begin", "begin", "finish"]
    found, expected = (
        json.loads((run / f"{stage}.selection.json").read_text()) for run in (two, one)
    )
    assert found["chosen"] == expected["chosen"]
    assert [c["step"] for c in found["candidates"]] == [0, 1, 2, 3]
    for a, b in zip(found["candidates"], expected["candidates"], strict=True):
        assert a["wins"] == b["wins"]
        for context in ("good", "bad"):
            assert a["drift"][context] == pytest.approx(b["drift"][context], abs=1e-4)
    assert_same_training(one, two, stage)
    assert AutoModelForCausalLM.from_pretrained(two / stage).num_parameters() > 1e5
    assert not list(two.rglob("*.partial"))


@pytest.mark.slow
def test_ranks_end_with_one_of_them_and_with_their_launcher(tmp_path: Path) -> None:
    for whose in ("rank", "launcher"):
        args = ("run", "smoke", f"runs_dir={tmp_path}", f"name={whose}", "--nproc", "2")
        with process(*args) as running:
            until(lambda: len(ranks_of(running.pid)) == 2, running)
            workers = ranks_of(running.pid)
            second = next(p for p in workers if p.environ()["RANK"] == "1")
            (second if whose == "rank" else psutil.Process(running.pid)).kill()
            _, err = running.communicate(timeout=300)
            assert not psutil.wait_procs(workers, timeout=120)[1]
        if whose == "rank":
            fails(Ended(running.returncode, "", err), 3, "rank 1 was killed by signal SIGKILL")


@pytest.mark.slow
def test_no_sharded_rank_loads_or_scores_with_the_whole_model(tmp_path: Path, here: Here) -> None:
    """The first rank has one batch more to score than the second, which goes along with it."""
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(triple(i)) + "\n" for i in range(33)))
    args = ("train", TESTBED, path, "objective=pbaa", "learning_rate=1e-4", "batch_size=16")
    alone = here(*args, "accumulate=2", f"output={tmp_path / 'one'}")
    assert alone.code == 0, alone.err
    sharded = environment_of("fsdp2", 2)
    words = (*TORCHRUN, PATCHED, *args, f"output={tmp_path / 'two'}")
    ended = launched(*words, **sharded, NEVER_WHOLE="1", NEVER_LOADED="1")
    assert ended.code == 0, ended.err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
    saved = (GenerationConfig.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert next(saved).to_dict() == next(saved).to_dict()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("profile", ["zero2", "zero3"])
def test_ranks_of_deepspeed_train_like_one_and_go_on_after_a_death(
    profile: str, tmp_path: Path, here: Here
) -> None:
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(triple(i)) + "\n" for i in range(12)))
    args = ("train", TESTBED, path, "objective=pbaa", "learning_rate=1e-4", "warmup=0")
    alone = here(*args, "batch_size=4", f"output={tmp_path / 'one'}")
    assert alone.code == 0, alone.err
    output = f"output={tmp_path / 'two'}"
    words = (*TORCHRUN, PATCHED, *args, "batch_size=2", "save_every_steps=1", output)
    ranked = environment_of(profile, 2)
    died = launched(*words, **ranked, DIES_AFTER="2")
    assert died.code != 0
    assert (tmp_path / "two.partial/checkpoint-2/complete").exists(), died.err
    ended = launched(*words, **ranked)
    assert ended.code == 0, ended.err
    assert "resuming after step" in ended.err
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert two == pytest.approx(one, abs=LARGEST)
    assert len(one) == 3
    mine, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert mine.keys() == theirs.keys()
    for name in mine:  # three steps move a weight by up to 3e-4
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sharded_adapters_are_saved_and_merged(tmp_path: Path, here: Here) -> None:
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(triple(i)) + "\n" for i in range(8)))
    args = ("train", TESTBED, path, "objective=pbaa", "lora.rank=4", "learning_rate=1e-2")
    alone = here(*args, "warmup=0", "batch_size=4", f"output={tmp_path / 'one'}")
    assert alone.code == 0, alone.err
    sharded = ("batch_size=2", f"output={tmp_path / 'two'}", "--nproc", 2, "--profile", "fsdp2")
    ended = launched("-m", "selfsteer", *args, "warmup=0", *sharded)
    assert ended.code == 0, ended.err
    names = ("one", "two")
    one, two = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in names)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-4)
    plain = tmp_path / "plain"
    ended = here("merge", tmp_path / "two" / "adapter", plain, "--dtype", "float32")
    assert ended.code == 0, ended.err
    merged, saved = (load_file(f / "model.safetensors") for f in (plain, tmp_path / "two"))
    assert merged.keys() == saved.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], saved[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_error_of_a_rank_is_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(triple(i)) + "\n" for i in range(6)))
    ended = launched(
        "-m", "selfsteer", "train", TESTBED, path, "objective=pbaa", "learning_rate=1e30",
        "max_grad_norm=1e30", "warmup=0", "batch_size=1", f"output={tmp_path / 'out'}",
        "--nproc", "2",
    )  # fmt: skip
    fails(ended, 3, "rank ", "became nan", "on the records t")
    assert ended.err.count("became nan") == 1


def test_settings_of_ranks_without_effect_are_refused(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(here("run", "smoke", f"runs_dir={tmp_path}", "--profile", "fsdp2"), 2, "add --nproc")
    fails(
        here("run", "smoke", f"runs_dir={tmp_path}", "--profile", "fsdp", "--nproc", "2"),
        2,
        "ddp, fsdp2, zero2, zero3",
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = ("run", "smoke", f"runs_dir={tmp_path}", "--profile", "fsdp2")
    fails(here(*args), 2, "--profile has no effect")


def test_a_selection_under_zero3_is_refused_before_anything_is_sampled(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    ended = here("run", "smoke", f"runs_dir={tmp_path}", "name=n")
    fails(ended, 2, "ZeRO-3 holds no whole weights", "generator.selection.points: 0")
    assert not list(tmp_path.rglob("samples"))


def triple(i: int) -> dict[str, object]:
    return {
        "id": f"t{i}",
        "messages": [{"role": "user", "content": f"What is {i}?"}],
        "responses": {"good": f"It is {i}.", "bad": "Go away."},
    }


def ranks_of(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.Error):  # one that is just starting
            found += [child] if "RANK" in child.environ() else []
    return found
