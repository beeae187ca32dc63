"""How often the model of the tiny world writes usable principles, by what it is shown.

    python benchmarks/principles_ok.py                        # 200 queries, 3 seeds: minutes
    python benchmarks/principles_ok.py --queries 1326 --seeds 5

Through the command line (`selfsteer principles write`), with the demo recipe's settings, on the
alignment half of the queries: no training text holds them. ``ok`` is about form; ``says what it
should`` is about sense: in this world a good guideline is exactly the catalogue's sentences for
the features asked for. Writes ``benchmarks/results/principles_ok.json`` and ``.md``.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from selfsteer.data.jsonl import read_jsonl, write_atomic
from selfsteer.principles.writer import picked
from selfsteer.run.folder import versions

ROOT = Path(__file__).parent
QUERIES = "package:selfsteer.testbed/queries/align.jsonl"
MODEL = "package:selfsteer.testbed/checkpoint"
COMMON = ("principles.max_new_tokens=96", "principles.batch_size=256", "policy.threads=1")
#: What it was trained on; v2's prompt, which it has never seen; the same with three candidates.
WAYS = {
    "query and features": (),
    "query alone": ("principles.written_from=query",),
    "query alone, 3 candidates": ("principles.written_from=query", "principles.candidates=3"),
}


def write(way: str, seed: int, limit: int, folder: Path) -> dict[str, Any]:
    """One file of principles: its outcome counts, and how many say what they should."""
    path = folder / f"{list(WAYS).index(way)}-{seed}.jsonl"
    args = ["principles", "write", QUERIES, "--model", MODEL, "--to", str(path), "--json"]
    command = [sys.executable, "-m", "selfsteer.cli", *args, f"seed={seed}", *COMMON, *WAYS[way]]
    command.append(f"queries.limit={limit}")
    start = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(ended.stderr)
    report = json.loads(ended.stdout)
    exact = sum(
        line["principles"] == picked(tuple(line["principles"]["features"])).to_dict()
        for _, line in read_jsonl(path)
        if line["source"] == "generated"
    )
    return {
        "way": way,
        "seed": seed,
        "queries": report["n_out"],
        "first_try": report["first_try"],
        "retry": report.get("retry", {}),
        "sources": report["sources"],
        "exact": exact,
        "seconds": round(time.monotonic() - start, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line per way: means over seeds, and what the first answers were."""
    lines = [
        "| writer sees | answers `ok` at first | queries written in the end | says what it should |"
        " what else the first answers were |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        mine = [r for r in rows if r["way"] == way]
        if not mine:
            continue
        ok = [r["first_try"].get("ok", 0) / sum(r["first_try"].values()) for r in mine]
        end = [r["sources"].get("generated", 0) / r["queries"] for r in mine]
        exact = [r["exact"] / r["queries"] for r in mine]
        first = sum((Counter(r["first_try"]) for r in mine), Counter())
        total = sum(first.values())
        rest = ", ".join(
            f"{name} {n / total:.2%}" for name, n in first.most_common() if name != "ok"
        )
        lines.append(
            f"| {way} | {fmean(ok):.2%} ({min(ok):.2%} to {max(ok):.2%}) | {fmean(end):.2%} | "
            f"{fmean(exact):.2%} | {rest or 'none'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=200)
    given = parser.parse_args()
    seeds = range(given.seeds)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for way in WAYS:
            for seed in seeds:
                rows.append(write(way, seed, given.queries, Path(folder)))
                print(json.dumps(rows[-1]), file=sys.stderr)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, one CPU thread",
        "versions": versions(),
        "seeds": list(seeds),
        "settings": list(COMMON),
    }
    text = f"""# Usable principles on the tiny world

{rows[0]["queries"]:,} queries that no training text holds, {len(seeds)} seed(s), one retry. Made by
`python benchmarks/principles_ok.py`.

{table(rows)}

The model was trained on the first prompt and has never seen the second, which asks for guidelines
without naming features; the adjectives sentence still names them. `ok` is about form: two
sections, contrastive, of similar length, finished. "Says what it should" counts principles that are
word for word the catalogue's text for their features, the only right answer in this world. Without
the features in the prompt a model of this size keeps the form and loses the sense: there `ok` says
little, and the steering gap has to be looked at.

{about["date"]}, {about["machine"]}, torch {about["versions"]["torch"]}, transformers
{about["versions"]["transformers"]}, Python {about["versions"]["python"]}.
"""
    results = ROOT / "results"
    write_atomic(
        results / "principles_ok.json", json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    write_atomic(results / "principles_ok.md", text)
    print(text)


if __name__ == "__main__":
    main()
