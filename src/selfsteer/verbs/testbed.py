"""``selfsteer testbed``: the tiny world that the demo runs on."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.terminal import out

app = typer.Typer(
    no_args_is_help=True,
    help="The tiny world that the demo runs on.",
)


@app.command()
def build(
    output: Annotated[Path, typer.Argument(help="folder to write the checkpoint to")],
    seed: Annotated[int, typer.Option(help="seed of data and weights")] = 0,
    examples: Annotated[int, typer.Option(help="training examples")] = 64_000,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    uneven: Annotated[
        bool, typer.Option("--uneven", help="a harder world on the same questions")
    ] = False,
) -> None:
    """Train the tiny model again, from scratch; takes minutes on one core."""
    from selfsteer.testbed import build as tool

    figures = tool.build(output, examples=examples, seed=seed, threads=threads, uneven=uneven)
    out.print_json(data=figures)
