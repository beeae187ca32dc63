"""What the verbs share: option types, loading a recipe, ranks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfsteer import stopping
from selfsteer.errors import ConfigError, short
from selfsteer.run import ranks
from selfsteer.terminal import out

if TYPE_CHECKING:
    from selfsteer.methods import Aligning, AnyRecipe, Recipe
    from selfsteer.recipe.sections import Section


def complete_recipe(begun: str) -> list[str]:
    """Shipped recipes for the shell; files it completes itself."""
    from selfsteer.recipe.read import recipe_names

    return [name for name in recipe_names() if name.startswith(begun)]


AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]

RecipeName = Annotated[
    str,
    typer.Argument(
        help="name of a shipped recipe, a YAML file, or a run folder",
        autocompletion=complete_recipe,
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings as KEY=VALUE, such as seed=1 training.beta=0.2"),
]

Nproc = Annotated[
    int | None,
    typer.Option(
        min=1, help="ranks to train on, one GPU each, started on this machine by torchrun"
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        help="with --nproc: ddp (default), fsdp2, zero2, zero3 or an accelerate YAML file"
    ),
]


Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="the run folder is yours or its author's word is good: what its recipe permits "
        "(trust_remote_code, allow_pickle) or reaches (launch, base_url or address of another "
        "machine, api_key_env, engine_args) holds",
    ),
]

Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="OLD=NEW", help="rename a column, such as question=prompt; repeatable"),
]


def renamed(columns: list[str] | None) -> dict[str, str]:
    """Old to new names of ``--column``.

    Raises:
        ConfigError: one is not of the form OLD=NEW, or a column gets two names.
    """
    pairs = [text.partition("=")[::2] for text in columns or ()]
    for pair in pairs:
        if not all(pair):
            raise ConfigError(
                f"--column takes OLD=NEW, found {short('='.join(filter(None, pair)))}."
            )
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ConfigError("--column gives one column two names; keep one.")
    return found


def emit(result: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Prints a result on stdout, as JSON or as ``show`` does it."""
    if as_json:
        out.print_json(data=result)
    else:
        show(result)


def named_judge(text: str) -> Any:
    """The judge that ``--judge`` names: ``oracle``, ``chat:MODEL`` or a YAML mapping."""
    from selfsteer.recipe.read import merge, validate
    from selfsteer.recipe.sections import JudgeConfig

    named = merge({}, [f"judge={text}"]).get("judge", text)
    return validate(JudgeConfig, named, f"--judge {text}")


def on_ranks(nproc: int | None, profile: str | None) -> None:
    """Starts the ranks that were asked for; as one of them, checks that they are all there."""
    ranks.check_world(nproc)
    if ranks.in_world():
        if profile is not None and ranks.LAUNCHER not in os.environ:
            raise ConfigError(
                "--profile has no effect on ranks that are already started. Leave it out, and give "
                "its file to accelerate launch: --config_file."
            )
        return
    if profile is not None and (nproc or 1) == 1:
        raise ConfigError("--profile has no effect on a single rank; add --nproc N.")
    if nproc is not None and nproc > 1:
        ranks.launch(nproc, profile)


def stop_in_time(until_time: str | None) -> None:
    """Has this process stop when its time is up; a launcher of ranks ends them with itself.

    Raises:
        ConfigError: no time, or ranks that somebody else started.
    """
    if until_time is None:
        return
    seconds = stopping.seconds_of(until_time)
    if not seconds:
        raise ConfigError(
            "--until-time takes a time such as 110m, 2h or 1h30m, at most a year, found "
            f"{short(until_time)}."
        )
    if not ranks.in_world():
        stopping.after(seconds)
    elif ranks.LAUNCHER not in os.environ:
        raise ConfigError(
            "--until-time has no effect on ranks that are already started. Leave it out, and have "
            "the scheduler end their launcher in time."
        )


def check_trust(folder: Path, settings: "Section | None", trust: bool) -> None:
    """Refuses what settings from a run folder permit or reach, unless the command line does, too.

    Raises:
        ConfigError: they permit or reach something.
    """
    if settings is None or trust:
        return
    risks = {
        "models can run code of their authors": settings.permits,
        "it starts programs, or says where your prompts and keys go": settings.reaches,
    }
    for risk, given in risks.items():
        if given:
            raise ConfigError(
                f"The recipe in {folder} sets {' and '.join(sorted(given))}, with which {risk}, "
                "and a run folder may be somebody else's. If you trust this one, add --trust."
            )


def load_recipe(
    recipe: str, overrides: list[str], *, trust: bool = True
) -> "tuple[AnyRecipe, dict[str, Any]]":
    """The checked recipe and its settings as given; a run folder stands for the recipe in it.

    Args:
        recipe: its name, file or run folder.
        overrides: KEY=VALUE.
        trust: whether that of a run folder may permit anything: always if it is to be run.
    """
    import yaml

    from selfsteer.methods import recipe_of

    values = settings_of(recipe, overrides)
    checked = recipe_of(values, f"recipe {recipe}")
    if is_run(recipe):
        check_trust(Path(recipe), checked, trust)
    return checked, yaml.safe_load(yaml.safe_dump(values, sort_keys=False))


def is_run(recipe: str) -> bool:
    """Whether a run folder stands for the recipe in it."""
    return (Path(recipe) / "recipe.yaml").is_file()


def settings_of(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The settings as given, unchecked; those of a run folder keep the run in it."""
    from selfsteer.recipe.read import load_values, merge
    from selfsteer.run.folder import recipe_file

    if is_run(recipe):
        here = Path(recipe).absolute()
        here = here.resolve() if here.is_symlink() else here  # the run is called as its folder is
        overrides = [f"runs_dir={here.parent}", f"name={here.name}", *overrides]
        recipe = str(recipe_file(here))
    return merge(load_values(recipe), overrides)


def aligning(recipe: "Recipe") -> "Aligning":
    """The recipe, if it has queries and samples answers to them.

    Raises:
        ConfigError: it trains a reward model alone.
    """
    from selfsteer.methods import Aligning

    if isinstance(recipe, Aligning):
        return recipe
    raise ConfigError(
        f"This command looks at queries and sampling, and a recipe of method {recipe.method} has "
        "neither. Start it with selfsteer run."
    )


def size(n: float) -> str:
    """Bytes in the unit that suits them.

    >>> size(8_030_000_000), size(1_500_000), size(3e13)
    ('8.0 GB', '1.5 MB', '30.0 TB')
    """
    unit, scale = next(
        (u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if n >= s or u == "MB"
    )
    return f"{n / scale:,.1f} {unit}"


def amount(n: float) -> str:
    """A number of at least 1, to three digits.

    >>> amount(8_030_000_000), amount(1_064_576), amount(12)
    ('8.03B', '1.06M', '12')
    """
    unit, scale = next((u, s) for u, s in (("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)) if n >= s)
    return f"{n / scale:.3g}{unit}"
