"""What may be named as a model: folders, hub ids with revisions, adapters, GGUF files."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from selfsteer.data.digests import hub_commit, model_digest, weights_digest
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Message
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.models import adapters, save
from selfsteer.models.load import (
    check_trainable,
    configured_stops,
    load_chat,
    load_model,
    load_reward_start,
    serving_notes,
)
from selfsteer.models.merge import merge_adapter
from selfsteer.models.save import add_lora, save_model, save_tokenizer
from selfsteer.models.sources import check_source, checkpoint, folder_of, pretrained
from selfsteer.recipe.sections import Loading, Lora
from selfsteer.run.execute import pinned
from tests.make import make_adapter, make_checkpoint, make_gguf, recipe, write_jsonl

CPU = Loading(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def with_weights(folder: Path, copy: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def told(text: str, *parts: str) -> None:
    assert [p for p in parts if p not in text] == [], text


# -- weights -----------------------------------------------------------------------------------


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.pop(DOWN), ["lacks the weights " + DOWN, "start at random"]),
        (lambda w: w.update(extra=torch.ones(2)), ["holds the weights extra", "no place"]),
        (
            lambda w: w.update({DOWN: torch.ones(3, 3)}),
            [DOWN + " ([3, 3], not [32, 48])", "another shape"],
        ),
        (
            lambda w: w[DOWN].view(-1)[5:7].fill_(float("nan")),
            ["2 of the 1,536 weights in " + DOWN],
        ),
        (lambda w: w[DOWN].view(-1)[0].fill_(float("-inf")), ["1 of the 1,536 weights in " + DOWN]),
    ],
    ids=["missing", "left over", "shape", "nan", "inf"],
)
def test_weights_that_are_not_those_of_the_model_are_named(
    checkpoints: dict[str, Path], tmp_path: Path, change: Any, parts: list[str]
) -> None:
    broken = with_weights(checkpoints["llama"], tmp_path / "broken", change)
    with pytest.raises(ArtifactError) as e:
        load_model(str(broken), CPU)
    told(str(e.value), str(broken), *parts)


def test_a_tied_head_is_not_missing_and_large_weights_are_finite(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    large = with_weights(tied, tmp_path / "large", lambda w: w[DOWN].fill_(3e38))
    assert load_model(str(large), CPU).model.get_output_embeddings() is not None


def test_only_the_head_of_a_reward_model_may_start_at_random(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    load_reward_start(str(checkpoints["llama"]), CPU, 0)
    broken = with_weights(checkpoints["llama"], tmp_path / "broken", lambda w: w.pop(DOWN))
    with pytest.raises(ArtifactError, match=f"lacks the weights {DOWN}"):
        load_reward_start(str(broken), CPU, 0)


# -- what names nothing ------------------------------------------------------------------------


def test_what_cannot_be_a_model_says_why(tmp_path: Path) -> None:
    (tmp_path / "plain.bin").write_bytes(b"weights")
    for source, part in (
        (str(tmp_path), "neither config.json nor adapter_config.json"),
        (str(tmp_path / "plain.bin"), "not in GGUF format"),
        ("./no/such", "There is no model folder"),
        ("model.gguf", "There is no file"),
        ("org/name@", "There is no model folder"),
        ("/".join(["a" * 300] * 2), "too long"),
    ):
        with pytest.raises(ArtifactError, match=part):
            check_source(source)


# -- the hub -----------------------------------------------------------------------------------

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """The cache of a hub whose org/name has two commits; called with one, main moves there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--name"
    shutil.copytree(checkpoints["llama"], repo / "snapshots" / FIRST)
    shutil.copytree(checkpoints["qwen2"], repo / "snapshots" / SECOND)
    (repo / "refs").mkdir()

    def move(commit: str) -> None:
        (repo / "refs" / "main").write_text(commit)
        (repo / "refs" / "v1").write_text(FIRST)
        hub_commit.cache_clear()

    move(FIRST)
    return move


def test_adapters_on_a_model_of_the_hub_stay_with_its_commit(
    hub: Callable[[str], None], tmp_path: Path
) -> None:
    loaded = load_model("org/name", CPU)
    model = add_lora(loaded.model, Lora(rank=2), source="org/name")
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_()
    save_model(model, loaded.chat, tmp_path / "m", torch.float32)
    adapter = tmp_path / "m/adapter"
    hub(SECOND)
    assert merge_adapter(adapter, tmp_path / "merged", CPU, None) == f"org/name@{FIRST}"
    for file in ("model.safetensors", "config.json"):
        merged = (tmp_path / "merged" / file).read_bytes()
        assert merged == (tmp_path / "m" / file).read_bytes()
    for other in ("org/name", f"org/name@{SECOND}"):
        with pytest.raises(ConfigError, match="trained on other weights"):
            merge_adapter(adapter, tmp_path / "wrong", CPU, other)


def test_a_revision_reaches_weights_config_and_tokenizer(hub: Callable[[str], None]) -> None:
    hub(SECOND)
    assert load_model("org/name", CPU).model.config.model_type == "qwen2"
    loaded = load_model("org/name@v1", CPU)
    assert loaded.model.config.model_type == "llama"
    assert loaded.chat.tokenizer.bos_token == "<|begin_of_text|>"
    assert folder_of("org/name@v1", CPU).endswith(FIRST)
    with pytest.raises(ArtifactError, match="org/name@v2 cannot be loaded"):
        load_chat("org/name@v2", CPU)


def test_a_moved_revision_is_another_model(hub: Callable[[str], None]) -> None:
    before = model_digest("org/name")
    assert before == model_digest("org/name@main") == model_digest(f"org/name@{FIRST}")
    hub(SECOND)
    assert model_digest("org/name") == model_digest(f"org/name@{SECOND}") != before
    assert model_digest("org/name@v1") == before
    assert model_digest("org/unknown") != model_digest("org/unknown@v1")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        ("GatedRepoError", ["terms at https://huggingface.co/org/x", "hf auth login"]),
        ("RepositoryNotFoundError", ["https://huggingface.co/org/x", "private", "hf auth login"]),
        ("RevisionNotFoundError", ["no revision v9", "https://huggingface.co/org/x/commits"]),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(error: str, parts: list[str]) -> None:
    import httpx2
    from huggingface_hub import errors

    class Hub:
        @staticmethod
        def from_pretrained(name: str, **more: Any) -> None:
            request = httpx2.Request("GET", "https://huggingface.co/org/x")
            cause = getattr(errors, error)("401", response=httpx2.Response(401, request=request))
            raise OSError("You are trying to access a gated repo.\nMore.") from cause

    with pytest.raises(ArtifactError) as e:
        pretrained(Hub, "config", "org/x@v9", CPU)
    told(str(e.value), "The config org/x@v9 cannot be loaded", *parts)


@pytest.mark.parametrize("error", ["RepositoryNotFoundError", "RevisionNotFoundError"])
def test_what_is_not_on_the_hub_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    import httpx2
    from huggingface_hub import errors

    def download(*args: Any, **more: Any) -> None:
        request = httpx2.Request("GET", "https://huggingface.co/org/x")
        raise getattr(errors, error)("404", response=httpx2.Response(404, request=request))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    with pytest.raises(ArtifactError, match="The model org/x@v9 cannot be loaded"):
        checkpoint("org/x@v9", CPU)


# -- adapters ----------------------------------------------------------------------------------


def test_adapters_are_a_policy_on_their_base(
    checkpoints: dict[str, Path], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = "MINE {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama"], mine)
    before = model_digest(str(adapter))
    loaded, base = load_model(str(adapter), CPU), load_model(str(checkpoints["llama"]), CPU)
    assert loaded.chat.tokenizer.chat_template == mine
    assert loaded.source == str(adapter)
    changed = [
        name
        for (name, a), b in zip(
            loaded.model.named_parameters(), base.model.parameters(), strict=True
        )
        if not torch.equal(a, b)
    ]
    assert [name.rpartition("self_attn.")[2] for name in changed] == ["q_proj.weight"] * 2
    (made,) = (cache / "models").glob("*/source.json")
    assert json.loads(made.read_text())["base"] == str(checkpoints["llama"])
    load_model(str(adapter), CPU)
    assert capsys.readouterr().err.count("adding the adapters") == 1
    assert model_digest(str(adapter)) == before != model_digest(str(checkpoints["llama"]))


def test_adapters_know_a_base_that_is_another_by_now(
    checkpoints: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    """Their config names a path, which may be relative to where they were trained."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints["llama"], base)
    adapter = make_adapter(tmp_path / "adapter", base)
    save._note_base(adapter, str(base))
    merge_adapter(adapter, tmp_path / "one", CPU, None)
    (base / "README.md").write_text("what is beside the weights may change")
    merge_adapter(adapter, tmp_path / "two", CPU, None)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for use in (
        lambda: merge_adapter(adapter, tmp_path / "three", CPU, None),
        lambda: load_model(str(adapter), CPU),
    ):
        with pytest.raises(ArtifactError, match=r"on other weights than .*merge --base MODEL"):
            use()
    with pytest.raises(ConfigError, match=r"on other weights than .*--other-weights"):
        merge_adapter(adapter, tmp_path / "three", CPU, str(base))
    assert not (tmp_path / "three").exists()
    merge_adapter(adapter, tmp_path / "three", CPU, str(base), other_weights=True)
    merge_adapter(adapter, tmp_path / "four", CPU, str(checkpoints["llama"]))


def test_the_base_of_a_round_is_named_wherever_its_run_is(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """That of round K is the policy of the round before, that of the first the recipe's model."""
    start, run = checkpoints["llama"], tmp_path / "my runs" / "run"
    write_jsonl(run / "resolved.json", {"policy": {"model": str(start)}})
    policies = [run / f"iteration-{k}" / "policy" for k in (1, 2)]
    for policy in policies:
        shutil.copytree(checkpoints["llama"], policy)
    weights = load_file(policies[0] / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, policies[0] / "model.safetensors", {"format": "pt"})
    for base, policy in zip([start, policies[0]], policies, strict=True):
        save._note_base(make_adapter(policy / "adapter", base), str(base))
    moved = run.rename(tmp_path / "my runs" / "moved")
    first, second = (moved / f"iteration-{k}" / "policy" for k in (1, 2))
    right = re.escape(f"selfsteer merge --base '{first}'")
    with pytest.raises(ArtifactError, match=rf"There is no model folder .*{right}"):
        merge_adapter(second / "adapter", tmp_path / "out", CPU, None)
    with pytest.raises(ConfigError, match=right):
        merge_adapter(second / "adapter", tmp_path / "out", CPU, str(start))
    with pytest.raises(ConfigError, match=re.escape(f"selfsteer merge --base {start}.")):
        merge_adapter(first / "adapter", tmp_path / "out", CPU, str(first))
    merge_adapter(second / "adapter", tmp_path / "out", CPU, str(first))


def test_merging_keeps_the_adapters_template_and_the_base_may_have_none(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    bare = shutil.copytree(checkpoints["llama"], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    plain = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    adapter = make_adapter(tmp_path / "adapter", bare, plain)
    merge_adapter(adapter, tmp_path / "merged", CPU, None)
    kept = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert kept == plain
    own = make_adapter(tmp_path / "own", checkpoints["llama"])
    merge_adapter(own, tmp_path / "second", CPU, None)
    ours = AutoTokenizer.from_pretrained(checkpoints["llama"]).chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "second").chat_template == ours


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", x) for x in ("abc", 4.5, -1, True)),
        *(("target_modules", x) for x in ([1], {"a": 1}, 5, "(", "(.*)*(.*)*(.*)*(.*)*(.*)*X")),
        ("exclude_modules", "(a"),
        ("lora_alpha", "x"),
        ("lora_dropout", "x"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"(.*)*(.*)*(.*)*(.*)*(.*)*X": 2}),
        ("layers_to_transform", "x"),
        ("modules_to_save", [5]),
        *(("base_model_name_or_path", x) for x in ({"a": 1}, 5)),
        ("revision", 5),
        ("loftq_config", "x"),
        ("init_lora_weights", [1]),
    ],
)
def test_a_config_of_adapters_that_peft_did_not_write_is_refused(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: Any,
) -> None:
    monkeypatch.setattr(adapters, "MATCH_S", 1.0)
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ArtifactError, match=r"adapter(_config\.json|s in)"):
        merge_adapter(adapter, tmp_path / "merged", CPU, None)
    with pytest.raises(ArtifactError, match=r"adapter(_config\.json|s in)"):
        load_chat(str(adapter), CPU)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "5", "{"])
def test_a_config_of_adapters_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    for use in (lambda: merge_adapter(tmp_path, tmp_path / "out", CPU, None),
                lambda: load_chat(str(tmp_path), CPU)):  # fmt: skip
        with pytest.raises(ArtifactError, match=r"adapter_config\.json is damaged"):
            use()


def test_adapters_that_are_not_safetensors_need_permission(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama"])
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    for use in (lambda: merge_adapter(adapter, tmp_path / "out", CPU, None),
                lambda: load_chat(str(adapter), CPU)):  # fmt: skip
        with pytest.raises(ArtifactError, match=r"adapter_model\.bin could run code.*allow_pickle"):
            use()
    allowed = CPU.model_copy(update={"allow_pickle": True})
    assert merge_adapter(adapter, tmp_path / "out", allowed, None) == str(checkpoints["llama"])


def test_attention_code_of_the_hub_needs_permission(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for name in ("attn_implementation", "_attn_implementation"):
        (model / "config.json").write_text(json.dumps({**config, name: "org/kernel@main"}))
        with pytest.raises(
            ArtifactError, match=r"org/kernel.*code from the hub.*trust_remote_code"
        ):
            load_model(str(model), CPU)
        (model / "config.json").write_text(json.dumps({**config, name: "eager"}))
        assert load_model(str(model), CPU).model.config._attn_implementation == "eager"


def altered(model: Path, file: str, change: Callable[[Any], Any]) -> str:
    """A copy of a checkpoint, one JSON file of which holds something else."""
    copy = shutil.copytree(model, model.with_name("altered"), dirs_exist_ok=True)
    held = json.loads((model / file).read_text())
    (copy / file).write_text(json.dumps(change(held)))
    return str(copy)


@pytest.mark.parametrize("ends", ["x", 10**30, [1, "x"], [-1], 1.5, {"a": 1}])
def test_ends_of_answers_that_are_no_tokens_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, ends: Any
) -> None:
    llama = shutil.copytree(checkpoints["llama"], tmp_path / "llama")
    model = altered(llama, "generation_config.json", lambda held: {**held, "eos_token_id": ends})
    with pytest.raises(ArtifactError, match="eos_token_id"):
        TransformersEngine(load_model(model, CPU))
    with pytest.raises(ArtifactError, match="eos_token_id"):
        configured_stops(model, CPU)


def test_what_others_generate_by_is_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    llama = shutil.copytree(checkpoints["llama"], tmp_path / "llama")
    assert serving_notes(str(llama), CPU) == []
    own = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 0, "top_k": 20, "do_sample": True}
    model = altered(llama, "generation_config.json", lambda held: {**held, **own})
    (note,) = serving_notes(model, CPU)
    assert "has repetition_penalty: 1.3 in its generation_config.json" in note
    (llama / "generation_config.json").unlink()
    assert serving_notes(str(llama), CPU) == []


def test_attention_that_is_no_name_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    llama = shutil.copytree(checkpoints["llama"], tmp_path / "llama")
    model = altered(llama, "config.json", lambda held: {**held, "attn_implementation": 5})
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(model, CPU)


def test_a_tokenizer_that_draws_lots_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    llama = shutil.copytree(checkpoints["llama"], tmp_path / "llama")
    for dropout, said in (
        (0.1, pytest.raises(ArtifactError, match=r"dropout of 0\.1")),
        (None, None),
    ):

        def change(held: Any, dropout: Any = dropout) -> Any:
            return {**held, "model": {**held["model"], "dropout": dropout}}

        model = altered(llama, "tokenizer.json", change)
        with said or nullcontext():
            load_chat(model, CPU)


#: The package that fetches code from the hub for transformers; it notes what it is asked for.
KERNELS = """
import pathlib

def get_kernel(name, *args, **more):
    with open(pathlib.Path(__file__).with_name("asked"), "a") as file:
        file.write(name + "\\n")
    raise FileNotFoundError(name)

def use_kernel_forward_from_hub(*args, **more):
    return lambda made: made

use_kernelized_func = use_kernel_forward_from_hub

class Nothing:
    def __call__(self, *args, **more): return self
    def __getattr__(self, name): return self
    def __or__(self, other): return self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Nothing()
"""

LOADS = """
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
from transformers.utils import is_kernels_available
from selfsteer.errors import ArtifactError
from selfsteer.models.load import load_model
from selfsteer.recipe.sections import Loading

assert is_kernels_available()
model, asked = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
config = json.loads((model / "config.json").read_text())
for more in json.loads(sys.argv[3]):
    (model / "config.json").write_text(json.dumps({**config, **more}))
    for trust in (False, True):
        said = "loaded"
        try:
            load_model(str(model), Loading(device="cpu", dtype="float32", trust_remote_code=trust))
        except ArtifactError as e:
            said = str(e)
        print(json.dumps([trust, said, asked.read_text().split() if asked.exists() else []]))
        asked.unlink(missing_ok=True)
"""


def test_no_config_has_code_fetched_where_the_package_kernels_is_there(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    write_atomic(tmp_path / "lib" / "kernels" / "__init__.py", KERNELS)
    about = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    write_atomic(tmp_path / "lib" / "kernels-0.18.2.dist-info" / "METADATA", about)
    configs: list[dict[str, Any]] = [
        {},
        {"attn_implementation": "sdpa"},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
        {"attn_implementation": "paged|flash_attention_2"},
        {"attn_implementation": {"": "flash_attention_2"}},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"_attn_implementation": "org/kernel@main:attend"},
        {"per_layer_config": {"0": {"_attn_implementation": "flash_attention_2"}}},
        {"per_layer_config": {"1": {"_attn_implementation_internal": "org/kernel"}}},
        {"experts_implementation": "sonicmoe"},
    ]
    asked = tmp_path / "lib" / "kernels" / "asked"
    ran = subprocess.run(
        [sys.executable, "-c", LOADS, str(model), str(asked), json.dumps(configs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "lib"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    told = [(said, fetched) for trust, said, fetched in rows if not trust]
    assert [fetched for _, fetched in told] == [[]] * len(configs)
    assert [said for said, _ in told[:2]] == ["loaded"] * 2
    for said, _ in told[2:]:
        assert "code from the hub" in said
        assert "trust_remote_code: true" in said
    fetched = {name for trust, _, names in rows if trust for name in names}
    assert {"kernels-community/flash-attn2", "org/kernel"} <= fetched, "with permission, it is"


def test_merging_removes_nothing_that_is_there(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama"])
    for name in ("out", "out.partial"):
        write_atomic(tmp_path / name / "mine.txt", "kept")
    with pytest.raises(ConfigError, match=r"out is there already"):
        merge_adapter(adapter, tmp_path / "out", CPU, None)
    shutil.rmtree(tmp_path / "out")
    write_atomic(tmp_path / ".out.partial" / "model.safetensors", "left by a kill")
    merge_adapter(adapter, tmp_path / "out", CPU, None)
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "kept"


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of what these tests are about
def test_adapters_that_cannot_be_added_say_what_helps(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    gone = shutil.copytree(checkpoints["llama"], tmp_path / "gone")
    adapter = make_adapter(tmp_path / "adapter", gone)
    shutil.rmtree(gone)
    with pytest.raises(ArtifactError, match=r"base of the adapters .*gone.* merge --base MODEL"):
        load_chat(str(adapter), CPU)
    tied = make_checkpoint(tmp_path / "tied", "llama", tie_word_embeddings=True)
    twice = make_adapter(tmp_path / "twice", tied, target_modules=["embed_tokens"])
    with pytest.raises(ArtifactError, match="tie_word_embeddings: false"):
        merge_adapter(twice, tmp_path / "merged", CPU, None)
    larger = make_checkpoint(tmp_path / "larger", "llama", vocab_size=640)
    resized = make_adapter(tmp_path / "resized", larger, modules_to_save=["embed_tokens"])
    with pytest.raises(ArtifactError, match="resize_token_embeddings"):
        merge_adapter(resized, tmp_path / "merged", CPU, str(checkpoints["llama"]))
    wide = make_adapter(tmp_path / "wide", checkpoints["llama"], r=4)
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(ArtifactError, match=r"another model than .*, which --base names"):
        merge_adapter(wide, tmp_path / "merged", CPU, str(checkpoints["llama"]))
    with pytest.raises(ArtifactError, match=r"trained on: selfsteer merge --base MODEL"):
        merge_adapter(wide, tmp_path / "merged", CPU, None)


# -- GGUF --------------------------------------------------------------------------------------


def test_a_gguf_file_is_a_policy(
    checkpoints: dict[str, Path], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = checkpoints["llama"]
    beside = shutil.copytree(checkpoints["qwen2"], tmp_path / "downloads")  # of another model
    file = make_gguf(beside / "tiny.gguf", llama)
    loaded, exact = load_model(str(file), CPU), load_model(str(llama), CPU)
    assert capsys.readouterr().err.count("dequantising, once") == 1
    for (name, a), b in zip(loaded.model.named_parameters(), exact.model.parameters(), strict=True):
        assert torch.equal(a, b) != ("up_proj" in name)
        torch.testing.assert_close(a, b, atol=0.08, rtol=0)
    text = "<|start_header_id|>What does the bee eat?<|eot_id|>"
    ids = exact.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded.chat.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.chat.end_of_turn == exact.chat.end_of_turn
    (made,) = (cache / "models").glob("*/source.json")
    origin = json.loads(made.read_text())
    assert origin["source"] == str(file)
    assert origin["tensors"] == {"F32": 19, "Q4_1": 2}
    moved = file.rename(tmp_path / "moved.gguf")
    assert checkpoint(str(moved), CPU) == str(made.parent)


def test_a_gguf_file_that_there_is_no_room_for_says_so_and_leaves_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    file = make_gguf(tmp_path / "tiny.gguf", checkpoints["llama"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ArtifactError, match="could not be written"):
            load_chat(str(file), CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p for p in (cache / "models").iterdir() if p.suffix != ".lock"] == []
    assert load_chat(str(file), CPU)


def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ArtifactError, match=r"damaged\.gguf cannot be loaded"):
        load_chat(str(tmp_path / "damaged.gguf"), CPU)
    assert not [p for p in (cache / "models").iterdir() if p.is_dir()]


@pytest.mark.real
def test_smollm2_as_gguf_answers(smollm2: Path) -> None:
    loaded = load_model(str(smollm2), CPU)
    assert loaded.chat.tokenizer.convert_ids_to_tokens(loaded.chat.end_of_turn) == "<|im_end|>"
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.chat.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in loaded.chat.tokenizer.decode(said[0][ids["input_ids"].shape[1] :])


# -- quantised checkpoints ---------------------------------------------------------------------


def quantised(folder: Path, copy: Path, **config: Any) -> Path:
    shutil.copytree(folder, copy)
    found = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**found, "quantization_config": config}))
    return copy


def test_other_quantised_formats_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    fp8 = quantised(checkpoints["llama"], tmp_path / "fp8", quant_method="fp8")
    for read in (lambda: load_model(str(fp8), CPU), lambda: check_trainable(str(fp8), CPU, Lora())):
        with pytest.raises(ArtifactError, match="quantised as fp8"):
            read()


def test_quantised_formats_say_what_they_need(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_old = quantised(checkpoints["llama"], tmp_path / "bnb", load_in_4bit=True)
    gptq = quantised(checkpoints["llama"], tmp_path / "gptq", quant_method="gptq", bits=4)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        load_model(str(of_old), CPU)
    monkeypatch.setattr("selfsteer.models.sources.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="gptq, which needs a GPU"):
        load_model(str(gptq), CPU)
    monkeypatch.setattr("selfsteer.models.load.resolve_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"only adapters .*policy\.lora\.rank"):
        check_trainable(str(gptq), CPU, None)
    with pytest.raises(ConfigError, match="bits has no effect"):
        check_trainable(str(gptq), CPU, Lora(bits=4))
    check_trainable(str(gptq), CPU, Lora())


# -- tokenizers --------------------------------------------------------------------------------


def test_a_tokenizer_is_saved_as_all_versions_read_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    save_tokenizer(tokenizer, tmp_path)
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in stored
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_ids == tokenizer.all_special_ids


OLD = """
import json, sys
from transformers import AutoTokenizer
asked = [{"role": "user", "content": "What does the bee eat?"}]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps(tokenizer.apply_chat_template(asked, add_generation_prompt=True)))
"""


@pytest.mark.slow
def test_transformers_4_reads_a_saved_tokenizer(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """In an environment of its own, without torch; needs a package index."""
    python = tmp_path / "old" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "old"], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "transformers==4.57.6", "jinja2"], check=True
    )
    for name in ("llama", "gemma"):
        chat = load_chat(str(checkpoints[name]), CPU)
        save_tokenizer(chat.tokenizer, tmp_path / name)
        said = subprocess.run(
            [python, "-c", OLD, tmp_path / name], capture_output=True, text=True, check=True
        )
        assert json.loads(said.stdout) == list(
            chat.prompt_ids((Message("user", "What does the bee eat?"),))
        )


# -- runs --------------------------------------------------------------------------------------


def test_a_run_keeps_the_commits_that_it_began_with(
    hub: Callable[[str], None], tmp_path: Path
) -> None:
    asked = write_jsonl(tmp_path / "q.jsonl", {"prompt": "What does the bee eat?"})
    made = recipe(
        queries={"path": str(asked)},
        runs_dir=str(tmp_path),
        policy={"model": "org/name"},
        judge={"kind": "chat", "model": "org/name@v1"},
        principles={"writer": {"kind": "openai", "base_url": "http://h/v1", "model": "org/name"}},
    )
    pinned_recipe, commits = pinned(made)
    assert commits == {"org/name": FIRST, "org/name@v1": FIRST}
    assert pinned_recipe.policy.model == pinned_recipe.judge.model == f"org/name@{FIRST}"
    assert pinned_recipe.principles.writer.model == "org/name"  # what its server calls it
    before = [stage.fingerprint for stage in made.plan()]
    assert [stage.fingerprint for stage in pinned_recipe.plan()] == before
    made.folder.mkdir()
    (made.folder / "models.json").write_text(json.dumps(commits))
    hub(SECOND)
    assert [stage.fingerprint for stage in pinned(made)[0].plan()] == before
    assert [stage.fingerprint for stage in made.plan()] != before
    assert pinned(made.model_copy(update={"name": "new"}))[1]["org/name"] == SECOND
    (made.folder / "models.json").write_text("null")
    with pytest.raises(ArtifactError, match=r"models\.json is damaged"):
        pinned(made)


def test_weights_are_those_that_are_loaded(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    before = weights_digest(str(tmp_path))
    (tmp_path / "consolidated.safetensors").write_text("in another form")
    assert weights_digest(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_text("others")
    assert weights_digest(str(tmp_path)) != before
