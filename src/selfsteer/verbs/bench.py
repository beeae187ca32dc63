"""``selfsteer bench``: speed on this machine."""

from typing import Annotated, Any

import typer

from selfsteer.terminal import out, say, table
from selfsteer.verbs.common import AsJson, Overrides, RecipeName, Trust, aligning, emit, load_recipe

app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")


@app.command()
def sampling(
    recipe: RecipeName,
    overrides: Overrides = None,
    engine: Annotated[
        str | None,
        typer.Option(help="sampling.engine to use instead of the recipe's: a kind or YAML"),
    ] = None,
    queries: Annotated[int, typer.Option(help="number of queries, two answers each", min=1)] = 256,
    repeats: Annotated[
        int, typer.Option(help="how often each is measured; the median counts", min=1)
    ] = 3,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure an engine's tokens per second, asked directly and through the pipeline."""
    chosen = [] if engine is None else [f"sampling.engine={engine}"]
    checked = aligning(load_recipe(recipe, [*(overrides or []), *chosen], trust=trust)[0])
    from selfsteer.verbs import sampling_speed

    emit(sampling_speed.bench(checked, queries, repeats), as_json, tell)


def tell(found: dict[str, Any]) -> None:
    """Prints the figures of `bench`."""
    rates = {way: found[way]["tokens_per_second"] for way in ("direct", "pipeline")}
    rows = (
        [way, *(f"{v:,.0f}" for v in (found[way]["median"], min(rates[way]), max(rates[way])))]
        for way in rates
    )
    answers = f"{found['engine']}, {found['answers']} answers"
    out.print(table([answers, "tokens/s", "lowest", "highest"], rows))
    out.print(f"the pipeline keeps {found['kept']:.1%}")
    a_shard = found["shard_size"] * found["answers"] // found["queries"]
    if found["engine"] == "transformers" and a_shard < found["batch_size"]:
        say(
            f"  a shard of {found['shard_size']} queries has {a_shard} answers, fewer than a batch "
            f"of {found['batch_size']}: raise sampling.shard_size"
        )
