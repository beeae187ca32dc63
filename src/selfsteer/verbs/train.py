"""``selfsteer train``: one objective on stored triples."""

from pathlib import Path
from typing import Annotated

import typer

from selfsteer.terminal import is_main_process, out
from selfsteer.verbs.common import AsJson, Nproc, Profile, emit, on_ranks


def train(
    model: Annotated[str, typer.Argument(help="model to train: folder, hub id or package:NAME")],
    triples: Annotated[
        Path, typer.Argument(help="triples or preferences of selfsteer, or the authors' JSON")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="KEY=VALUE: objective, base, learning_rate, batch_size, output and others"
        ),
    ] = None,
    nproc: Nproc = None,
    profile: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Train one objective on stored triples, offline, on one or several ranks.

    Example: selfsteer train MODEL triples.jsonl objective=sso-online base=ipo beta=0.2
    learning_rate=5e-7 batch_size=1 accumulate=16 output=DIR
    """
    from selfsteer.recipe.read import merge, validate
    from selfsteer.recipe.sections import TrainConfig

    config = validate(TrainConfig, merge({}, settings or []), "settings of train")
    on_ranks(nproc, profile)
    from selfsteer.stages.offline import train_offline

    manifest = train_offline(model, triples, config)
    last = manifest["last"].items()
    figures = ", ".join(f"{k} {v:.4f}" for k, v in last if k == "loss" or "margins" in k)
    lost = ", ".join(f"{n:,} {reason}" for reason, n in manifest["dropped"].items())
    text = (
        f"{config.output}: trained on {manifest['n_out']:,} of {manifest['n_in']:,} records"
        f"{f' (dropped {lost})' if lost else ''}; last step: {figures}"
    )
    if is_main_process():
        emit(manifest, as_json, lambda _: out.print(text))
