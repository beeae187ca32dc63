import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from selfsteer.errors import ConfigError
from selfsteer.methods import METHODS, load_recipe, recipe_of
from selfsteer.methods.sso import SSO
from selfsteer.objectives import BASES, OBJECTIVES, Objective, steering_loss
from selfsteer.principles.catalogue import catalogue_of
from selfsteer.recipe.read import (
    commented_yaml,
    descriptions,
    known_keys,
    load_values,
    merge,
    method_of,
    read_yaml,
    recipe_names,
    validate,
)
from selfsteer.recipe.sections import (
    Loading,
    PrinciplesConfig,
    Section,
    TrainConfig,
    resolve_path,
    unused_arguments,
)
from tests.make import recipe

MINIMAL: dict[str, Any] = {
    "name": "n",
    "policy": {"model": "m"},
    "queries": {"path": "q.jsonl"},
}


def test_defaults_are_the_papers() -> None:
    made = recipe()
    assert (made.sampling.temperature, made.sampling.top_p) == (0.7, 0.8)
    assert made.sampling.max_new_tokens == 2048
    assert made.generator.model_dump(include={"queries", "gamma", "batch_size", "beta"}) == {
        "queries": 8000,
        "gamma": 0.1,
        "batch_size": 32,
        "beta": 0.1,
    }
    assert (made.training.batch_size, made.training.learning_rate) == (256, 5e-7)
    assert (made.training.adam_beta2, made.training.weight_decay, made.training.warmup) == (
        0.95,
        0.1,
        0.1,
    )
    assert made.principles.features_per_query == 2
    assert catalogue_of(made.principles).appended == {"Concision": 0.2}


def test_overrides_nest_keep_types_and_null_means_default() -> None:
    values = merge(
        {**MINIMAL, "baseline": "pbaa", "training": {"beta": 0.3}},
        ["training.learning_rate=5e-7", "name=7", "baseline=null", "training.beta=null", "seed=3"],
    )
    made: Any = recipe_of(values, "recipe")
    assert made.training.learning_rate == 5e-7
    assert made.name == "7"
    assert made.baseline is None
    assert made.training.beta == 0.1
    assert made.seed == 3


def test_an_override_does_not_touch_the_given_mapping() -> None:
    given = {"policy": {"model": "a"}}
    merge(given, ["policy.model=b", "policy.device=cpu"])
    assert given == {"policy": {"model": "a"}}


def test_overrides_that_cannot_be_applied() -> None:
    with pytest.raises(ConfigError, match="seed is a plain value"):
        merge({"seed": 1}, ["seed.x=2"])
    with pytest.raises(ConfigError, match="key=value"):
        merge({}, ["seed"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"name": "../x"}, "plain folder name"),
        ({"sampling": {"max_new_tokens": 4096}}, "longer than max_length 2048"),
        ({"generator": {"per_half": True, "objective": "sso-plus-only"}}, "per_half"),
        ({"queries": {"path": "q", "per_iteration": 3}}, "a setting of sso-online)"),
        ({"generator": {"simpo_margin": 0.1}}, "generator.simpo_margin has no effect"),
        ({"method": "sso-online", "training": {"use_weight": False, "alpha": 0.5}}, "alpha"),
        (
            {
                "principles": {"features": "none", "written_from": "query"},
                "hygiene": {"export_unsafe": False},
            },
            "recognises pairs about Safety by their features",
        ),
        ({"method": "best-of-n"}, "needs a judge that ranks: set ranking.judge or judge"),
        ({"method": "best-of-n", "judge": "human:x"}, "human labels cannot rank answers"),
        ({"method": "best-of-n", "ranking": {"judge": "human:x"}}, "human labels cannot rank"),
        ({"method": "best-of-n", "ranking": {"samples": 1, "judge": "oracle"}}, "equal to 2"),
        (
            {"method": "best-of-n", "ranking": {"judge": "oracle", "order": "climb"}},
            "climb is for judges that only compare",
        ),
        ({"method": "best-of-n-principles", "ranking": {"order": "climb"}}, "order"),
        ({"method": "self-rewarding", "sampling": {"temperature": 0}}, "there is only one"),
        ({"method": "self-rewarding", "sampling": {"keep_unfinished": True}}, "ranks finished"),
        ({"method": "sso-online", "training": {"weighting": "wpo"}}, "training.weighting has no"),
        (
            {"training": {"base": "simpo", "budget": {"slack": 0}}},
            "training.budget has no effect with objective pbaa and base simpo",
        ),
        (
            {"method": "spin", "training": {"weighting": "dora"}},
            "method spin trains on answers that are written without one; use wpo",
        ),
        (
            {"method": "bad-to-plain", "training": {"weighting": "dora"}},
            "method bad-to-plain trains on answers that are written without one",
        ),
        ({"training": {"base": "orpo", "reference": "first"}}, "training.reference has no effect"),
        ({"training": {"noise": 1, "base": "ipo"}}, "training.noise has no effect"),
        ({"training": {"noise": 1, "reference": "first"}}, "noise is on the iteration's start"),
        ({"method": "dlma", "training": {"base": "ipo"}}, "needs training.base sigmoid or hinge"),
        ({"training": {"base": "ipo", "ceiling": 2}}, "training.ceiling has no effect"),
        (
            {"method": "good-over-plain", "training": {"base": "ipo", "label_smoothing": 0.1}},
            "training.label_smoothing has no effect",
        ),
        ({"sampling": {"contrast": 1e308}}, "contrast: input should be less than or equal to 100"),
        (
            {"sampling": {"contrast_bad": -0.5, "engine": "vllm"}},
            "sampling.contrast_bad reads the logits of two contexts",
        ),
        ({"iterations": 10**9}, "iterations: input should be less than or equal to 1000"),
        ({"iterations": 0}, "iterations: input should be greater than or equal to 1, found 0"),
    ],
)
def test_recipes_that_cannot_be_honoured(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        recipe(**more)


def test_all_faults_come_in_one_paragraph() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(sede=1, training={"beta": 0})
    text = str(caught.value)
    assert "'sede' (did you mean 'seed'?)" in text
    assert "training.beta" in text
    assert "\n" not in text


def test_a_fault_says_what_would_do() -> None:
    given: dict[str, Any] = {"engine": "vllm", "training": {"budget": 3}, "judge": "reward"}
    with pytest.raises(ConfigError) as caught:
        recipe(**given)
    text = str(caught.value)
    assert "'engine' (did you mean 'sampling.engine'?)" in text
    assert "training.budget is a section with settings of its own (weight, slack), found 3" in text
    assert "a judge of kind reward needs a model: reward:MODEL" in text


CONSTANTS = {
    "beta": 0.3,
    "gamma": 0.7,
    "alpha": 0.2,
    "steer": 0.9,
    "use_weight": False,
    "use_steer": False,
    "detach_weight": True,
    "label_smoothing": 0.2,
    "simpo_margin": 0.9,
    "ceiling": 0.05,
    "budget": {"weight": 0.5, "slack": 0.2},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_argument_is_called_unused_exactly_when_it_changes_nothing(name: str, base: str) -> None:
    """Loss or gradient must move when a used constant moves, and must not for an unused one."""

    def measure(**constants: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        keys = [f"{c}/{r}" for c in ("plain", "good", "bad") for r in ("plain", "good", "bad")]

        def draw() -> dict[str, torch.Tensor]:
            return {
                k: -20 * torch.rand(3, generator=generator, dtype=torch.float64) - 1 for k in keys
            }

        policy = {k: v.requires_grad_() for k, v in draw().items()}
        lengths = {k: torch.tensor([7, 5, 3]) for k in keys}
        objective = Objective.named(name, base=base, **constants)
        steering_loss(objective, policy, draw(), lengths).loss.backward()
        grads = [v.grad if v.grad is not None else torch.zeros(3) for v in policy.values()]
        return torch.cat([g.double() for g in grads])

    unused = unused_arguments(name, base, CONSTANTS, use_weight=True, use_steer=True)
    plain = measure()
    for constant, value in CONSTANTS.items():
        moved = not torch.allclose(measure(**{constant: value}), plain, rtol=1e-9, atol=0)
        assert moved == (constant not in unused), constant


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: a\ntraining: {beta: 0.1, beta: 0.2}\n")
    with pytest.raises(ConfigError, match="the key 'beta' is there twice"):
        load_recipe(str(file))


def test_train_refuses_another_reference_than_its_model() -> None:
    with pytest.raises(ConfigError, match="the given model as reference"):
        validate(TrainConfig, {"output": "o", "reference": "first"}, "settings")
    dora = {"output": "o", "objective": "pbaa", "weighting": "dora"}
    with pytest.raises(ConfigError, match="weighting dora needs a run"):
        validate(TrainConfig, dora, "settings")


def test_package_paths_resolve() -> None:
    path = resolve_path("package:selfsteer.recipes/smoke.yaml")
    assert path.endswith("recipes/smoke.yaml")
    assert resolve_path("some/where") == "some/where"


@pytest.mark.parametrize("model", METHODS, ids=method_of)
def test_every_setting_is_described(model: type[Section]) -> None:
    texts = descriptions(model)
    assert [k for k in known_keys(model) if not texts.get(k)] == []


def every_section() -> Iterator[type[Section]]:
    found = [Section]
    while found:
        yield (section := found.pop())
        found += section.__subclasses__()


def test_every_setting_that_may_be_null_takes_null() -> None:
    told = [
        (section, name)
        for section in every_section()
        for name, field in section.model_fields.items()
        if re.search(r"\bnull\b", field.description or "")
    ]
    assert len(told) > 40
    refused = []
    for section, name in told:
        try:
            section.model_validate({name: None})
        except ValidationError as e:
            refused += [f"{section.__name__}.{name}" for x in e.errors() if x["loc"] == (name,)]
    assert refused == []
    given: Any = recipe_of({**MINIMAL, "principles": read_yaml("concision: null")}, "recipe")
    assert given.principles == PrinciplesConfig()


def test_comments_do_not_change_a_recipe() -> None:
    for name in recipe_names():
        values = load_values(name)
        comments = {**descriptions(SSO), "queries.path": "a long reason. " * 20}
        commented = commented_yaml(values, comments)
        assert read_yaml(commented) == values
        assert max(map(len, commented.splitlines())) <= 120
    commented = commented_yaml(load_values("sso"), comments)
    assert "  gamma: 0.1  # γ, weight of the NLL" in commented
    assert "  # a long reason. a long reason." in commented


def test_a_date_is_a_text_and_what_yaml_cannot_make_is_one_too() -> None:
    values = merge(MINIMAL, ["name=2026-11-21", "queries.path=2024-13-45", "seed=7"])
    made: Any = recipe_of(values, "recipe")
    assert (made.name, made.queries.path, made.seed) == ("2026-11-21", "2024-13-45", 7)
    assert merge(MINIMAL, ["name=!!int x"])["name"] == "!!int x"


@pytest.mark.parametrize(
    "setting", ["seed=true", "seed=1:30", "training.beta=no", "queries.limit=on"]
)
def test_neither_truth_nor_time_is_a_number(setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key}: input should be a (number|valid integer)"):
        recipe_of(merge(MINIMAL, [setting]), "recipe")


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made: Any = recipe_of(merge(MINIMAL, ["runs_dir=~/runs", "name=one"]), "recipe")
    assert made.folder == tmp_path / "runs" / "one"
    assert resolve_path("~/prompts.jsonl") == str(tmp_path / "prompts.jsonl")


def test_a_recipe_that_yaml_cannot_make_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text in ("seed: !!int x", "seed: !!bool x", "seed: !!timestamp x"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_recipe(str(path))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0x" + "f" * 50_000, "a number of more than 1,024 bits"),
        ("9" * 5_000, "does not fit its tag"),
        (r'"half \ud800"', "holds half a character"),
        (r'{"\udfff": 1}', "holds half a character"),
    ],
)
def test_what_cannot_be_written_down_again_is_no_value(
    tmp_path: Path, value: str, said: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"seed: {value}\n")
    with pytest.raises(ConfigError, match=f"cannot be read: .*{said}"):
        load_recipe(str(path))
    assert merge({}, [f"seed={value}"]) == {"seed": value}


def test_an_override_with_a_key_twice_is_no_section() -> None:
    twice = "principles={mode: picked, mode: generated}"
    with pytest.raises(ConfigError, match=r"principles is a section .*found '\{mode: picked"):
        recipe_of(merge(MINIMAL, [twice]), "recipe")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("package:os", "os is a module without a folder"),
        ("package:nowhere/model", "no package 'nowhere'"),
        ("package:", "no package ''"),
        ("package:../secrets", "no package ''"),
        ("package:selfsteer.testbed/nothing", "names nothing"),
        ("package:selfsteer.nowhere/checkpoint", "names nothing"),
    ],
)
def test_a_package_that_has_no_such_thing(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_path(name)


def test_a_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brittle").mkdir()
    (tmp_path / "brittle" / "__init__.py").write_text("raise RuntimeError('ran')")
    (tmp_path / "brittle" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("package:brittle/model.gguf") == str(tmp_path / "brittle" / "model.gguf")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: " + "[" * 5_000, "nested too deeply"),
        ("name: &a [*a]", "an alias stands in what it names"),
        # 2 to the 40th texts, and as many pairs to merge
        ("a0: &a0 x" + "".join(f"\na{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)),
         "more than 100,000 values"),
        ("a0: &a0 {k: 1}"
         + "".join(f"\na{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)),
         "more than 100,000 values"),
    ],
)  # fmt: skip
def test_a_recipe_without_end_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"cannot be read: .*{said}"):
        load_recipe(str(path))


def test_anchors_are_read_as_ever() -> None:
    assert read_yaml("a: &a {k: [1]}\nb: [*a, *a]\n")["b"] == [{"k": [1]}, {"k": [1]}]


def test_a_long_value_is_cut_in_messages_and_a_device_is_no_recipe() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(seed="x" * 5_000)
    assert len(str(caught.value)) < 400
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        load_recipe("/dev/zero")


def test_a_day_that_is_in_no_calendar_is_refused() -> None:
    assert Loading(date="2024-02-29").date == "2024-02-29"
    with pytest.raises(ValueError, match="2026-02-31 is no day of the calendar"):
        Loading(date="2026-02-31")
