"""``selfsteer merge``: LoRA adapters added to their base."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.terminal import out


def merge(
    adapter: Annotated[Path, typer.Argument(help="folder of LoRA adapters, as peft writes them")],
    output: Annotated[Path, typer.Argument(help="folder to write the merged checkpoint to")],
    base: Annotated[
        str | None, typer.Option(help="base model; default: the one that the adapters name")
    ] = None,
    other_weights: Annotated[
        bool,
        typer.Option(
            help="use the base although its weights are not those that the adapters were trained "
            "on, such as the same ones in another precision"
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto for that of the base model")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option(help="run Python code that comes with the checkpoint")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option(help="load weights that are not in safetensors format")
    ] = False,
) -> None:
    """Merge LoRA adapters into their base: a checkpoint that any program can load."""
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import Loading, resolve_path

    values: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
    values |= {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    settings = validate(Loading, values, "merge")
    from selfsteer.models.merge import merge_adapter

    given = resolve_path(base) if base else None
    used = merge_adapter(adapter, output, settings, given, other_weights=other_weights)
    out.print(f"{output}: {used} with the adapters of {adapter}")
