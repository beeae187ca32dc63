"""`selfsteer sweep`: a few trainings on the same data, compared by what their models do.

Each cell is a run of its own that begins where the shared one stopped, so nothing before the
training is done twice. The figures are those of checkpoint selection, and so is the rule.
"""

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import disk_errors, replacing_folder, write_atomic
from selfsteer.errors import ArtifactError, ConfigError, NumericsError, short
from selfsteer.methods import recipe_of
from selfsteer.recipe.read import merge, typed
from selfsteer.recipe.sections import Selection, twice
from selfsteer.run.execute import execute
from selfsteer.run.folder import RunFolder
from selfsteer.stages.train import Train
from selfsteer.terminal import say, warn
from selfsteer.training.select import FEWEST, Candidate, Drift, choose, mean_wins

REPORT = "sweep.json"

#: Bytes that most file systems allow in a name, with room for ``.partial``.
NAME_MAX = 240
SHARED = "shared"


def axes_of(settings: Sequence[str]) -> tuple[dict[str, list[Any]], str]:
    """``generator.gamma=0.1,1`` as an axis and its values, and the stage they train.

    Raises:
        ConfigError: no axis, fewer than two values, a key twice, or keys of two stages.
    """
    axes: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = text.split(",")
        values = [typed(part) for part in parts]
        same = twice(map(shown_value, values)) is not None
        if not equals or len(values) < 2 or not all(map(str.strip, parts)) or key in axes or same:
            raise ConfigError(
                "An axis must look like generator.gamma=0.1,1, and it and each of its values stand "
                f"once, found {short(setting)}."
            )
        axes[key] = values
    stages = {key.partition(".")[0] for key in axes}
    if len(stages) != 1 or not stages <= {"generator", "training"}:
        raise ConfigError(
            "A sweep needs axes of generator.* or of training.*, not of both: it compares models "
            f"that were trained on the same data. Found {', '.join(axes) or 'none'}."
        )
    return axes, "generator" if stages == {"generator"} else "policy"


def shown_value(value: Any) -> str:
    """A value as a setting takes it."""
    return "null" if value is None else str(value)


def cells_of(axes: dict[str, list[Any]], budget: int, seed: int) -> list[dict[str, Any]]:
    """The grid in order; ``budget`` seeded ones of it where it is larger.

    >>> [tuple(c.values()) for c in cells_of({"a": [1, 2], "b": [3, 4]}, 9, 0)]
    [(1, 3), (1, 4), (2, 3), (2, 4)]
    """
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    chosen = sorted(range(len(grid)), key=lambda i: derive_seed(seed, "sweep", i))[:budget]
    return [grid[i] for i in sorted(chosen)]


def sweep(values: dict[str, Any], axes: dict[str, list[Any]], stage: str, budget: int) -> Any:
    """Trains every cell and writes ``sweep.json``; the same command resumes where it stopped.

    Args:
        values: the recipe's settings as given.
        axes: key → values to try.
        stage: ``generator`` or ``policy``: what is trained and compared.
        budget: most trainings.

    Returns:
        The report: cells with their kept step's figures, or why their training failed, and which
        is best; None where none can be called that.

    Raises:
        ConfigError: the recipe trains no such model, or nothing tells the cells' models apart.
    """
    recipe = recipe_of(values, "recipe of the sweep")
    stages = recipe.plan()
    place = next((i for i, s in enumerate(stages) if isinstance(s, Train) and s.title == stage), 0)
    training = stages[place]
    if not isinstance(training, Train):
        raise ConfigError(
            f"A recipe of method {recipe.method} trains no single {stage}, so there is nothing to "
            "sweep. Axes of generator.* need one generator, axes of training.* a policy."
        )
    selection, before = training.settings.selection, stages[place - 1].name
    if not selection.points:
        raise ConfigError(
            f"A sweep compares by the figures of checkpoint selection, which is off here: remove "
            f"{training.section}.selection.points."
        )
    judged = training.judge is not None and training.judge.kind != "human"
    if stage == "policy" and not judged:
        raise ConfigError(
            "A sweep of training.* needs a judge: nothing else tells whose answers are better, and "
            "a policy that learns nothing drifts least. Give one that judges answers as they come, "
            "such as judge=checks:STYLE.yaml, judge=chat:MODEL or judge=reward:MODEL "
            "(docs/judges.md)."
        )
    if not judged:
        warn("without a judge cells are compared by on-policyness; whether pairs are right, is not")
    folder = recipe.folder.with_name(f"{recipe.name}-sweep")
    cells = [(cell, *_cell(values, cell, folder)) for cell in cells_of(axes, budget, recipe.seed)]
    say(f"sweep: what the cells share, in {folder / SHARED}", "bold")
    # the rest of the recipe stays: it says what is held out, and how queries are shared out
    shared = {**values, "runs_dir": str(folder), "name": SHARED}
    for last in (stages[0].name, before):  # what is dropped on the way is not trained on
        _run(shared, last)
        left = (RunFolder(folder / SHARED).last(last) or {})["n_out"]
        if min(selection.queries, left // 10) < FEWEST:
            raise ConfigError(
                f"A sweep compares on queries that are held out, a tenth of them and at least "
                f"{FEWEST}; {left:,} are there after the stage {last}. Let {10 * FEWEST} or more "
                f"be left, and {training.section}.selection.queries be {FEWEST} or more."
            )
    found = []
    for number, (cell, name, own) in enumerate(cells, 1):
        shown = " ".join(f"{k}={shown_value(v)}" for k, v in cell.items())
        say(f"sweep: cell {number} of {len(cells)}: {shown}", "bold")
        if not (folder / name).exists():
            with disk_errors(folder / name), replacing_folder(folder / name) as copy:
                shutil.copytree(folder / SHARED, copy, dirs_exist_ok=True)
        try:
            _run(own, training.name)
        except NumericsError as e:  # the others may do better
            warn(f"{shown} failed, and the sweep goes on: {e}")
            found.append({"settings": cell, "failed": str(e)})
            continue
        found.append({"settings": cell, **_kept(folder / name / training.name)})
    report = {"stage": stage, "best": _best(found, selection), "cells": found}
    write_atomic(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def _cell(values: dict[str, Any], cell: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """The name of a cell's run folder, and its recipe, which is checked."""
    named = (f"{k}-{shown_value(v)}" for k, v in cell.items())
    name = f"cell-{'-'.join(named)}"
    own = merge(values, [f"{k}={json.dumps(v)}" for k, v in cell.items()])
    recipe_of(own, f"recipe of {short(name)}")
    if "/" in name or len(os.fsencode(name)) > NAME_MAX:
        raise ConfigError(
            f"The run of a cell would be called {short(name)}, which is no name of a folder. Try "
            "such values in recipes of their own."
        )
    return name, {**own, "runs_dir": str(folder), "name": name}


def _run(values: dict[str, Any], until: str) -> None:
    # the same folder holds all of a sweep
    otherwise = f"move {values['runs_dir']} away to do all of the sweep again"
    execute(recipe_of(values, "recipe of a cell"), values, until=until, otherwise=otherwise)


def _kept(model: Path) -> dict[str, Any]:
    """What the selection of a training says of the step that it kept, and of the start."""
    path = model.with_name(f"{model.name}.selection.json")
    if not path.exists():
        raise ArtifactError(
            f"{path.parent} has no {path.name}: too few queries were there to hold any out, so "
            "nothing tells the cells apart. Give the recipe more queries."
        )
    report = read_json(dict[str, Any], path)
    by_step = {c["step"]: c for c in report["candidates"]}
    names = ("step", "drift", "wins", "wins_mean", "on_policyness", "excess")
    kept, start = ({k: by_step[s][k] for k in names} for s in (report["chosen"], 0))
    within = max(kept["excess"].values()) <= 1
    found = {"kept": kept, "start": start, "within": within}
    return {"steps": report["steps"], "measure": report["wins"], **found}


def _best(cells: Sequence[dict[str, Any]], bounds: Selection) -> int | None:
    """The place of the best cell: the rule that chooses a step, over the kept steps of all.

    None where each failed, drifted beyond a bound, or has answers that the judge decided nothing
    of.
    """
    sound = [
        (number, cell)
        for number, cell in enumerate(cells)
        if cell.get("within") and (cell["kept"]["wins"] or cell["kept"]["on_policyness"])
    ]
    if not sound:
        return None
    start = _candidate(-1, sound[0][1]["start"])
    kept = [_candidate(number, cell["kept"]) for number, cell in sound]
    # the rule passes over its candidates once: most wins first, so that no order of cells matters
    return choose(start, sorted(kept, key=mean_wins, reverse=True), bounds).step


def _candidate(number: int, record: dict[str, Any]) -> Candidate:
    return Candidate(
        number,
        {context: Drift(**figures) for context, figures in record["drift"].items()},
        record["wins"],
        record["on_policyness"] and record["on_policyness"]["rejected"],
    )
