"""``selfsteer sweep``: a few settings of one training, compared."""

import re
import shlex
from typing import Annotated, Any

import typer

from selfsteer.errors import ArtifactError
from selfsteer.terminal import out, table
from selfsteer.verbs.common import AsJson, complete_recipe, emit, load_recipe


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            help="name of a shipped recipe or a YAML file", autocompletion=complete_recipe
        ),
    ],
    settings: Annotated[
        list[str],
        typer.Argument(
            help="KEY=VALUE, and axes KEY=V1,V2 of generator.* or of training.*, such as "
            "generator.learning_rate=5e-7,1e-6"
        ),
    ],
    budget: Annotated[
        int, typer.Option(help="most trainings; of a larger grid, a random part is trained", min=1)
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Try a few settings of one training on the same data, and report the best.

    Each combination is a run folder in NAME-sweep. They share all stages before the training and
    are compared by what checkpoint selection measures on held-out queries (docs/selection.md).
    """
    from selfsteer.verbs import sweeping

    tried = [s for s in settings if re.fullmatch(r"(generator|training)\.[a-z_]+=[^\[{]*,.*", s)]
    fixed = [s for s in settings if s not in tried]
    axes, stage = sweeping.axes_of(tried)
    _, given = load_recipe(recipe, fixed)
    report = sweeping.sweep(given, axes, stage, budget)
    same = " ".join(["selfsteer run", recipe, *map(shlex.quote, fixed)])
    emit(report, as_json, lambda _: _print(report, same))
    if report["best"] is None:
        raise ArtifactError(
            "No cell can be called best: each failed, drifted beyond a bound of selection, or has "
            "answers that the judge decided nothing of. Try lower learning rates, or fewer epochs."
        )


def _print(report: dict[str, Any], command: str) -> None:
    from selfsteer.verbs import sweeping

    rows = _rows(report)
    out.print(table(list(rows[0]), (row.values() for row in rows), words=len(rows[0])))
    if report["best"] is None:
        return
    best = report["cells"][report["best"]]["settings"]
    chosen = " ".join(f"{k}={sweeping.shown_value(v)}" for k, v in best.items())
    out.print(f"next: {command} {chosen}", markup=False)


def _rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """A row per cell, as text: its settings, the step kept, and what the model of it does."""
    from selfsteer.verbs import sweeping

    rows = []
    for number, cell in enumerate(report["cells"]):
        settings = {
            k.rpartition(".")[2]: sweeping.shown_value(v) for k, v in cell["settings"].items()
        }
        row = {"": "best" if number == report["best"] else "", **settings}
        rows.append({**row, **(_figures(cell) if "kept" in cell else {"drift": "failed"})})
    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = [name for name in names if any(row.get(name) for row in rows)]
    return [{name: row.get(name, "") for name in filled} for row in rows]


def _figures(cell: dict[str, Any]) -> dict[str, str]:
    kept, policyness = cell["kept"], cell["kept"]["on_policyness"]
    wins = kept["wins_mean"]
    return {
        "step": f"{kept['step']} of {cell['steps']}",
        cell["measure"] or "wins": "{:.3f} [{:.2f}, {:.2f}]".format(*wins) if wins else "",
        "on-policy": f"{policyness['rejected']:.3f}" if policyness else "",
        "KL": f"{max(d['kl'] for d in kept['drift'].values()):.3f}",
        "drift": "within" if cell["within"] else "beyond",
    }
