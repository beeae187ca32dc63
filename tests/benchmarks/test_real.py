"""The figures on a real model: what the recipe comes with, and the page of invented results."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.jsonl import read_jsonl
from selfsteer.errors import DataError
from selfsteer.methods import load_recipe
from selfsteer.principles.catalogue import catalogue_text, load_catalogue
from selfsteer.principles.lint import lint
from selfsteer.recipe.sections import resolve_path
from tests.make import write_jsonl

FOLDER = Path(__file__).parents[2] / "benchmarks" / "real"
SHIPPED = "package:selfsteer/recipes/smollm2"


@pytest.fixture(scope="module")
def real() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    yield import_module("run")
    sys.path.remove(str(FOLDER))
    for name in ("run", "page"):
        del sys.modules[name]


def test_the_shipped_prompts_are_short_and_kept_apart() -> None:
    names = ("align", "held-out")
    paths = [Path(resolve_path(f"{SHIPPED}/{name}.jsonl")) for name in names]
    align, held_out = ([row["prompt"] for _, row in read_jsonl(p)] for p in paths)
    assert (len(align), len(held_out), len({*align, *held_out})) == (152, 48, 200)
    assert all(20 <= len(prompt) <= 200 for prompt in (*align, *held_out))


def test_every_feature_of_the_shipped_style_has_rules() -> None:
    path = f"{SHIPPED}/style.yaml"
    assert lint(catalogue_text(path)) == []
    style = load_catalogue(path)
    assert list(style.rules) == list(style.by_name)


def test_a_method_gets_the_settings_that_it_has(real: Any) -> None:
    settings = ["policy.model=m", "name=n"]
    beside = ["base", "pbaa", "sso"]
    assert real.recipe_for("sso", settings, beside).methods == ("sso", "pbaa")
    assert real.recipe_for("sso", settings, ["sso"]).methods == ("sso",)
    assert real.recipe_for("pbaa", settings, ["pbaa"]).methods == ("pbaa",)
    made = real.recipe_for("best-of-n", [*settings, "sampling.keep_unfinished=false"], ())
    assert made.judge.kind == "checks"
    assert made.ranker == made.judge


def test_the_first_try_is_of_short_prompts_with_a_rule(real: Any, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", *({"prompt": f"What is {i}?"} for i in range(9)))
    settings = real.first_try([prompts], tmp_path, (5, 3))
    recipe: Any = load_recipe("smollm2", ["policy.model=m", *settings])
    assert recipe.principles.good == real.SHORT
    rows = [
        row for name in ("align", "held-out") for _, row in read_jsonl(tmp_path / f"{name}.jsonl")
    ]
    assert len({row["id"] for row in rows}) == 8
    assert rows[0]["checks"] == [{"words": {"max": 30}}]
    with pytest.raises(DataError, match="12 prompts are needed, found 9"):
        real.first_try([prompts], tmp_path, (9, 3))


def result(method: str, seed: int, kept: list[int], **more: Any) -> dict[str, Any]:
    said = {
        "ids": ["a", "b", "c", "d"],
        "kept": kept,
        "of": [2] * 4,
        "by_rule": {"Brevity": [sum(kept), 8]},
        "words": [10] * 4,
        "tokens": [20] * 4,
        "unfinished": 1,
        "distinct": 4,
    }
    given = {"config": "style", "method": method, "seed": seed, "ifeval_undecided": 2}
    return {**given, "sampled": said, "greedy": said, **more}


def test_the_page_is_made_of_the_results(real: Any, tmp_path: Path) -> None:
    """Base keeps 4 of 8 rules; SSO 6 and 8 with two seeds, so 7/8 and a gain of 3/8."""
    pairs = {
        "pairs": 5,
        "accuracy": 0.9,
        "on_policyness": {"chosen": 0.8, "rejected": 0.7},
        "tokens": {"chosen": 20.0, "rejected": 40.0},
    }
    trained = {"pairs": pairs, "seconds": {"iteration-1/policy": 90.0}}
    results = [
        result("base", 0, [1, 1, 1, 1]),
        result("sso", 0, [2, 2, 1, 1], **trained),
        result("sso", 1, [2, 2, 2, 2], **trained),
    ]
    for i, value in enumerate(results):
        (tmp_path / f"{i}.json").write_text(json.dumps(value))
    text = real.page.write(tmp_path).read_text()
    assert "| base | 0 | 0.50 [0.50, 0.50] |" in text
    assert "| sso | 0, 1 | 0.88" in text
    assert "0.88 [0.75, 1.00] (0.75, 1.00) | +0.38 [+0.25, +0.50] (+0.25, +0.50)" in text
    assert "| sso | 88% | 10 | 20 | 25% | 100% |" in text
    assert "| sso | 5 | 0.9 | 0.8 | 0.7 | 20 | 40 |" in text
    assert "| sso | iteration-1/policy | 90 s |" in text
    assert "2 prompts of IFEval's quarter are left out" in text
