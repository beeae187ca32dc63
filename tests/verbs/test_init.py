"""``selfsteer init``: what is looked at, what is advised, and that it never waits for an answer."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsteer.errors import ArtifactError, ConfigError, DataError
from selfsteer.methods import recipe_of
from selfsteer.recipe.read import recipe_names
from selfsteer.verbs import advice, init, previewing
from selfsteer.verbs.advice import GB, Goal, Hardware, Model, Prompts, Wishes
from tests.e2e.support import Here, environment, fails
from tests.fakes import FakeEngine, answer_with
from tests.make import write_jsonl

CPU, GPU = Hardware(2, 8), Hardware(16, 128, (80.0,))
SMALL, LARGE = Model("org/m-135M", 135_000_000, True), Model("org/m-8B", 8_030_000_000, True)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


def prompts(count: int = 1000, **more: Any) -> Prompts:
    given: dict[str, Any] = {
        "shortest": 20,
        "median": 50,
        "long": 100,
        "longest": 400,
        "dropped": {},
        "near": 3,
    }
    given |= {"answers": 0, "script": "Latin", "english": True}
    return Prompts(count, **(given | more))


def made(w: Wishes, recipe: str | None = None) -> Any:
    """The recipe that is written, checked and complete."""
    text, blank = init.written("mine", w, recipe)
    assert blank == []
    assert text.startswith(f"# yaml-language-server: $schema={init.SCHEMA}\n")
    return recipe_of(yaml.safe_load(text), "recipe")


GOALS = {
    "quality": "contrast",
    "style": "sso",
    "style:support-desk": "sso",
    "constitution:careful-assistant": "contrast",
    "answers": "spin",
    "judge:chat:org/judge": "best-of-n",
    "reward:org/reward": "best-of-n",
}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("machine", [CPU, GPU, None], ids=["cpu", "gpu", "unknown"])
@pytest.mark.parametrize("model", [SMALL, LARGE, Model("org/m")], ids=["small", "large", "unknown"])
def test_what_is_written_is_a_recipe(goal: str, machine: Hardware | None, model: Model) -> None:
    w = Wishes(model, "p.jsonl", prompts(answers=1000), machine, Goal.read(goal))
    recipe = made(w)
    assert recipe.method == GOALS[goal]
    assert recipe.plan()
    assert recipe.name == "mine"


@pytest.mark.parametrize("name", recipe_names())
def test_any_shipped_recipe_can_be_the_start(name: str) -> None:
    queries = None if name == "reward" else "p.jsonl"
    text, blank = init.written("mine", Wishes(LARGE, queries, prompts(), GPU), name)
    if not blank:
        recipe_of(yaml.safe_load(text), "recipe")
    assert set(blank) <= {"reward.data", "ranking.judge.model", "judge.model"}


@pytest.mark.parametrize(
    ("recipe", "goal", "more", "option"),
    [
        ("reward", "quality", {}, "--prompts, --held-out"),
        ("spin", "style", {"held_out": None}, "--goal style"),
        ("contrast", "quality", {"pairs": True}, "--pairs"),
    ],
)
def test_an_option_without_effect_is_refused(
    recipe: str, goal: str, more: dict[str, Any], option: str
) -> None:
    held_out = more.pop("held_out", "p")
    w = Wishes(SMALL, "p", None, CPU, Goal.read(goal), **more)
    with pytest.raises(ConfigError, match=f"^{option} would have no effect"):
        init.written("mine", w, recipe, held_out)


def test_a_policy_that_learns_the_mean_of_all_queries_is_asked_for_the_whole_style() -> None:
    def features(recipe: str | None, goal: str) -> int:
        w = Wishes(SMALL, "p.jsonl", prompts(), CPU, Goal.read(goal))
        text, _ = init.written("mine", w, recipe)
        return int(yaml.safe_load(text)["principles"]["features_per_query"])

    assert features("contrast", "style") == 4
    assert features(None, "style") == 1  # sso
    assert features("contrast", "quality") == 1


def test_what_no_gpu_has_room_for_is_said_and_ranks_are_in_the_next_step(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = here("init", "b.yaml", "--yes", "--model", "org/m-70B", "--hardware", "24")
    assert "even 4 bits take 41 GB" in ended.err
    assert "so it does not fit" in (tmp_path / "b.yaml").read_text()
    ended = here("init", "a.yaml", "--yes", "--model", "org/m-8B", "--hardware", "4x80")
    assert "not fit" not in ended.err + (tmp_path / "a.yaml").read_text()
    assert "selfsteer run a.yaml --nproc 4 --profile fsdp2  " in ended.out


def test_pairs_come_from_sso_and_without_a_gpu_from_pbaa() -> None:
    assert made(Wishes(LARGE, "p", None, GPU, pairs=True)).method == "sso"
    on_cpu = made(Wishes(SMALL, "p", None, CPU, pairs=True))
    assert on_cpu.method == "pbaa"
    assert on_cpu.sampling.keep_unfinished


def test_settings_fit_the_machine_and_say_why() -> None:
    whole = made(Wishes(SMALL, "p", prompts(), GPU))
    assert whole.policy.lora is None
    assert whole.training.learning_rate == 2e-5
    assert whole.principles.mode == "picked"
    adapters = made(Wishes(LARGE, "p", prompts(60_000), GPU))
    assert adapters.policy.lora.bits is None
    assert adapters.training.learning_rate == 5e-5
    assert adapters.training.batch_size == 128
    assert adapters.principles.mode == "generated"
    assert made(Wishes(LARGE, "p", None, Hardware(8, 64, (24.0,)))).policy.lora.bits == 4
    text, _ = init.written("mine", Wishes(LARGE, "p", None, Hardware(8, 64, (80.0,) * 4)))
    assert "run with --nproc 4 --profile fsdp2" in text
    assert "lora" not in text


def test_few_prompts_make_small_batches_and_many_on_a_cpu_are_limited() -> None:
    few = made(Wishes(SMALL, "p", prompts(152), CPU))
    assert few.training.batch_size == 8
    assert few.queries.limit is None
    assert "1 step per" in init.written("m", Wishes(SMALL, "p", prompts(9), CPU))[0]
    many = made(Wishes(SMALL, "p", prompts(60_000), CPU))
    assert 1000 < many.queries.limit < 10_000


def test_the_answer_budget_follows_from_rules_of_length(tmp_path: Path) -> None:
    def budget(rule: str, machine: Hardware = CPU) -> int:
        rules = {"name": "Brevity", "checks": [{"bullets": {"max": 0}}, yaml.safe_load(rule)]}
        rules |= {"good": "Be brief.", "bad": "Go on.", "good_adjective": "a", "bad_adjective": "b"}
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({"domain": "all", "features": [rules]}))
        wishes = Wishes(SMALL, "p", prompts(64), machine, Goal.read(f"style:{path}"))
        return int(made(wishes).sampling.max_new_tokens)

    assert budget("words: {max: 60}") == 180, "twice the tokens of 60 words"
    assert budget("words: {min: 100, max: 200}") == 600
    assert budget("sentences: {max: 2}") == 150
    assert budget("words: {max: 2}") == 64
    assert budget("words: {max: 2000}") == 2048
    assert budget("match: a") == 256, "no rule of length"
    assert budget("words: {max: 60}", GPU) == 2048


def test_sizes_fit_the_number_of_prompts() -> None:
    assert made(Wishes(SMALL, "p", prompts(64), GPU, pairs=True)).generator.queries == 64
    assert made(Wishes(SMALL, "p", prompts(60_000), GPU, pairs=True)).generator.queries == 8000
    text, _ = init.written("mine", Wishes(SMALL, "p", prompts(60_000), CPU), "sso")
    found = yaml.safe_load(text)
    assert found["generator"]["queries"] == found["queries"]["limit"] < 8000
    assert found["training"]["batch_size"] * 16 <= found["queries"]["limit"]


def test_a_short_context_leaves_room_for_the_prompt() -> None:
    found = made(Wishes(Model("m", 10**6, context=512), "p", prompts(long=800), GPU))
    assert found.sampling.max_new_tokens == 512 - 201 - 100


def test_nothing_is_sized_without_a_model() -> None:
    text, blank = init.written("mine", Wishes(None, None, None))
    assert blank == ["policy.model", "queries.path"]
    values = yaml.safe_load(text)
    assert values["sampling"]["max_new_tokens"] == 2048
    assert "row_tokens" not in text


def test_hardware_is_this_machine_or_what_is_said() -> None:
    assert advice.hardware("auto").cores >= 1
    assert advice.hardware("cpu").gpus == ()
    assert advice.hardware("4x80").gpus == (80.0,) * 4
    assert advice.hardware("24").gpus == (24.0,)
    for text in ("0", "4x", "H100", "00", f"{'9' * 24}x80", f"4x{'9' * 400}"):
        with pytest.raises(ConfigError, match="--hardware takes"):
            advice.hardware(text)


def test_a_model_that_is_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="/dev/zero is a pipe or a device"):
        advice.look_at_model("/dev/zero")


def test_gpus_are_those_that_the_driver_names_and_cuda_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81920\necho 81920\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert advice.hardware("auto").gpus == (80.0, 80.0)
    for visible, count in (("1", 1), ("", 0), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(advice.hardware("auto").gpus) == count
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert advice.hardware("auto").gpus == ()


def test_a_model_is_known_by_its_files_or_its_name(tmp_path: Path) -> None:
    assert advice.look_at_model("org/Llama-3.1-8B-Instruct").parameters == 8_000_000_000
    assert advice.look_at_model("org/SmolLM2-1.7B@main").parameters == 1_700_000_000
    assert advice.look_at_model("org/model").parameters is None
    found = advice.look_at_model("package:selfsteer.testbed/checkpoint")
    assert found.parameters is not None
    assert not found.by_name
    assert 500_000 < found.parameters < 2_000_000
    assert found.context == 512
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    base = {"base_model_name_or_path": "org/base-3B"}
    (adapters / "adapter_config.json").write_text(json.dumps(base))
    assert advice.look_at_model(str(adapters)).parameters == 3_000_000_000
    for name in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError):
            advice.look_at_model(str(name))


BROKEN = {
    "model.safetensors": [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"",
        b"\2" + b"\0" * 7 + b"[]",
    ],
    "config.json": [b"{", b"[]"],
    "adapter_config.json": [b"[]", b"{}", b'{"base_model_name_or_path": "."}'],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in BROKEN.items() for t in texts])
def test_a_model_whose_files_are_not_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(text)
    with pytest.raises((ConfigError, ArtifactError), match=name):
        advice.look_at_model(".")


def test_prompts_are_counted_measured_and_told_by_script(tmp_path: Path) -> None:
    rows = [{"prompt": "Why is the sky blue today over the old town?"}] * 2
    rows += [{"prompt": "Why is the sky blue today over the old town, again?"}]
    rows += [{"prompt": f"What is the capital of country {i}?"} for i in range(4)]
    found = advice.look_at_prompts(str(write_jsonl(tmp_path / "p.jsonl", *rows)))
    assert found is not None
    assert (found.count, found.dropped, found.near) == (6, {"duplicate": 1}, 1)
    assert (found.shortest, found.longest) == (33, 51)
    assert found.english is True
    rows = [{"prompt": f"{'a' * i} Why?"} for i in range(1, 31)]
    found = advice.look_at_prompts(str(write_jsonl(tmp_path / "n.jsonl", *rows)))
    assert found is not None
    assert found.long == 29 + len(" Why?")
    german = [{"prompt": f"Warum ist der Himmel über Stadt {i} so blau?"} for i in range(4)]
    found = advice.look_at_prompts(str(write_jsonl(tmp_path / "de.jsonl", *german)))
    assert found is not None
    assert found.english is False
    russian = [{"prompt": f"Почему небо синее {i}?"} for i in range(4)]
    found = advice.look_at_prompts(str(write_jsonl(tmp_path / "ru.jsonl", *russian)))
    assert found is not None
    assert (found.script, found.english) == ("Cyrillic", None)
    assert advice.look_at_prompts("org/prompts") is None
    assert advice.look_at_prompts("openai/gsm8k-v1.10:main:test@abc") is None
    for name in (tmp_path / "none.jsonl", tmp_path / "none", "two words"):
        with pytest.raises(DataError, match="There is no file"):
            advice.look_at_prompts(str(name))


def test_a_goal_says_what_it_needs() -> None:
    assert Goal.read("style") == Goal("style", "house-style")
    for text in ("best", "judge", "constitution:", "quality:9", "2"):
        with pytest.raises(ConfigError, match="--goal"):
            Goal.read(text)
    for text in ("judge:foo", "style:none", "constitution:none.yaml", "constitution:none.md"):
        with pytest.raises(ConfigError):
            Goal.read(text)


def test_full_training_of_a_small_model_fits_the_memory_that_it_is_said_to_need() -> None:
    need = 135e6 * advice.FULL_CPU * advice.ROOM / GB
    assert made(Wishes(SMALL, "p", None, Hardware(2, need * 1.01))).policy.lora is None
    assert made(Wishes(SMALL, "p", None, Hardware(2, need * 0.99))).policy.lora is not None


# -- the command -----------------------------------------------------------------------------------


def test_without_a_terminal_it_asks_nothing_and_runs_dry(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    model, data = "package:selfsteer.testbed/checkpoint", "package:selfsteer.testbed/queries"
    ended = here("init", "mine.yaml", "--model", model, "--prompts", f"{data}/align.jsonl",
                 "--held-out", f"{data}/tune.jsonl", "--goal", "style")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "prompts of" in ended.err
    assert "selfsteer preview mine.yaml" in ended.out
    assert json.loads((tmp_path / init.SCHEMA).read_text())["title"]
    ended = here("run", "mine.yaml", "--dry-run")
    assert ended.code == 0, ended.err
    assert "evaluation" in ended.out
    fails(here("init", "mine.yaml"), 2, "there already")
    fails(here("init", "b.yaml", "--goal", "answers", "--prompts", f"{data}/align.jsonl"), 2,
          "no answer")  # fmt: skip
    assert not (tmp_path / "b.yaml").exists()


def test_on_a_terminal_it_asks_and_a_wrong_answer_is_asked_again(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "p.jsonl", *({"prompt": f"What is {i}?"} for i in range(20)))
    write_jsonl(tmp_path / "held.jsonl", *({"prompt": f"Why is {i}?"} for i in range(20)))
    monkeypatch.setattr(init, "on_terminal", lambda: True)
    said = [
        "no such model",
        "org/m-8B",
        "none.jsonl",
        "p.jsonl",
        "held.jsonl",
        "²",
        "5",
        "foo",
        "2",
    ]
    said.append("support-desk")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said) + "\n"))
    ended = here("init", "mine.yaml", "--hardware", 80)
    assert ended.code == 0, ended.err
    assert "There is no model 'no such model'" in ended.err
    values = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert values["method"] == "sso"
    assert values["policy"]["model"] == "org/m-8B"
    assert values["queries"]["path"] == "p.jsonl"
    assert values["evaluation"]["queries"]["path"] == "held.jsonl"
    assert values["principles"]["catalogue"] == "support-desk"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n\n\n"))
    ended = here("init", "empty.yaml")
    assert ended.code == 0, ended.err
    assert yaml.safe_load((tmp_path / "empty.yaml").read_text())["policy"]["model"] is None


def test_a_constitution_in_plain_text_becomes_a_catalogue(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.md").write_text("- Be brief.\n")
    fails(here("init", "a.yaml", "--goal", "constitution:rules.md"), 2, "Give --model",
          "selfsteer principles import rules.md")  # fmt: skip
    said = "Bad: Ramble on.\nName: Brevity\nGood adjective: brief\nBad adjective: rambling"
    answer_with(monkeypatch, FakeEngine(lambda request: said))
    model = "package:selfsteer.testbed/checkpoint"
    ended = here("init", "a.yaml", "--goal", "constitution:rules.md", "--model", model)
    assert ended.code == 0, ended.err
    values = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert values["principles"]["catalogue"] == "rules.catalogue.yaml"
    assert values["principles"]["features_per_query"] == 1
    assert "concision" not in values["principles"]


def interrupt(*given: Any, **more: Any) -> str:
    raise KeyboardInterrupt


def test_ctrl_c_advises_no_run_of_a_temporary_folder(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.md").write_text("- Be brief.\n")
    answer_with(monkeypatch, FakeEngine(interrupt))
    model = "package:selfsteer.testbed/checkpoint"
    ended = here("principles", "import", "rules.md", "--model", model, "--to", "c.yaml")
    fails(ended, 130, "finished work is kept, and the same command resumes")
    answer_with(monkeypatch, FakeEngine(lambda request: ("", "prompt_too_long")))
    ended = here("principles", "import", "rules.md", "--model", model, "--to", "d.yaml")
    fails(ended, 2, "a model with a longer context as --model")
    monkeypatch.setattr(previewing, "preview", interrupt)
    fails(here("preview", "smoke"), 130, "nothing is kept")


def test_ctrl_c_at_a_question_is_an_interrupt(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "selfsteer", "init", tmp_path / "a.yaml"],
        stdin=end,
        stdout=end,
        stderr=end,
        env=environment(),
        # a shell that starts something in the background has it ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        os.close(end)
        said = b""
        while b"model to align" not in said:
            said += os.read(terminal, 1024)
        running.send_signal(signal.SIGINT)
        try:
            assert running.wait(30) == 130
        finally:
            running.kill()
        assert b"interrupted" in os.read(terminal, 1024)
    os.close(terminal)


def test_what_is_there_is_left_alone_and_named(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.yaml").symlink_to("nowhere.yaml")
    fails(here("init", "link.yaml"), 2, "is there already")
    Path("rules.md").write_text("- Be brief.\n")
    Path("rules.catalogue.yaml").write_text("features: {}\n")
    model = "package:selfsteer.testbed/checkpoint"
    ended = here("init", "a.yaml", "--goal", "constitution:rules.md", "--model", model)
    fails(ended, 2, "as it is: --goal constitution:rules.catalogue.yaml")
    prompts = "package:selfsteer.testbed/queries/align.jsonl"
    ended = here("init", "b.yaml", "--prompts", prompts, "--held-out", prompts)
    assert ended.code == 0, ended.err
    assert "both trained and evaluated on" in " ".join(ended.err.split())
