"""The other verbs: train, init, chat, show, export; and the documented examples."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from selfsteer.recipe.read import recipe_names
from tests.e2e.support import TESTBED, Here, artefacts, environment, fails, finished
from tests.make import FAMILIES, REFUSING, make_checkpoint

ROOT = Path(__file__).parents[2]


def authors_records(count: int) -> list[dict[str, object]]:
    return [
        {
            "instruction": f"What does animal {i} eat?",
            "history": [["Hello.", "Hello, how can I help?"]] if i % 2 else [],
            "system": "",
            "p_system": "Your response should be accurate. State only facts that are true.",
            "n_system": "Your response should be inaccurate. State things that are false.",
            "chosen": f"It eats grass, about {i} kilos a day.",
            "rejected": "It eats bricks and clouds.",
            "raw": "It eats some grass.",
        }
        for i in range(count)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_train_takes_the_authors_json_and_every_argument(tmp_path: Path, here: Here) -> None:
    path = tmp_path / "authors.json"
    path.write_text(json.dumps(authors_records(6)))
    args = (
        "train",
        TESTBED,
        path,
        "objective=sso-online",
        "base=ipo",
        "learning_rate=5e-7",
        "batch_size=1",
        "accumulate=3",
        "use_weight=true",
        "use_steer=true",
        "steer=0.1",
        "beta=0.2",
        f"output={tmp_path / 'out'}",
    )
    ended = here(*args, "--json")
    assert ended.code == 0, ended.err
    manifest = json.loads(ended.out)
    assert (manifest["n_in"], manifest["n_out"]) == (6, 6)
    assert {"rewards/margins/plain", "rewards/margins/good", "rewards/margins/bad"} <= set(
        manifest["last"]
    )
    # at the start h = 0 and IPO costs (1 / 2β)² = 6.25 a term: the pair, and two of 0.1 · W
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [m["step"] for m in steps] == [1, 2]
    assert steps[0]["loss"] == pytest.approx(6.25 * (1 + 0.2 * steps[0]["weight"]), rel=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "nothing to do" in here(*args).err
    fails(here(*args[:-1], "seed=3", args[-1]), 2, "Choose another output")


def test_train_drops_what_lacks_what_the_objective_reads(tmp_path: Path, here: Here) -> None:
    path, rows = tmp_path / "a.json", authors_records(4)
    rows[1]["raw"] = ""
    del rows[2]["p_system"], rows[2]["n_system"]
    path.write_text(json.dumps(rows))
    args = ("train", TESTBED, path, "learning_rate=1e-6", "--json")
    ended = here(*args, "objective=sso", f"output={tmp_path / 'sso'}")
    found = json.loads(ended.out)
    assert (found["n_out"], found["dropped"]) == (2, {"no_plain": 1, "no_principles": 1})
    ended = here(*args, "objective=pbaa", f"output={tmp_path / 'pbaa'}")
    assert json.loads(ended.out)["n_out"] == 4


def test_train_refuses_what_the_objective_ignores(tmp_path: Path, here: Here) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(authors_records(2)))
    fails(
        here("train", TESTBED, path, "objective=pbaa", "gamma=1", f"output={tmp_path / 'o'}"),
        2,
        "gamma",
    )
    fails(here("train", TESTBED, path, "objective=pbaa"), 2, "output is missing")


def test_train_drops_what_a_run_would_drop(tmp_path: Path, here: Here) -> None:
    def row(i: int, good: str, bad: str, **more: object) -> dict[str, object]:
        asked = [{"role": "user", "content": f"What does animal {i} eat?"}]
        return {"id": f"q{i}", "messages": asked, "responses": {"good": good, "bad": bad}, **more}

    rows = [
        row(0, "", "x"),
        row(1, "a", "a"),
        row(2, "Grass", "Bricks.", finish_reasons={"good": "length"}),
        row(3, "Grass.", "Bricks."),
        {"prompt": "Why?"},
        row(5, "Grass.", "Clouds."),
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ("train", TESTBED, path, "objective=pbaa", "batch_size=2")
    ended = here(*args, f"output={tmp_path / 'o'}", "--json")
    assert ended.code == 0, ended.err
    manifest = json.loads(ended.out)
    lost = {"no_pair": 1, "empty": 1, "good_equals_bad": 1, "unfinished": 1}
    assert (manifest["n_in"], manifest["n_out"], manifest["dropped"]) == (6, 2, lost)
    left = [json.loads(x) for x in (tmp_path / "o" / "dropped.jsonl").read_text().splitlines()]
    assert [(x["id"], x["reason"]) for x in left] == [
        (f"{path}, line 5", "no_pair"),
        ("q0", "empty"),
        ("q1", "good_equals_bad"),
        ("q2", "unfinished"),
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:2]))
    ended = here(*args, f"output={tmp_path / 'p'}")
    fails(ended, 2, "all 2 records are dropped (1 empty, 1 good_equals_bad)")
    assert not (tmp_path / "p.partial").exists()


@pytest.mark.slow
def test_a_conversation_that_the_template_refuses_is_dropped(tmp_path: Path, here: Here) -> None:
    model = make_checkpoint(tmp_path / "m", "qwen2")
    template = model / "chat_template.jinja"
    template.write_text(REFUSING + template.read_text())
    rows = [
        {"id": i, "prompt": asked, "chosen": "Grass.", "rejected": "Bricks."}
        for i, asked in enumerate(("What do sheep eat?", "No.", "What do cows eat?"))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ended = here("train", model, path, "objective=pbaa", f"output={tmp_path / 'o'}", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["n_out"], found["dropped"]) == (2, {"template_refuses": 1})

    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    shutil.copytree(model, tmp_path / "r")
    scorer.save_pretrained(tmp_path / "r")
    for judge in (model, tmp_path / "r"):
        ended = here("rewardbench", judge, path, "--json")
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        assert (found["rows_read"], found["rows"]) == (3, 2)
        assert found["dropped"] == {"template_refuses": 1}
    path.write_text(json.dumps(rows[1]))
    fails(here("rewardbench", model, path), 2, "refuses the conversation of every row")


def test_two_ranks_train_like_one_with_twice_the_batch(tmp_path: Path, here: Here) -> None:
    path = tmp_path / "a.json"
    # four a step: in the last one a single query is left, and one rank without work
    path.write_text(json.dumps(authors_records(9)))
    common = ["train", TESTBED, str(path), "objective=sso", "learning_rate=1e-3", "warmup=0"]
    one = here(*common, "batch_size=4", f"output={tmp_path / 'one'}")
    assert one.code == 0, one.err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch = [*torchrun, "--standalone", "-m", "selfsteer.cli", *common, "batch_size=2"]
    two = subprocess.run(
        [*launch, f"output={tmp_path / 'two'}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    first, second = ([m for m in map(json.loads, part) if "loss" in m] for part in lines)
    assert [m["step"] for m in first] == [m["step"] for m in second] == [1, 2, 3]
    for x, y in zip(first, second, strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - {"stage", "entropy", "mean_token_accuracy"}:  # sampled row by row
            assert y[name] == pytest.approx(x[name], rel=1e-3, abs=1e-4), name
    alone = here(*common, "batch_size=2", f"output={tmp_path / 'two'}")
    fails(alone, 2, "was not made by this command", "number of ranks")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = AutoModelForCausalLM.from_pretrained(
        ROOT / "src/selfsteer/testbed/checkpoint", dtype=torch.float32
    ).state_dict()
    moved = max(float((a[n] - start[n]).abs().max()) for n in a)
    apart = max(float((a[n] - b[n]).abs().max()) for n in a)
    mean_apart = max(float((a[n] - b[n]).abs().mean()) for n in a)
    assert moved > 1e-3
    assert apart < 0.02 * moved
    assert mean_apart < 0.001 * moved


@pytest.mark.parametrize("family", FAMILIES)
def test_real_checkpoint_shapes_run_end_to_end(
    tmp_path: Path, here: Here, checkpoints: dict[str, Path], family: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, object]] = [{"prompt": f"What is number {i}?"} for i in range(6)]
    rows.append({"prompt": "Name a fish.", "system": "You are a cook."})
    rows.append(
        {
            "id": "chat",
            "messages": [
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "What does the cat eat?"},
            ],
        }
    )
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ended = here(
        "run",
        "sso",
        f"policy.model={checkpoints[family]}",
        f"queries.path={path}",
        f"runs_dir={tmp_path}",
        "name=mine",
        "sampling.max_new_tokens=12",
        "sampling.keep_unfinished=true",
        "principles.max_new_tokens=12",
        "generator.batch_size=4",
        "training.batch_size=4",
        "generator.learning_rate=1e-3",
        "training.learning_rate=1e-3",
    )
    assert ended.code == 0, ended.err
    assert ("no system role" in ended.err) == (family == "gemma")
    run = tmp_path / "mine"
    entries = finished(run)
    assert entries["queries"]["n_out"] == 8
    assert entries["iteration-1/principles"]["notes"]["sources"].get("generated", 0) < 8
    before, after = weights(checkpoints[family]), weights(run / "iteration-1" / "policy")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n].float(), after[n].float()) for n in before)
    AutoModelForCausalLM.from_pretrained(run / "iteration-1" / "policy")


def test_lora_trains_and_saves_a_plain_checkpoint(
    tmp_path: Path, here: Here, checkpoints: dict[str, Path]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(authors_records(4)))
    ended = here(
        "train",
        checkpoints["llama"],
        path,
        "objective=sso",
        "learning_rate=1e-2",
        "warmup=0",
        "batch_size=2",
        "lora.rank=2",
        f"output={tmp_path / 'out'}",
    )
    assert ended.code == 0, ended.err
    before, after = weights(checkpoints["llama"]), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.allclose(before[n].float(), after[n].float())}
    assert changed
    assert not any("embed" in n or "norm" in n for n in changed)


def test_init_writes_a_recipe_that_only_lacks_what_is_the_users(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    ended = here("init", path, "--pairs", "--hardware", 80)
    assert ended.code == 0, ended.err
    assert "set policy.model, queries.path in it" in ended.out
    text = path.read_text()
    assert "# β of the base loss" in text
    assert yaml.safe_load(text)["method"] == "sso"
    fails(here("run", path), 2, "policy.model is missing")
    fails(here("init", path), 2, "there already")
    monkeypatch.chdir(tmp_path)
    data = "package:selfsteer.testbed/queries/align.jsonl"
    ended = here("run", path, f"policy.model={TESTBED}", f"queries.path={data}", "--dry-run",
                 "sampling.max_new_tokens=64")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "iteration-1/generator" in ended.out


def test_chat_shows_each_model_in_each_context(smoke: Path, here: Here) -> None:
    ended = here("chat", smoke, "--question", "What does the bee eat?")
    assert ended.code == 0, ended.err
    for word in ("plain", "good", "bad", "base", "generator", "policy", "baseline"):
        assert word in ended.out
    assert "contrast" not in ended.out
    ended = here("chat", smoke, "--question", "What does the bee eat?", "--contrast", 3, "--json")
    for said in json.loads(ended.out)["answers"].values():
        assert list(said) == ["plain", "good", "bad", "contrast"]
        assert said["contrast"]
    ended = here("chat", smoke, "--question", "What does the bee eat?", "--plain", "--json")
    answers = json.loads(ended.out)["answers"]
    assert [list(answers[name]) for name in ("base", "policy")] == [["plain"], ["plain"]]
    ended = here("chat", smoke, "--question", "Why?", "--plain", "--features", "Accuracy")
    fails(ended, 2, "--plain asks without principles", "--features")


@pytest.mark.parametrize("number", ["nan", "1e39"])
def test_chat_refuses_a_contrast_that_no_logits_bear(
    tmp_path: Path, here: Here, number: str
) -> None:
    fails(here("chat", tmp_path, "--contrast", number), 2, "--contrast cannot be used")


def test_show_prints_stages_quality_and_models(smoke: Path, here: Here) -> None:
    ended = here("show", smoke)
    assert ended.code == 0
    for word in ("iteration-1/triples", "gap", "held-out queries", "policy"):
        assert word in ended.out
    found = json.loads(here("show", smoke, "--json").out)
    assert found["stages"]["iteration-1/policy"]["event"] == "finish"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves its lock files open
def test_export_opens_in_datasets(smoke: Path, tmp_path: Path, here: Here) -> None:
    import datasets

    ended = here("export", smoke, "--format", "trl", "--to", tmp_path / "trl")
    assert ended.code == 0, ended.err
    found = datasets.load_dataset(str(tmp_path / "trl"), split="train", cache_dir=tmp_path / "c")
    stored = artefacts(smoke)
    lines = [
        json.loads(line)
        for name in sorted(stored)
        if name.startswith("iteration-1/preferences/")
        for line in stored[name].splitlines()
    ]
    assert list(found["id"]) == [line["id"] for line in lines]
    assert found[0]["chosen"] == lines[0]["chosen"]
    fails(here("export", smoke, "--format", "xml", "--to", tmp_path / "x"), 2, "trl")
    fails(here("export", smoke, "--iteration", 9, "--to", tmp_path / "x"), 3, "iteration-9")


def test_every_shipped_recipe_is_valid_once_its_model_is_given() -> None:
    from selfsteer.methods import load_recipe

    rivals = {"best-of-n", "self-rewarding", "sgpo", "spin", "wpo"}
    own = {"demo", "pbaa", "reward", "smoke", "sso", "sso-online"}
    assert own | rivals <= set(recipe_names())
    more = {"best-of-n": ["ranking.judge.model=m"], "spin-judged": ["judge.model=m"]}
    for name in recipe_names():
        data = "reward.data=x.jsonl" if name == "reward" else "queries.path=x.jsonl"
        recipe = load_recipe(name, [f"policy.model={TESTBED}", data, *more.get(name, [])])
        assert recipe.name == name
    made: Any = load_recipe("sso", ["policy.model=m", "queries.path=q"])
    assert made.generator.queries == 8000
