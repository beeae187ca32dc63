"""``selfsteer init``: a commented recipe to start from."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.errors import ConfigError
from selfsteer.terminal import out
from selfsteer.verbs.common import complete_recipe


def init(
    path: Annotated[Path, typer.Argument(help="file to write")],
    recipe: Annotated[
        str,
        typer.Option(help="shipped recipe to start from", autocompletion=complete_recipe),
    ] = "sso",
) -> None:
    """Write a commented recipe to start from."""
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.methods import METHODS
    from selfsteer.recipe.read import choose, commented_yaml, descriptions, load_values, recipe_text

    if path.exists():
        raise ConfigError(f"{path} is there already; choose another name or move it away.")
    model = choose(METHODS, load_values(recipe), f"recipe {recipe}")
    write_atomic(path, commented_yaml(recipe_text(recipe), descriptions(model)))
    asks = "queries" in model.model_fields
    data, verb = ("queries.path", "check") if asks else ("reward.data", "run")
    out.print(f"{path}: set policy.model and {data}, then: selfsteer {verb} {path}")
    if recipe == "sso":
        out.print(
            "sso is the paper's method. With the weights at hand, --recipe contrast takes about a "
            "third of the compute; docs/methods.md says which method is for whom."
        )
