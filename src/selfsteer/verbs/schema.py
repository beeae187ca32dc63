"""``selfsteer schema``: recipes as JSON Schema, for editors that complete and check YAML."""

import json
from typing import Any

import typer

#: How fields are marked for the program itself; no business of an editor.
MARKS = ("costs_only", "content", "kind")


def schema() -> None:
    """Print the JSON Schema of recipes.

    `selfsteer init` writes it beside the recipe as selfsteer.schema.json, where the recipe's first
    line names it: editors with a YAML language server then complete and check settings.
    """
    typer.echo(schema_text(), nl=False)


def schema_text() -> str:
    """The schema as a file."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of recipes: a branch per method, so that faults are those of the chosen one."""
    from pydantic.json_schema import models_json_schema

    from selfsteer.methods import METHODS
    from selfsteer.recipe.read import method_of

    refs, whole = models_json_schema(
        [(m, "validation") for m in METHODS], ref_template="#/definitions/{model}"
    )
    names = list(map(method_of, METHODS))
    branches = [
        {
            # without a method it is the first
            "if": {
                "properties": {"method": {"const": n}},
                "required": ["method"] * (n != names[0]),
            },
            "then": refs[model, "validation"],
        }
        for n, model in zip(names, METHODS, strict=True)
    ]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of selfsteer",
        "type": "object",
        "properties": {"method": {"enum": names}},
        "allOf": branches,
        "definitions": {name: _tidied(kind) for name, kind in whole["$defs"].items()},
    }


def _tidied(node: Any, of_names: bool = False) -> Any:
    """Without titles, marks of fields and whole sections as defaults, which say nothing new.

    Args:
        node: a part of a schema.
        of_names: its keys are names of settings, not words of JSON Schema.
    """
    if isinstance(node, list):
        return [_tidied(one) for one in node]
    if not isinstance(node, dict):
        return node
    left_out = () if of_names else ("title", *MARKS)
    return {
        key: _tidied(value, key == "properties" and not of_names)
        for key, value in node.items()
        if key not in left_out and not (key == "default" and isinstance(value, dict))
    }
