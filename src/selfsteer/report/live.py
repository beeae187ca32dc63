"""What the live pages show of a run: what it does now, its curves, its last samples; as JSON.

Everything is read from files that another process may be writing: what is cut short is left out,
never an error.
"""

import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from selfsteer.recipe.read import load_values
from selfsteer.report import summary
from selfsteer.report.rows import row_sets
from selfsteer.run.progress import progress_of

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
        return {root.resolve().name: root}
    found = {}
    for pattern in ("*/resolved.json", "*/*/resolved.json"):
        for path in sorted(root.glob(pattern)):
            folder = path.parent
            if path.resolve().is_relative_to(home) and "superseded" not in folder.parts:
                found[str(folder.relative_to(root))] = folder
    return found


def state_of(run: Path, found: dict[str, Any]) -> str:
    """``working``, ``finished``, ``killed``, ``failed``, ``interrupted``, ``silent``, ``stopped``.

    A process that ended well has finished the run unless it was told to stop after a stage.
    """
    now = progress_of(run)
    if now is not None and now["state"] != "ended":
        return str(now["state"])
    return "finished" if summary.is_finished(found) else "stopped"


def now(run: Path) -> dict[str, Any]:
    """A run's state: progress, stages, curves, last samples, result."""
    found = summary.load(run)
    recipe, stages = found["recipe"], found["stages"]
    working = progress_of(run)
    todo = list(working["todo"]) if working else []
    rows = [_stage(name, entry) for name, entry in stages.items()]
    rows += [{"name": n, "state": "to do"} for n in todo if n not in stages]
    return {
        "state": state_of(run, found),
        "folder": str(run),
        "about": _about(recipe),
        "progress": working,
        "stages": rows,
        "curves": curves(run),
        "samples": last_samples(run),
        "result": summary.sentence(found),
        "sets": [s.name for s in row_sets(run)],
    }


def _about(recipe: dict[str, Any]) -> str:
    baseline = f", baseline {recipe['baseline']}" if recipe.get("baseline") else ""
    several = "" if recipe["iterations"] == 1 else "s"
    return (
        f"method {recipe['method']}{baseline}, {recipe['iterations']} iteration{several}, policy "
        f"{recipe['policy']['model']}, seed {recipe['seed']}"
    )


def _stage(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    if entry["event"] != "finish":
        return {"name": name, "state": "begun", "began": entry["time"]}
    counts = {k: entry[k] for k in ("n_in", "n_out", "dropped", "seconds")}
    return {"name": name, "state": "done", **counts}


def curves(run: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Training stage → metric → [step, value] points, thinned to `POINTS`."""
    path = run / "metrics.jsonl"
    try:
        found = path.stat()
    except OSError:
        return {}
    return _curves(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _curves(path: Path, size: int, modified_ns: int) -> dict[str, dict[str, list[list[float]]]]:
    out: dict[str, dict[str, list[list[float]]]] = {}
    for entry in _lines(path.read_bytes()):
        stage, step = entry.get("stage"), entry.get("step")
        if not isinstance(stage, str) or not isinstance(step, int):
            continue
        for name, value in entry.items():
            if name.startswith(CURVES) and _is_finite(value):
                out.setdefault(stage, {}).setdefault(name, []).append([step, round(value, 6)])
    return {
        stage: {n: _thin(metrics[n]) for begin in CURVES for n in metrics if n.startswith(begin)}
        for stage, metrics in out.items()
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(points: list[list[float]]) -> list[list[float]]:
    step = -(-len(points) // POINTS)
    kept = points[::step]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    """JSON objects of a log; a line that is none, or not whole yet, is left out."""
    for line in data.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def last_samples(run: Path) -> dict[str, Any] | None:
    """The last triples of the shard that was finished last; None before the first."""
    shards = [(p.stat().st_mtime, p, s.name) for s in row_sets(run) for p in s.shards()]
    if not shards:
        return None
    modified, path, name = max(shards)
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
        triples = list(_lines(file.read()))[-SAMPLES:]
    kept = [
        {"id": t["id"], "query": t["messages"][-1]["content"], "responses": t["responses"]}
        for t in triples
        if {"id", "messages", "responses"} <= set(t)
    ]
    return {"set": name, "time": modified, "triples": kept}


def compare(runs: dict[str, Path]) -> list[dict[str, Any]]:
    """One row per run for the table that compares them; a folder that cannot be read says why."""
    out, settings, given = [], dict[str, dict[str, Any]](), set[str]()
    for name, run in runs.items():
        try:
            found = summary.load(run)
            out.append({"run": name, **_row(run, found)})
            settings[name] = _flat(found["recipe"])
            given |= set(_flat(load_values(str(summary.recipe_file(run)))))
        except Exception as e:  # whatever a folder holds, the others are shown
            out.append({"run": name, "state": "unreadable", "error": f"{type(e).__name__}: {e}"})
    # what somebody set, not what follows from it
    keys = sorted(given - {"name", "runs_dir", "method"})
    differing = [k for k in keys if len({json.dumps(s.get(k)) for s in settings.values()}) > 1]
    for row in out:
        mine = settings.get(row["run"], {})
        row["differs"] = {k: mine[k] for k in differing if k in mine}
    return out


def _row(run: Path, found: dict[str, Any]) -> dict[str, Any]:
    recipe, stages, evaluation = found["recipe"], found["stages"], found["evaluation"]
    method = recipe["method"]
    label = evaluation["finals"].get(method) if evaluation else None
    figures = evaluation["models"][label] if label else {}
    quality = found["quality"].get(method)
    pairs = quality[-1]["preferences"] if quality else {}
    working = progress_of(run) or {}
    done = sum(e["event"] == "finish" for e in stages.values())
    left = [n for n in working.get("todo", []) if stages.get(n, {}).get("event") != "finish"]
    times = [e["time"] for e in stages.values()]
    return {
        "state": state_of(run, found),
        "method": method,
        "stage": working.get("stage") if left else None,
        "done": done,
        "of": done + len(left),
        "score": figures.get("score"),
        "win_rate": figures.get("win_rate"),
        "base": evaluation["models"]["base"].get("score") if evaluation else None,
        "judge": evaluation["judge"] if evaluation else None,
        "accuracy": pairs.get("accuracy"),
        "on_policyness": pairs.get("on_policyness", {}).get("both"),
        "tokens": figures.get("tokens"),
        "seconds": sum(e.get("seconds", 0.0) for e in stages.values()),
        "changed": max(times, default=None),
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for name, inner in value.items()
        for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }
