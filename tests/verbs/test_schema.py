"""The JSON Schema of recipes says of a recipe what the program says of it, as far as it can."""

from typing import Any

import pytest
from jsonschema import Draft7Validator

from selfsteer.methods import METHODS
from selfsteer.recipe.read import load_values, merge, method_of, recipe_names
from selfsteer.verbs.schema import recipe_schema
from tests.make import recipe

SCHEMA = recipe_schema()


def faults(values: Any) -> list[str]:
    return [f"{e.json_path} {e.message}" for e in Draft7Validator(SCHEMA).iter_errors(values)]


def complete(name: str) -> dict[str, Any]:
    """A shipped recipe with what is the user's."""
    given = ["policy.model=m", "reward.data=d" if name == "reward" else "queries.path=q"]
    return merge(load_values(name), given + ["ranking.judge.model=m"] * (name == "best-of-n"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_a_slip_of_the_pen_is_not(name: str) -> None:
    values = complete(name)
    assert faults(values) == []
    assert "$.polcy" in "".join(faults({**values, "polcy": {}})).replace("'polcy'", "$.polcy")
    section = {"bach_size": 1} | values.get("training", {})
    if name != "reward":
        assert any("bach_size" in f for f in faults({**values, "training": section}))


def test_it_is_a_schema_and_its_settings_are_described() -> None:
    Draft7Validator.check_schema(SCHEMA)
    rates = SCHEMA["definitions"]["Contrast"]["properties"]["strength"]
    assert rates["description"].startswith("λ")
    for method in map(method_of, METHODS):
        assert any(b["if"]["properties"]["method"]["const"] == method for b in SCHEMA["allOf"])


@pytest.mark.parametrize(
    "setting",
    ["sampling.engine=vllm", "judge=oracle", "principles.writer=org/m", "principles={mode: picked}",
     "baseline={pbaa: {}}", "training.budget={weight: 2}", "queries.against=[a.jsonl]"],
)  # fmt: skip
def test_short_forms_that_recipes_take_are_valid(setting: str) -> None:
    values = merge(complete("sso"), [setting])
    recipe(**{k: v for k, v in values.items() if k not in ("name", "policy", "queries")})
    assert faults(values) == []


@pytest.mark.parametrize(
    "setting", ["method=ssso", "seed=-1", "generator.queries=0", "training.base=dpo", "judge=7"]
)
def test_values_out_of_bounds_are_not(setting: str) -> None:
    assert faults(merge(complete("sso"), [setting]))
