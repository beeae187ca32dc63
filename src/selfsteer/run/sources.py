"""The models and files that a recipe names: what a run was made from, kept in ``sources.json``.

Recipes name them relative to the folder where a command is given. A command that reads a finished
run somewhere else could find others of the same name, and its figures would be of those.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typing_extensions import TypedDict  # pydantic asks for this one on Python 3.11

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import digest, model_digest
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.queries import queries_digest
from selfsteer.errors import DataError, listed
from selfsteer.recipe.sections import PrinciplesConfig, Queries, mark, resolve_path
from selfsteer.run.stage import content
from selfsteer.terminal import warn

#: Where a run keeps them.
SOURCES = "sources.json"

#: What it holds: the folder where the run was begun, and a digest by setting.
Noted = TypedDict("Noted", {"from": str, "digests": dict[str, str]})


def sources(section: BaseModel, place: str = "") -> Iterator[tuple[str, Callable[[], str]]]:
    """Each setting of a recipe that names a model or a file, and what digests it.

    Args:
        section: the recipe, or a section of it.
        place: the section's name in the recipe, with a dot at its end.
    """
    served = getattr(getattr(section, "engine", section), "base_url", None) is not None
    if isinstance(section, Queries):
        yield f"{place}path", lambda: digest(queries_digest(section))
    for name, info in type(section).model_fields.items():
        value, at = getattr(section, name), f"{place}{name}"
        kind = mark(info, "content")
        if isinstance(section, PrinciplesConfig) and name == "catalogue":
            kind = "file"
        if isinstance(value, BaseModel):
            yield from sources(value, f"{at}.")
        elif not isinstance(value, str):
            continue
        elif name == "model" and not served:
            yield at, partial(_of_model, value)
        elif kind == "file":
            yield at, partial(content, value, kind)


def _of_model(name: str) -> str:
    return model_digest(resolve_path(name))


def note_sources(run: Path, recipe: Any) -> None:
    """Writes what a recipe names, as it is now, into its run folder."""
    if not isinstance(recipe, BaseModel):  # a plan of the caller's own making
        return
    value = {"from": str(Path.cwd()), "digests": {name: made() for name, made in sources(recipe)}}
    write_atomic(run / SOURCES, json.dumps(value, indent=1) + "\n")


def check_sources(run: Path, recipe: Any, *settings: str, refuse: bool = True) -> None:
    """Compares what a run's recipe names with what the run was made from.

    Args:
        run: its folder.
        recipe: of the run, as it was resolved.
        settings: the ones to compare; one that ends with a dot stands for all of its section.
        refuse: whether another content is an error; else it is a warning.

    Raises:
        DataError: a model or a file is another one, or not there.
        ArtifactError: the run's ``sources.json`` is damaged.
    """
    if not (run / SOURCES).exists():
        return
    noted = read_json(Noted, run / SOURCES)
    before = noted["digests"]
    wanted = [name for name in before if name in settings or name.startswith(_sections(settings))]
    if not wanted:
        return
    now = dict(sources(recipe))
    changed = [name for name in wanted if name in now and now[name]() != before[name]]
    if not changed:
        return
    named = listed([f"{name} ({_value(recipe, name)})" for name in changed])
    found = f"{named}: not what {run} was made with, seen from {Path.cwd()}"
    if not refuse:
        warn(f"{found}. What follows is of the present content")
        return
    raise DataError(
        f"{found}. The run was begun in {noted['from']}: give the command there, or put back "
        "what the run was made with."
    )


def _sections(settings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in settings if name.endswith("."))


def _value(recipe: Any, setting: str) -> Any:
    for name in setting.split("."):
        recipe = getattr(recipe, name)
    return recipe
