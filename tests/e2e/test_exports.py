"""Exports of a real run: other libraries open them, TRL trains on them, they come in again."""

import base64
import http.server
import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.data.digests import model_digest
from selfsteer.data.jsonl import read_jsonl, read_shards, write_atomic
from selfsteer.data.records import Preference
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.formats import FORMATS
from selfsteer.formats.cards import dataset_card, model_card
from selfsteer.formats.hub import plan_upload, push
from selfsteer.methods import METHODS, Aligning
from selfsteer.methods.sso import SSO
from selfsteer.recipe.sections import Augment, EngineConfig
from selfsteer.view import RoundView, RunView, StageView
from tests.e2e.support import TESTBED, Here, accepted, command, environment, fails, full_for

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "src/selfsteer/testbed/checkpoint"

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",  # datasets leaves its lock files open
    # TRL 1.16 still uses transformers' old name for activation checkpointing.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)


def stored(run: Path) -> list[Preference]:
    return [Preference.from_dict(v) for v in read_shards(run / "iteration-1" / "preferences")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_jsonl(path)]


def exported(here: Here, run: Path, fmt: str, folder: Path, *more: str) -> list[Path]:
    ended = here("export", run, "--format", fmt, "--to", folder, "--json", *more)
    assert ended.code == 0, ended.err
    return [Path(p) for p in json.loads(ended.out)["paths"]]


def front_matter(readme: Path) -> tuple[dict[str, Any], str]:
    _, head, text = readme.read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f != "authors"])
def test_what_goes_out_comes_in_again(smoke: Path, tmp_path: Path, here: Here, fmt: str) -> None:
    paths = exported(here, smoke, fmt, tmp_path / "out")
    source = tmp_path / "out" if fmt == "parquet" else paths[0]
    ended = here("import", source, "--to", tmp_path / "in.jsonl", "--json")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert (said["n_out"], said["dropped"]) == (16, {})
    found = lines(tmp_path / "in.jsonl")
    given = [p.to_dict() for p in stored(smoke)]
    prompts = [g["prompt"] for g in given]
    if fmt == "trl-prompts":
        assert [(f["id"], f["messages"]) for f in found] == [(g["id"], g["prompt"]) for g in given]
    elif fmt == "chat":
        assert [f["messages"] for f in found] == prompts
        answers = [g["chosen"][0]["content"] for g in given]
        assert [f["responses"]["good"] for f in found] == answers
    else:
        keys = ("id", "prompt", "chosen", "rejected")
        assert [[f[k] for k in keys] for f in found] == [[g[k] for k in keys] for g in given]
    if fmt == "distilabel":
        assert {f["chosen_model"] for f in found} == {"done/iteration-1/generator"}


def test_the_authors_format_comes_in_again(smoke: Path, tmp_path: Path, here: Here) -> None:
    (path,) = exported(here, smoke, "authors", tmp_path)
    assert here("import", path, "--to", tmp_path / "in.jsonl").code == 0
    found, given = lines(tmp_path / "in.jsonl"), lines(smoke / "iteration-1" / "filtered.jsonl")
    assert [f["responses"] for f in found] == [g["responses"] for g in given]
    assert [f["principles"]["bad"] for f in found] == [g["principles"]["bad"] for g in given]
    fails(here("import", path, "--to", tmp_path / "in.jsonl"), 2, "is there already")


def test_parquet_opens_in_datasets_and_its_card_tells_how_it_was_made(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    import datasets

    folder = tmp_path / "out"
    exported(here, smoke, "parquet", folder, "--queries-license", "cc-by-4.0")
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    columns = ["id", "prompt", "chosen", "rejected", "finish_reasons", "features"]
    assert rows.column_names == columns
    assert rows.to_list() == [{k: p.to_dict()[k] for k in columns} for p in stored(smoke)]
    front, text = front_matter(folder / "README.md")
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"][0]["data_files"][0]["path"] == ["data/train-00000-of-00001.parquet"]
    quality = json.loads((smoke / "iteration-1" / "quality.json").read_text())["preferences"]
    for said in (
        "Model: package:selfsteer.testbed/checkpoint",
        "Principles: generated",
        "| iteration-1/preferences | 16 | 16 | none |",
        "over_limit",
        "Left out of the data set: nothing.",
        f"Accuracy of the pairs: {quality['accuracy']:.3f} of 16 pairs, by the testbed's oracle",
        f"chosen {quality['on_policyness']['chosen']:.3f}",
        "Queries: cc-by-4.0.",
        "The rejected answers are **deliberately bad**",
    ):
        assert said in text
    assert str(smoke.parent) not in text
    exported(here, smoke, "parquet", tmp_path / "b", "--baseline")
    front, text = front_matter(tmp_path / "b" / "README.md")
    assert front["license"] == "unknown"
    assert "Queries: unknown, check before you publish." in text
    assert "Method: pbaa" in text
    assert "baseline/iteration-1/samples" in text
    assert "iteration-1/generator" not in text


def changed(run: RunView, stages: tuple[StageView, ...] = (), **sections: Any) -> RoundView:
    """The round of a run whose recipe has other sections, and perhaps more stages."""
    recipe = run.recipe.model_copy(update=sections)
    return replace(run, recipe=recipe, stages=(*run.stages, *stages)).round()


def test_the_card_says_whose_principles_and_queries_these_are(smoke: Path) -> None:
    run, said = RunView.open(smoke), {}
    assert isinstance(run.recipe, SSO)
    queries = run.stage("ReadQueries")
    assert queries
    grown = replace(queries, name="augment", kind="GrowQueries", n_in=16, n_out=40)
    augmented = run.recipe.queries.model_copy(update={"augment": Augment(to=40)})
    changes: dict[str, dict[str, Any]] = {
        "fixed": {"mode": "fixed", "good": "Be kind.", "bad": "Be cruel."},
        "own": {"mode": "picked", "catalogue": "/home/me/house.yaml"},
        "written": {
            "mode": "generated",
            "catalogue": "/home/me/house.yaml",
            "writer": EngineConfig(model="/m/big"),
        },
    }
    for name, values in changes.items():
        principles = run.recipe.principles.model_copy(update=values)
        of = changed(run, (grown,), principles=principles, queries=augmented)
        said[name] = dataset_card(of, count=16, files=["a"], left_out=[], queries_license=None)
    assert "Principles: fixed: texts given by the author of the run" in said["fixed"]
    assert "Principles: picked: the texts of the catalogue house.yaml, by feat" in said["own"]
    assert "by big, the texts of the catalogue house.yaml where its answer" in said["written"]
    assert "align.jsonl, grown with the policy itself" in said["own"]
    assert "| augment | 16 | 40 |" in said["own"]


def test_the_card_of_a_method_without_principles_names_none(smoke: Path) -> None:
    run = RunView.open(smoke)
    for method, how in (("best-of-n", "of several a judge ranked"), ("spin", "came with the prom")):
        of = replace(run.round(), method=method)
        card = dataset_card(of, count=16, files=["a"], left_out=[], queries_license=None)
        for text in (card, model_card(of)):
            assert how in text
            assert "principle" not in text.replace("/principles |", "")
            assert "deliberately bad" not in text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_pairs_says_how_they_came_about(method: type) -> None:
    assert not issubclass(method, Aligning) or method.pair


def test_export_refuses_what_has_no_effect(smoke: Path, tmp_path: Path, here: Here) -> None:
    to = ("--to", tmp_path / "x")
    fails(here("export", smoke, *to, "--queries-license", "mit"), 2, "trl has none")
    fails(here("export", smoke, *to, "--model", "--format", "trl"), 2, "--model takes neither")
    fails(here("export", smoke, *to, "--format", "csv"), 2, "llama-factory-sharegpt")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("stage", "fmt"), [("preferences", "trl"), ("triples", "authors")])
def test_a_part_of_what_a_stage_writes_is_no_data_set(
    smoke: Path, tmp_path: Path, here: Here, stage: str, fmt: str
) -> None:
    """As a run leaves it that was killed between two shards, or is still at it."""
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    if stage == "triples":
        (run / "iteration-1" / "triples").rename(run / "iteration-1" / "filtered.of")
        (run / "iteration-1" / "filtered.jsonl").unlink()
        stage = "samples"
    ledger = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    last = f"iteration-1/{stage}"
    ends = next(i for i, e in enumerate(map(json.loads, ledger)) if e["stage"] == last) + 1
    (run / "ledger.jsonl").write_text("".join(ledger[:ends]))
    said = f"iteration-1/{stage} is not finished"
    ended = here("export", run, "--format", fmt, "--to", tmp_path / "out")
    fails(ended, 3, said, "it goes on where it was")
    assert not (tmp_path / "out").exists()
    if stage == "preferences":
        fails(here("judge", run), 3, said)


def test_data_sets_of_one_run_stand_beside_each_other_for_llama_factory(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    made = [
        exported(here, smoke, fmt, tmp_path / "data", *more)[0].name
        for fmt in ("llama-factory", "llama-factory-sharegpt")
        for more in ([], ["--baseline"])
    ]
    parts = ("", "-pbaa", "-sharegpt", "-pbaa-sharegpt")
    assert made == [f"{smoke.name}{part}.json" for part in parts]
    entries = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    assert [e["file_name"] for e in entries.values()] == made


def test_the_policy_is_exported_with_its_card_and_the_run_stays_as_it_is(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    policy = smoke / "iteration-1" / "policy"
    before = model_digest(str(policy))
    partial = tmp_path / "model" / ".partial"
    partial.mkdir(parents=True)
    there = (tmp_path / "model").stat().st_ino
    (partial / "left by a kill").touch()
    ended = here("export", smoke, "--model", "--to", tmp_path / "model")
    assert ended.code == 0, ended.err
    assert model_digest(str(policy)) == before
    assert (tmp_path / "model").stat().st_ino == there, "it may be a mount point"
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(
        ["Modelfile", "README.md", *(p.name for p in policy.iterdir())]
    )
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("The bee", return_tensors="pt")
    with torch.no_grad():
        mine, theirs = (
            AutoModelForCausalLM.from_pretrained(f)(**ids).logits
            for f in (tmp_path / "model", policy)
        )
    assert torch.equal(mine, theirs)
    front, text = front_matter(tmp_path / "model" / "README.md")
    assert front["library_name"] == "transformers"
    assert "base_model" not in front
    models = json.loads((smoke / "evaluation.json").read_text())["models"]
    score = models["sso/iteration-1"]["score"]
    assert f"| this model | {score[0]:.3f} [{score[1]:.3f}, {score[2]:.3f}] |" in text
    assert "Trained on: 16 pairs" in text
    assert re.search(r"sso (scores 0\.\d+ \[.*\] (more|less) than|and) pbaa", text)
    assert "\nvllm serve . --served-model-name done\nollama create done -f Modelfile\n" in text
    sampled = "PARAMETER temperature 0.7\nPARAMETER top_p 0.8\n"
    made = (tmp_path / "model" / "Modelfile").read_text()
    assert made.startswith("FROM .\n")
    assert made.endswith(sampled)
    fails(here("export", smoke, "--model", "--to", tmp_path / "model"), 2, "there already")
    fails(
        here("export", smoke, "--model", "--to", tmp_path / "y", "--iteration", 3),
        3,
        "iteration-3 is not",
    )


def test_a_policy_that_is_likely_broken_says_so_wherever_it_goes(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    kept = "step 18 of 69 kept (win rate 0.00; step 18: KL 11.7 times its bound)"
    broken = "every candidate drifted beyond its bounds; step 18 | is <likely> broken"
    odd = "plain answers repeat themselves"
    report = {"chosen": 18, "steps": 69, "wins": "win rate", "candidates": []}
    (run / "iteration-1/policy.selection.json").write_text(json.dumps(report))

    def noted(line: str) -> str:
        entry = json.loads(line)
        if entry["event"] == "finish" and entry["stage"] == "iteration-1/policy":
            entry["notes"]["selection"] = {"text": kept, "warnings": [broken]}
        if entry["event"] == "finish" and entry["stage"] == "iteration-1/generator":
            entry["notes"]["warnings"] = [odd]
        return json.dumps(entry)

    accepted(run, noted)
    warnings = [f"iteration-1/generator: {odd}", f"iteration-1/policy: {broken}"]
    ended = here("export", run, "--model", "--to", tmp_path / "model")
    assert ended.code == 0, ended.err
    for text in warnings:
        assert f"warning: {text}" in " ".join(ended.err.split())
    _, text = front_matter(tmp_path / "model" / "README.md")
    assert f"- Selection: {kept}: 0.261 of 1 epochs\n" in text
    assert "step 18 \\| is &lt;likely&gt; broken\n" in text.partition("## How it was made")[0]
    assert plan_upload(tmp_path / "model", "me/model", private=False).warnings == warnings
    for text in warnings:
        said = here("push", tmp_path / "model", "me/model").err
        assert f"warning: {text}" in " ".join(said.split())
    found = here("export", run, "--model", "--to", tmp_path / "again", "--json")
    assert json.loads(found.out)["warnings"] == warnings
    # its data was made before
    ended = here("export", run, "--format", "parquet", "--to", tmp_path / "data")
    assert odd in " ".join(ended.err.split())
    assert "drifted" not in ended.err
    assert plan_upload(tmp_path / "data", "me/data", private=False).warnings[:-1] == warnings[:1]
    ended = here("export", smoke, "--model", "--to", tmp_path / "sound")
    assert "warning" not in ended.err
    assert "## Warnings" not in (tmp_path / "sound" / "README.md").read_text()


@pytest.mark.parametrize(
    ("fmt", "file"),
    [
        ("--model", "README.md"),
        ("--format=trl", "train.jsonl"),
        ("--format=llama-factory", "dataset_info.json"),
        ("--format=parquet", "README.md"),
    ],
)
def test_an_export_that_filled_the_disk_is_gone_and_can_be_repeated(
    smoke: Path, tmp_path: Path, here: Here, fmt: str, file: str
) -> None:
    to = tmp_path / "out"
    with full_for(file):
        fails(here("export", smoke, fmt, "--to", to), 3, "disk is full")
    assert list(tmp_path.iterdir()) == []
    weights = smoke / "iteration-1/policy/model.safetensors"
    mode = weights.stat().st_mode
    weights.chmod(0o600)  # of a run that only its owner reads
    assert here("export", smoke, "--model", "--to", to).code == 0
    weights.chmod(mode)
    assert (to / weights.name).stat().st_mode == (to / "README.md").stat().st_mode


@pytest.mark.parametrize("fmt", [*FORMATS, "reward", "mt-bench", "--model"])
def test_an_export_that_fails_takes_nothing_of_another(
    smoke: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, fmt: str
) -> None:
    """Two export into one new folder at once; the one that began first fails in the end."""
    run, to, other = smoke, tmp_path / "to", list[int]()
    how = ["--model"] if fmt == "--model" else ["--format", fmt]
    if fmt == "mt-bench":
        run = shutil.copytree(smoke, tmp_path / "run")
        questions = tmp_path / "questions.jsonl"
        questions.write_text('{"question_id": 1, "turns": ["What does the bee eat?"]}\n')
        how += ["--questions", str(questions)]
        assert here("export", run, *how, "--to", tmp_path / "first").code == 0
        shutil.rmtree(tmp_path / "first")

    def meanwhile(path: Path, *args: Any, **more: Any) -> None:
        write_atomic(path, *args, **more)
        if {to.name, f".{to.name}.partial"} & {*path.parts}:
            monkeypatch.undo()
            other.append(here("export", run, *how, "--to", to).code)
            raise ArtifactError("The disk is full.")

    for module in ("formats.export", "formats.reward", "evaluation.official", "verbs.exporting"):
        monkeypatch.setattr(import_module(f"selfsteer.{module}"), "write_atomic", meanwhile)
    fails(here("export", run, *how, "--to", to), 3, "disk is full")
    assert other in ([0], [3])
    assert to.exists() == (other == [0])
    assert to.exists() or here("export", run, *how, "--to", to).code == 0
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("fmt", [*FORMATS, "reward", "mt-bench", "--model"])
def test_nothing_is_exported_into_a_run_or_among_other_files(
    smoke: Path, tmp_path: Path, here: Here, fmt: str
) -> None:
    how = ["--model"] if fmt == "--model" else ["--format", fmt]
    run, link = shutil.copytree(smoke, tmp_path / "run"), tmp_path / "link"
    link.symlink_to(run / "iteration-1")
    before = sorted(run.rglob("*"))
    for to in (run, run / "iteration-1" / "preferences", run / "new", link / "preferences"):
        fails(here("export", smoke, *how, "--to", to), 2, f"is in the run folder {run}")
    assert sorted(run.rglob("*")) == before
    # LLaMA-Factory's folder is added to, and so are answers, whose files are named by the models
    if fmt not in ("llama-factory", "llama-factory-sharegpt", "mt-bench"):
        (tmp_path / "train.jsonl").write_text("mine")
        fails(here("export", smoke, *how, "--to", tmp_path), 2, "is there already")
        assert (tmp_path / "train.jsonl").read_text() == "mine"
    assert not list(tmp_path.glob(".*partial"))


def test_an_export_that_fails_leaves_what_was_there(
    smoke: Path, tmp_path: Path, here: Here
) -> None:
    (tmp_path / "mine.json").write_text("{}")
    with full_for("dataset_info.json"):
        fails(here("export", smoke, "--format=llama-factory", "--to", tmp_path), 3, "disk is full")
    assert (tmp_path / "mine.json").read_text() == "{}"


#: Takes the arguments of llama.cpp's converter; a real GGUF file, but with transformers' names.
CONVERTER = """
import sys
from gguf import GGUFWriter
from safetensors.torch import load_file
source, *rest = sys.argv[1:]
flag, file, *kind = rest
assert (flag, *kind) == ("--outfile", "--outtype", "f16"), rest
if "broken" in sys.argv[0]:
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
writer = GGUFWriter(file, "llama")
for name, weight in load_file(f"{source}/model.safetensors").items():
    writer.add_tensor(name, weight.half().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def test_a_policy_becomes_a_gguf_file_by_llama_cpps_converter(
    smoke: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("--model", "--format", "gguf", "--to", tmp_path / "model")
    monkeypatch.setenv("PATH", str(tmp_path))
    again = f"selfsteer export {smoke} --model --format gguf --to {tmp_path}/model --llama-cpp"
    fails(here("export", smoke, *to), 2, "is not on the PATH", "git clone", again)
    fails(here("export", smoke, *to, "--llama-cpp", tmp_path), 2, f"no {tmp_path}/convert_hf_to")
    fails(here("export", smoke, "--format", "gguf", "--to", tmp_path / "x"), 2, "add --model")
    fails(here("export", smoke, "--llama-cpp", "x", "--to", tmp_path / "x"), 2, "belongs to")

    broken = tmp_path / "broken.py"
    broken.write_text(CONVERTER)
    ended = here("export", smoke, *to, "--llama-cpp", broken)
    fails(ended, 3, "exit code 1", "pre-tokenizer was not recognized", "Nothing was exported")
    assert list(tmp_path.iterdir()) == [broken]

    broken.rename(tmp_path / "convert_hf_to_gguf.py")
    ended = here("export", smoke, *to, "--llama-cpp", tmp_path)
    assert ended.code == 0, ended.err
    model = tmp_path / "model"
    assert (model / "Modelfile").read_text().startswith("FROM ./done.gguf\n")
    held = {t.name: t.n_elements for t in GGUFReader(model / "done.gguf").tensors}
    weights = load_file(model / "model.safetensors")
    assert held == {name: weight.numel() for name, weight in weights.items()}


def test_commands_of_the_docs_run(
    smoke: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "formats.md").read_text("utf-8")
    found = [c.partition(" #")[0].split()[1:] for c in re.findall(r"^selfsteer .+", page, re.M)]
    assert {c[0] for c in found} == {"export", "import", "push"}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(smoke)
    record = {"instruction": "Why?", "chosen": "Rain.", "rejected": "Soup."}
    (tmp_path / "theirs.json").write_text(json.dumps([record]))
    monkeypatch.chdir(tmp_path)
    for words in found:
        if "--yes" not in words:
            ended = here(*words)
            assert ended.code == 0, (words, ended.err)
    assert lines(Path("ours.jsonl"))[0]["rejected"] == [{"role": "assistant", "content": "Soup."}]


# -- other trainers ------------------------------------------------------------------------------


def load(folder: Path, cache: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))


def one_step(trainer: Any) -> float:
    """The loss of the first step, before any update: policy and reference are equal."""
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(loss)


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


@pytest.mark.parametrize("fmt", ["trl", "parquet"])
def test_dpo_trainer_takes_a_step(smoke: Path, tmp_path: Path, here: Here, fmt: str) -> None:
    from trl import DPOConfig, DPOTrainer

    exported(here, smoke, fmt, tmp_path / "out")
    args = DPOConfig(**settings(tmp_path / "trained"))
    rows = load(tmp_path / "out", tmp_path / "cache")
    trainer: Any = DPOTrainer(str(CHECKPOINT), args=args, train_dataset=rows)
    first = trainer.train_dataset[0]
    decode = trainer.processing_class.decode
    assert stored(smoke)[0].prompt[-1].content in decode(first["prompt_ids"])
    assert decode(first["chosen_ids"]).startswith(stored(smoke)[0].chosen)
    assert one_step(trainer) == pytest.approx(math.log(2), abs=1e-3)  # -log σ(0)


def test_kto_trainer_takes_a_step(smoke: Path, tmp_path: Path, here: Here) -> None:
    from trl import KTOConfig, KTOTrainer

    exported(here, smoke, "trl-unpaired", tmp_path / "out")
    args = KTOConfig(**settings(tmp_path / "trained"))
    rows = load(tmp_path / "out", tmp_path / "cache")
    assert sum(rows["label"]) == len(rows) / 2 == 16
    trainer: Any = KTOTrainer(str(CHECKPOINT), args=args, train_dataset=rows)
    assert one_step(trainer) == pytest.approx(0.5, abs=1e-3)  # 1 - σ(0)


def test_train_reads_a_parquet_export(smoke: Path, tmp_path: Path, here: Here) -> None:
    exported(here, smoke, "parquet", tmp_path / "out")
    ended = here(
        "train",
        TESTBED,
        tmp_path / "out",
        "objective=pbaa",
        "batch_size=16",
        f"output={tmp_path / 'trained'}",
        "--json",
    )
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["last"]["loss"] == pytest.approx(math.log(2), abs=1e-4)


# -- the hub -------------------------------------------------------------------------------------


class FakeHub:
    """What `push` needs of HfApi; remembers what it was asked."""

    def __init__(self, *, private: bool) -> None:
        self.private = private
        self.asked: list[tuple[str, Any]] = []

    def create_repo(self, **more: Any) -> str:
        self.asked.append(("create", more))
        return f"https://hub.test/{more['repo_id']}"

    def repo_info(self, **repo: str) -> "FakeHub":
        return self

    def upload_folder(self, **more: Any) -> None:
        self.asked.append(("upload", more))


def test_push_makes_the_repository_and_uploads_once(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / ".train.jsonl.partial").write_text("{")
    upload = plan_upload(tmp_path, "me/data", private=True)
    assert (upload.kind, upload.warnings) == ("dataset", [])
    assert upload.files == [("README.md", 21), ("train.jsonl", 3)]
    hub = FakeHub(private=True)
    assert push(upload, hub) == "https://hub.test/me/data"
    made, sent = hub.asked
    assert made == (
        "create",
        {"repo_id": "me/data", "private": True, "repo_type": "dataset", "exist_ok": True},
    )
    assert sent[1]["folder_path"] == tmp_path
    assert sent[1]["ignore_patterns"] == [".*", "*/.*"]
    public = FakeHub(private=False)
    with pytest.raises(ArtifactError, match="is public, but --private was given"):
        push(upload, public)
    assert [name for name, _ in public.asked] == ["create"]


def test_push_refuses_a_run_and_a_name_that_is_none(smoke: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a whole run"):
        plan_upload(smoke, "me/data", private=False)
    with pytest.raises(ConfigError, match="not the name of a hub repository"):
        plan_upload(tmp_path, "me/da ta", private=False)
    with pytest.raises(ConfigError, match="holds no file"):
        plan_upload(tmp_path, "me/data", private=False)


def test_push_without_yes_says_what_it_would_do(smoke: Path, tmp_path: Path, here: Here) -> None:
    exported(here, smoke, "parquet", tmp_path / "out")
    ended = here("push", tmp_path / "out", "me/data", "--private")
    assert ended.code == 0, ended.err
    assert "data/train-00000-of-00001.parquet" in ended.out
    assert "to the private dataset me/data; nothing was uploaded. Add --yes" in ended.out
    assert "licence of the queries is unknown" in ended.err
    exported(here, smoke, "trl", tmp_path / "bare")
    assert "there is no README.md" in here("push", tmp_path / "bare", "me/data").err


@contextmanager
def hub_on_loopback(refuse: dict[str, tuple[int, dict[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """A hub that takes everything, but for what is asked of a path that ends in a key of refuse.

    Gives its address, and what was sent to each path.
    """
    sent: dict[str, bytes] = {}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            sent[self.path] = body
            said: dict[str, Any] = {"id": "me/data", "private": True, "siblings": [], "tags": []}
            home = f"http://{self.headers['host']}/datasets/me/data"
            said |= {"url": home, "commitOid": "0" * 40, "commitUrl": f"{home}/commit/{'0' * 40}"}
            if "/preupload/" in self.path:
                names = [f["path"] for f in json.loads(body)["files"]]
                said["files"] = [
                    {"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for n in names
                ]
            status = 200
            for end, answer in refuse.items():
                if self.path.endswith(end):
                    status, said = answer
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()


def pushed(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A push in a process of its own: the hub's client reads its settings once."""
    return subprocess.run(
        command("push", folder, "me/data", "--yes"),
        env=environment(HF_HOME=str(folder.parent / "hf"), **env),
        capture_output=True,
        text=True,
        check=False,
    )


def test_push_says_in_one_paragraph_why_it_failed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}\n")
    offline = pushed(folder)  # conftest.py sets HF_HUB_OFFLINE
    dead = pushed(folder, HF_HUB_OFFLINE="0", HF_TOKEN="x", HF_ENDPOINT="http://127.0.0.1:9")
    no_token = (401, {"error": "Invalid username or password."})
    with hub_on_loopback({"": no_token}) as (address, _):
        refused = pushed(folder, HF_HUB_OFFLINE="0", HF_TOKEN="x", HF_ENDPOINT=address)
    (folder / "README.md").write_text("---\nlicense: mine\n---\n")
    mistake = (400, {"errors": [{"message": "license must be one of a list"}]})
    with hub_on_loopback({"/validate-yaml": mistake}) as (address, sent):
        odd_card = pushed(folder, HF_HUB_OFFLINE="0", HF_TOKEN="x", HF_ENDPOINT=address)
    assert not any("/commit/" in path for path in sent)
    (folder / "README.md").unlink()
    with hub_on_loopback({"/commit/main": (200, {"ok": True})}) as (address, _):
        no_hub = pushed(folder, HF_HUB_OFFLINE="0", HF_TOKEN="x", HF_ENDPOINT=address)
    for ended, said in (
        (offline, "HF_HUB_OFFLINE is set"),
        (dead, "The hub at http://127.0.0.1:9 cannot be reached"),
        (refused, "status 401): no token, or not one that may. Log in with `hf auth login`"),
        (odd_card, "license must be one of a list"),
        (no_hub, "whether me/data has the upload is not known"),
    ):
        assert ended.returncode == 3
        assert ended.stderr.startswith("selfsteer: ")
        assert ended.stderr.count("\n") == 1
        assert said in ended.stderr


def test_push_sends_each_file_but_the_hidden_ones(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("data/x.parquet", "data/.x.parquet.partial", ".notes"):
        (folder / name).write_text(f"in {name}")
    with hub_on_loopback({}) as (address, sent):
        ended = pushed(folder, HF_HUB_OFFLINE="0", HF_TOKEN="x", HF_ENDPOINT=address)
    assert ended.returncode == 0, ended.stderr
    assert "2 files are at " in ended.stdout
    assert json.loads(sent["/api/repos/create"])["visibility"] == "public"
    rows = map(json.loads, sent["/api/datasets/me/data/commit/main"].splitlines())
    files = {r["value"]["path"]: r["value"]["content"] for r in rows if r["key"] == "file"}
    assert {name: base64.b64decode(text).decode() for name, text in files.items()} == {
        "README.md": "---\nlicense: mit\n---\n",
        "data/x.parquet": "in data/x.parquet",
    }


def test_a_card_of_an_earlier_round_says_nothing_of_the_last_ones(
    smoke: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = RunView.open(smoke).round(1)
    assert "Differences are paired by query" in model_card(of)
    monkeypatch.setattr(type(of.recipe), "last_round", 2)
    assert "Differences are paired by query" not in model_card(of)
