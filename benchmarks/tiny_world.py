"""SSO against PBAA on the tiny world over several seeds: the main table and the online way.

    python benchmarks/tiny_world.py                  # 5 seeds of each, two at a time
    python benchmarks/tiny_world.py --seeds 3

Resumable: each cell is a run folder under ``runs/bench``; finished ones are read, not run again.
Writes ``benchmarks/results/tiny_world.json`` and ``.md``. A seed changes sampling, the order of the
data and the choice of features; the base model and the queries stay. Generator
settings are the demo recipe's; the caveat below says what was chosen on what.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import write_atomic
from selfsteer.run.folder import versions
from selfsteer.view import RunView

ROOT = Path(__file__).parent
CAVEAT = """\
Run three times on the same seeds. Difference in score the first time (padded layout, warm-up
rounded up) +0.011 [-0.001, +0.023], the second +0.014 [+0.000, +0.027]; this is the third, with
checkpoint selection on (docs/selection.md), which holds out a tenth of the queries and lowers both
scores a little. Read the difference as a tendency. Generator settings were chosen on the tuning
half (see `tiny_world_tuning.md` for what had been seen before), the
policy's learning rate and the online settings were not searched. The online way's filter was
switched off after its scores on these final queries were seen: with it, and that warm-up, the
policy stayed exactly the base (0.636).
"""
RUNS = ROOT.parent / "runs" / "bench"
ONLINE = (
    "method=sso-online",
    "generator=null",
    "iterations=3",
    "training.base=ipo",
    "training.beta=0.2",
    "training.learning_rate=1e-4",
)
#: With v1's filter about one triple in twenty survives here, too few to train on; so the table's
#: online way runs without it, and one seed with it shows what it keeps.
UNFILTERED = (*ONLINE, "filter=false")
#: Digits shown where three say too much.
DIGITS = {"tokens": 1, "chosen_tokens": 1, "rejected_tokens": 1, "logps_rejected": 1, "pairs": 0}
#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def run(name: str, seed: int, overrides: Sequence[str]) -> RunView:
    """One cell: runs the demo recipe with overrides unless it is finished, and reads it."""
    args = [f"seed={seed}", f"name={name}-{seed}", f"runs_dir={RUNS}", "policy.threads=1"]
    command = [sys.executable, "-m", "selfsteer.cli", "run", "demo", *args, *overrides]
    start = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{name} seed {seed} failed:\n{ended.stderr}")
    print(f"{name} seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    return RunView.open(RUNS / f"{name}-{seed}")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % t interval over seeds."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T_95[min(n - 1, 9)] * spread / math.sqrt(n)


def shown(values: Sequence[float], digits: int = 3) -> str:
    """``0.862 ± 0.008``; a single value stands alone."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def cell(run: RunView) -> dict[str, Any]:
    """What the tables need of one run, per model."""
    assert run.evaluation is not None
    rounds = {r.label: r for r in run.rounds}
    out: dict[str, Any] = {}
    for label, answers in run.evaluation.models.items():
        assert answers.score is not None
        row = {"score": answers.score[0], "tokens": answers.tokens}
        if answers.win_rate is not None:
            row["win_rate"] = answers.win_rate[0]
        if label in rounds:
            quality = rounds[label].quality
            assert quality is not None
            data = quality.preferences
            row |= {
                "accuracy": data.accuracy,
                "on_policy_chosen": data.on_policyness["chosen"],
                "on_policy_rejected": data.on_policyness["rejected"],
                "logps_rejected": data.logps["rejected"],
                "pairs": data.of,
                "chosen_tokens": data.tokens["chosen"],
                "rejected_tokens": data.tokens["rejected"],
            }
        out[label] = row
    out["seconds"] = {method: run.seconds_of(method) for method in run.methods}
    return out


def table(cells: dict[int, dict[str, Any]], labels: Sequence[str], keys: Sequence[str]) -> str:
    """A markdown table: one row per model, mean ± half interval over seeds."""
    lines = ["| model | " + " | ".join(keys) + " |", "|---|" + "---|" * len(keys)]
    for label in labels:
        row = [
            shown([c[label][k] for c in cells.values()], DIGITS.get(k, 3))
            if all(k in c[label] for c in cells.values())
            else ""
            for k in keys
        ]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def differences(
    cells: dict[int, dict[str, Any]], mine: str, theirs: str, keys: Sequence[str]
) -> str:
    """The same seed's difference, averaged over seeds."""
    parts = []
    for k in keys:
        gaps = [c[mine][k] - c[theirs][k] for c in cells.values()]
        mean, half = interval(gaps)
        parts.append(f"{k} {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
    return f"{mine} minus {theirs}, paired by seed: " + "; ".join(parts) + "."


def main() -> None:
    """Runs what is missing and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    seeds = range(args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        main_jobs = {s: pool.submit(run, "main", s, ()) for s in seeds}
        online_jobs = {s: pool.submit(run, "online", s, UNFILTERED) for s in seeds}
        filtered_job = pool.submit(run, "filtered", 0, ONLINE)
        mains = {s: cell(j.result()) for s, j in main_jobs.items()}
        onlines = {s: cell(j.result()) for s, j in online_jobs.items()}
        filtered = {0: cell(filtered_job.result())}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, CPU, one thread per run",
        "versions": versions(),
        "main": mains,
        "online": onlines,
        "online_filtered": filtered,
    }
    quality = ("accuracy", "on_policy_chosen", "on_policy_rejected", "logps_rejected")
    online_labels = ["base"] + [
        f"{m}/iteration-{k}" for m in ("pbaa", "sso-online") for k in (1, 2, 3)
    ]
    text = f"""# SSO and PBAA on the tiny world

{result["date"]}; {result["hardware"]}; {args.seeds} seeds; mean ± half width of the 95 % t interval
over seeds. Made by `python benchmarks/tiny_world.py`; the numbers of each seed are in
`tiny_world.json`.

{CAVEAT}
## Generator way (the demo recipe)

{table(mains, ["base", "pbaa/iteration-1", "sso/iteration-1"], ("score", "win_rate", *quality, "tokens"))}

{differences(mains, "sso/iteration-1", "pbaa/iteration-1", ("score", *quality[:3]))}

## Online way, three iterations, IPO, without v1's filter

{table(onlines, online_labels, ("score", *quality[:1], "on_policy_rejected", "pairs", "tokens", "chosen_tokens", "rejected_tokens"))}

{differences(onlines, "sso-online/iteration-3", "pbaa/iteration-3", ("score", *quality[:1], "tokens"))}

With v1's filter (seed 0; PBAA is never filtered):

{table(filtered, [f"sso-online/iteration-{k}" for k in (1, 2, 3)], ("score", *quality[:1], "on_policy_rejected", "pairs"))}
"""  # noqa: E501
    write_atomic(ROOT / "results" / "tiny_world.json", json.dumps(result, indent=1) + "\n")
    write_atomic(ROOT / "results" / "tiny_world.md", text)
    print(text)


if __name__ == "__main__":
    main()
