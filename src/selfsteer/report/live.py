"""What the live pages show of a run: what it does now, its curves, its last samples; as JSON.

Another process may be writing the files: what is cut short is left out, never an error.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import is_number, lines
from selfsteer.data.records import Triple
from selfsteer.errors import DataError
from selfsteer.recipe.read import load_values
from selfsteer.report.tables import about, sentence
from selfsteer.stages.rank import Candidates
from selfsteer.view import RunView, StageView, answers_of

#: Points of a curve at most; a longer log is thinned.
POINTS = 300
#: Curves that are drawn, by what their name begins with, in this order.
CURVES = ("loss", "rewards/margins", "rewards/accuracies")
SAMPLES = 3
#: Bytes read from the end of a shard to find its last triples.
TAIL = 1 << 18


def discover(root: Path) -> dict[str, Path]:
    """The run folders in a folder, by their names in it: one level deep, and two for sweeps.

    A folder that a link puts there from elsewhere is left out.
    """
    home = root.resolve()
    if (root / "resolved.json").is_file():
        return {home.name: root}
    found = {}
    for pattern in ("*/resolved.json", "*/*/resolved.json"):
        for path in sorted(root.glob(pattern)):
            folder = path.parent
            if path.resolve().is_relative_to(home) and "superseded" not in folder.parts:
                found[str(folder.relative_to(root))] = folder
    return found


def now(folder: Path) -> dict[str, Any]:
    """A run's state: progress, stages, curves, last samples, result."""
    run = RunView.open(folder)
    begun = {s.name for s in run.stages}
    left = [n for n in (run.progress or {}).get("todo", []) if n not in begun]
    return {
        "state": run.state,
        "folder": str(folder),
        "about": f"{about(run)}, policy {run.recipe.policy.model}",
        "progress": run.progress,
        "stages": [*map(_stage, run.stages), *({"name": n, "state": "to do"} for n in left)],
        "curves": curves(run),
        "samples": last_samples(run),
        "result": sentence(run),
        "sets": [s.name for s in run.sampled],
    }


def _stage(stage: StageView) -> dict[str, Any]:
    if not stage.done:
        return {"name": stage.name, "state": "begun", "began": stage.began}
    counts = {k: getattr(stage, k) for k in ("n_in", "n_out", "dropped", "seconds")}
    return {"name": stage.name, "state": "done", **counts}


def curves(run: RunView) -> dict[str, dict[str, list[list[float]]]]:
    """Training stage → metric → [step, value] points, about `POINTS` of them."""
    out: dict[str, dict[str, list[list[float]]]] = {}
    for stage, entries in run.curves.items():
        kept = [*entries[: -1 : -(-len(entries) // POINTS)], entries[-1]]
        names = dict.fromkeys(name for entry in kept for name in entry)
        found = {
            name: [[e["step"], round(e[name], 6)] for e in kept if is_number(e.get(name))]
            for begin in CURVES
            for name in names
            if name.startswith(begin)
        }
        out[stage] = {name: points for name, points in found.items() if points}
    return out


def last_samples(run: RunView) -> dict[str, Any] | None:
    """The last records of the shard that was finished last; None before the first."""
    try:
        shards = [(p.stat().st_mtime, p, s) for s in run.sampled for p in s.shards]
        if not shards:
            return None
        modified, path, found = max(shards, key=lambda shard: shard[:2])
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
            records = list(lines(file.read()))[-SAMPLES:]
    except FileNotFoundError:  # `run --redo` took it away meanwhile: the next answer has others
        return None
    kind: type[Candidates] | type[Triple] = Candidates if found.ranked else Triple
    kept = []
    for value in records:
        with suppress(DataError, TypeError):  # the index says which lines cannot be read
            made = kind.from_dict(value)
            answers = answers_of(made.to_dict())
            kept.append({"id": made.query.id, "query": made.query.text, "responses": answers})
    return {"set": found.name, "time": modified, "triples": kept}


def compare(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One row per run for the table that compares them; a folder that cannot be read says why."""
    out, settings, given = [], dict[str, dict[str, Any]](), set[str]()
    for name, folder in runs.items():
        try:
            run = RunView.open(folder)
            out.append({"run": name, **_row(run)})
            settings[name] = _flat(run.recipe.model_dump(mode="json"))
            given |= set(_flat(load_values(str(run.recipe_file))))
        except Exception as e:  # whatever a folder holds, the others are shown
            out.append({"run": name, "state": "unreadable", "error": f"{type(e).__name__}: {e}"})
    # what somebody set, not what follows from it
    keys = sorted(given - {"name", "runs_dir", "method"})
    differing = [k for k in keys if len({json.dumps(s.get(k)) for s in settings.values()}) > 1]
    for row in out:
        mine = settings.get(row["run"], {})
        row["differs"] = {k: mine[k] for k in differing if k in mine}
    return out


def _row(run: RunView) -> dict[str, Any]:
    (answers, pairs), (base, _) = run.last(run.recipe.method), run.last("base")
    done = {s.name for s in run.stages if s.done}
    working = run.progress or {}
    left = [name for name in working.get("todo", []) if name not in done]
    row = {
        "state": run.state,
        "method": run.recipe.method,
        "stage": working.get("stage") if left else None,
        "done": len(done),
        "of": len(done) + len(left),
        "accuracy": pairs and pairs.accuracy,
        "on_policyness": pairs and pairs.on_policyness["both"],
        "seconds": sum(s.seconds for s in run.stages),
        "changed": max((s.time for s in run.stages), default=None),
    }
    if answers:
        row |= {k: getattr(answers, k) for k in ("score", "win_rate", "tokens")}
        row["base"] = base and base.score
    return row


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for name, inner in value.items()
        for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }
