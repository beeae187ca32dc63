"""What bad input gets: one paragraph, exit code 2 or 3, nothing lost."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from selfsteer.recipe.sections import resolve_path
from tests.e2e.support import (
    TESTBED,
    TINY,
    Here,
    artefacts,
    command,
    environment,
    fails,
    finished,
    full_for,
    ledger,
)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(8)))
    return path


def sso(tmp_path: Path, model: object, queries: object, *more: str) -> tuple[object, ...]:
    return (
        "run",
        "sso",
        f"policy.model={model}",
        f"queries.path={queries}",
        f"runs_dir={tmp_path}",
        "name=x",
        "sampling.max_new_tokens=32",
        "principles.max_new_tokens=32",
        *more,
    )


def test_a_tokenizer_that_gives_up_is_an_error_in_words(
    here: Here, tmp_path: Path, queries: Path
) -> None:
    """Libraries in Rust panic, which Python sees as something that is no Exception."""
    model = shutil.copytree(resolve_path(TESTBED), tmp_path / "model")
    held = json.loads((model / "tokenizer.json").read_text())
    endless = {"type": "Replace", "pattern": {"Regex": r"^(\w+\W?)+\d\D?$"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps({**held, "normalizer": endless}))
    fails(here(*sso(tmp_path, model, queries)), 3, "a library gave up", "tokenizer")


def test_an_argument_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """What is not UTF-8 can stand in no recipe, ledger or page."""
    odd = os.fsdecode(b"odd\xff.jsonl")
    (tmp_path / odd).write_text('{"prompt": "Hi"}\n')
    for args in (("queries", odd, "--to", "q.jsonl"), ("plan", "smoke", f"name={odd}")):
        ended = subprocess.run(
            command(*args), env=environment(), cwd=tmp_path, capture_output=True, check=False
        )
        assert ended.returncode == 2
        said = ended.stderr.decode()
        assert r"odd\udcff" in said
        assert "is no UTF-8 text" in said


def test_what_a_locale_cannot_read_or_write_ends_no_command(
    smoke: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = tmp_path / "c.yaml"
    catalogue.write_text(
        "features: [{name: Wärme, good_adjective: warm, bad_adjective: cold, good: A., bad: B.}]",
        "utf-8",
    )
    listed = subprocess.run(
        command("principles", "list", catalogue),
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        check=False,
    )
    assert listed.returncode == 0
    assert b"W?rme" in listed.stdout
    asked = io.TextIOWrapper(io.BytesIO(b"What does the \xff eat?\n\n"), "utf-8")
    monkeypatch.setattr(sys, "stdin", asked)
    said = here("chat", smoke)
    assert said.code == 0, said.err
    assert "policy" in said.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n/quit\nWhat does the ant eat?\n"))
    said = here("chat", smoke, "--plain")
    assert (said.code, said.out) == (0, "")
    assert said.err.count("each question on its own") == 2


def test_unknown_keys_name_the_nearest(here: Here) -> None:
    fails(here("run", "smoke", "generator.lerning_rate=1"), 2, "generator.learning_rate")
    fails(here("run", "smoke", "training.bta=1"), 2, "training.bta", "training.beta")
    fails(here("run", "smoke", "sampling.learning_rate=1"), 2, "learning_rate")


def test_settings_without_effect_are_refused(here: Here) -> None:
    fails(here("run", "smoke", "training.steer=0.5"), 2, "training.steer", "sso-online")
    fails(here("run", "smoke", "training.simpo_margin=0.1"), 2, "simpo_margin", "sigmoid")
    fails(here("run", "smoke", "method=sso-online"), 2, "generator")
    fails(here("run", "smoke", "method=pbaa", "generator=null"), 2, "baseline")


def test_values_out_of_range_name_key_and_value(here: Here) -> None:
    fails(here("run", "smoke", "training.beta=-1"), 2, "training.beta", "-1")
    fails(here("run", "smoke", "method=dpo"), 2, "method", "sso")
    fails(here("run", "smoke", "seed"), 2, "key=value")


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path, here: Here) -> None:
    fails(here("run", "dmeo"), 2, "Did you mean demo?", "smoke")
    (tmp_path / "mine.yaml").write_text("method: pbaa\n")
    fails(here("run", tmp_path / "mine.yml"), 2, f"Did you mean {tmp_path}/mine.yaml?")


def test_a_recipe_left_empty_says_what_is_missing(here: Here) -> None:
    fails(here("run", "sso"), 2, "policy.model is missing", "queries.path is missing")


def test_a_missing_model(tmp_path: Path, queries: Path, here: Here) -> None:
    fails(here(*sso(tmp_path, "./no/such/model", queries)), 3, "no/such/model")
    (tmp_path / "empty").mkdir()
    fails(here(*sso(tmp_path, tmp_path / "empty", queries)), 3, "config.json")


def test_an_unreadable_model(
    tmp_path: Path, queries: Path, here: Here, checkpoints: dict[str, Path]
) -> None:
    broken = shutil.copytree(checkpoints["llama"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(here(*sso(tmp_path, broken, queries)), 3, "cannot be loaded")


def test_weights_that_are_not_safetensors_need_permission(
    tmp_path: Path, queries: Path, here: Here, checkpoints: dict[str, Path]
) -> None:
    import torch

    pickled = shutil.copytree(checkpoints["llama"], tmp_path / "pickled")
    model = AutoModelForCausalLM.from_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    fails(here(*sso(tmp_path, pickled, queries)), 3, "allow_pickle")


def test_a_model_without_a_chat_template(
    tmp_path: Path, queries: Path, here: Here, checkpoints: dict[str, Path]
) -> None:
    bare = shutil.copytree(checkpoints["llama"], tmp_path / "bare")
    for name in ("chat_template.jinja", "chat_template.json"):
        (bare / name).unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    fails(here(*sso(tmp_path, bare, queries)), 3, "no chat template")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no query"),
        ('{"prompt": \n', "1 malformed"),
        ('[1]\n{"prompt": "a"}\n', "line 2: not JSON"),
        ('{"text": "a"}\n', "line 1: no known shape of record, its keys are text"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}\n', "no user turn"),
    ],
)
def test_bad_query_files_name_file_and_line(
    tmp_path: Path, here: Here, text: str, said: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    fails(here(*sso(tmp_path, TESTBED, path)), 2, "bad.jsonl", said)


def test_a_missing_query_file(tmp_path: Path, here: Here) -> None:
    fails(here(*sso(tmp_path, TESTBED, tmp_path / "none.jsonl")), 2, "none.jsonl")


def test_duplicate_queries_are_counted(tmp_path: Path, queries: Path, here: Here) -> None:
    queries.write_text(queries.read_text() * 2)
    assert here(*sso(tmp_path, TESTBED, queries, "--until", "queries")).code == 0
    entry = finished(tmp_path / "x")["queries"]
    assert (entry["n_in"], entry["n_out"], entry["dropped"]) == (16, 8, {"duplicate": 8})


def test_a_budget_longer_than_the_context(tmp_path: Path, queries: Path, here: Here) -> None:
    fails(here(*sso(tmp_path, TESTBED, queries, "sampling.max_new_tokens=600")), 2, "512 tokens")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 600}) + "\n")
    ended = here(*sso(tmp_path, TESTBED, long))
    fails(ended, 3, "iteration-1/triples has nothing left", "1 prompt_too_long")
    notes = finished(tmp_path / "x")["iteration-1/principles"]["notes"]
    assert notes["sources"] == {"fallback:prompt_too_long": 1}


def test_nothing_left_lists_the_drops(tmp_path: Path, queries: Path, here: Here) -> None:
    ended = here(
        *sso(tmp_path, TESTBED, queries, "sampling.max_new_tokens=1", "principles.mode=picked")
    )
    fails(ended, 3, "iteration-1/triples has nothing left", "8 unfinished")


def test_a_nan_loss_names_the_triples_and_keeps_the_checkpoint(tmp_path: Path, here: Here) -> None:
    lines = []
    for i in range(6):
        lines.append(
            {
                "id": f"t{i}",
                "messages": [{"role": "user", "content": f"What is {i}?"}],
                "responses": {"good": f"It is {i}.", "bad": "Go away."},
            }
        )
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = here(
        "train",
        TESTBED,
        path,
        "objective=pbaa",
        "learning_rate=1e30",
        "max_grad_norm=1e30",
        "warmup=0",
        "batch_size=1",
        "save_every_steps=1",
        f"output={tmp_path / 'out'}",
    )
    fails(ended, 3, "became nan", "on the records t")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial").glob("checkpoint-1/complete"))


def test_a_training_that_never_began_does_not_take_the_name(tmp_path: Path, here: Here) -> None:
    line = {
        "messages": [{"role": "user", "content": "What is 1?"}],
        "responses": {"good": "It is one.", "bad": "Go away."},
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    args = ("train", TESTBED, tmp_path / "t.jsonl", f"output={tmp_path / 'out'}", "epochs=2")
    fails(here(*args, "objective=sso"), 2, "Nothing to train on", "1 no_plain")
    nan = ("learning_rate=1e30", "max_grad_norm=1e30", "warmup=0", "save_every_steps=1")
    fails(here(*args, "objective=pbaa", *nan), 3, "became nan")
    fails(here(*args, "objective=pbaa"), 2, "begun with other settings")


def test_a_full_disk_loses_nothing(tmp_path: Path, here: Here) -> None:
    args = ("run", "smoke", f"runs_dir={tmp_path}", "name=d", "--until", "filter", *TINY)
    assert here(*args[: -len(TINY)], *TINY, "--until", "principles").code == 0
    before = {
        p: p.read_bytes() for p in (tmp_path / "d").rglob("*.jsonl") if p.name != "ledger.jsonl"
    }
    triples = tmp_path / "d" / "iteration-1" / "triples"
    with full_for("shard-00001.jsonl"):
        fails(here(*args), 3, "disk is full")
    assert {p: p.read_bytes() for p in before} == before
    assert (triples / "shard-00000.jsonl").exists()
    assert here(*args).code == 0
    assert (triples / "shard-00001.jsonl").exists()


def test_a_finished_run_survives_a_bad_command(smoke: Path, here: Here) -> None:
    before, lines = artefacts(smoke), len(ledger(smoke))
    fails(here("run", smoke, "sampling.tempratur=1"), 2, "sampling.temperature")
    assert artefacts(smoke) == before
    assert len(ledger(smoke)) == lines


def test_showing_something_else_than_a_run(tmp_path: Path, here: Here) -> None:
    fails(here("show", tmp_path), 3, "not a run folder")


@pytest.mark.parametrize("lost", ["reader", "disk"])
def test_work_goes_on_where_nobody_is_told_of_it(tmp_path: Path, lost: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "selfsteer", "run", "smoke", f"runs_dir={tmp_path}",
             "--until", "iteration-1/samples"],
            stdout=subprocess.PIPE,
            stderr=write if lost == "reader" else full,
            env=environment(),
        )  # fmt: skip
    os.close(write)
    assert ended.returncode == 0
    assert json.loads((tmp_path / "smoke/progress.json").read_text())["error"] is None
    assert finished(tmp_path / "smoke")["iteration-1/samples"]["n_out"]


def test_a_command_without_stderr_works() -> None:
    asked = (sys.executable, "-m", "selfsteer", "principles", "list")
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *asked], capture_output=True, env=environment()
    )
    assert ended.returncode == 0
    assert b"Accuracy" in ended.stdout
