"""``selfsteer merge``: LoRA adapters added to their base."""

from pathlib import Path
from typing import Annotated, Any

import typer

from selfsteer.terminal import out


def merge(
    adapter: Annotated[Path, typer.Argument(help="a folder of LoRA adapters, as peft writes them")],
    output: Annotated[Path, typer.Argument(help="folder of the plain checkpoint to make")],
    base: Annotated[
        str | None, typer.Option(help="the model under them; default: the one they name")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: as the base is stored")
    ] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="run code that comes with it")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="load weights not in safetensors")] = False,
) -> None:
    """Add LoRA adapters to their base: a checkpoint that any program loads."""
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import Loading, resolve_path

    values: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
    values |= {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    settings = validate(Loading, values, "merge")
    from selfsteer.models.load import merge_adapter

    used = merge_adapter(adapter, output, settings, resolve_path(base) if base else None)
    out.print(f"{output}: {used} with the adapters of {adapter}")
