"""Speed, memory and recall of the query curation and of v1's filter, on synthetic records.

    python benchmarks/data_speed.py                  # about 10 minutes on one core
    python benchmarks/data_speed.py --sizes 10000    # under a minute

Records are 8 to 180 words (median 60) drawn from 20,000 words by a Zipf law, one in five with a
letter outside ASCII. Each figure is measured in a process of its own, one thread, and says what
the step alone costs: records are in memory before the clock starts, and the peak is what comes on
top of them. Seconds are the process's CPU time, so that other work on the machine counts little.

- bounds + filter: length and script bounds, then v1's `steering_filter` on six means per record;
- duplicates: exact and case-folded;
- near-duplicates: MinHash LSH with the true Jaccard similarity behind it, threshold 0.8;
- decontamination: 8-grams of words against 5,000 evaluation queries;
- file to file: `write_curated`, all of it at once, JSONL in and out.

One record in 50 is planted as a near-duplicate with a Jaccard similarity just at or above 0.8, one
in 100 carries eight words of an evaluation query; recall and finds are of those.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
EVALUATION = 5_000
TASKS = ("bounds + filter", "duplicates", "near-duplicates", "decontamination", "file to file")
TARGETS = {"bounds + filter": 50_000, "near-duplicates": 2_000, "decontamination": 2_000}


def make_records(count: int, seed: int) -> tuple[list[str], list[str], dict[str, set[int]]]:
    """Texts, evaluation texts, and which texts are planted as what."""
    import numpy as np

    from selfsteer.data.curate import jaccard, shingles

    rng, draw = random.Random(seed), np.random.default_rng(seed)
    vocabulary = np.array([f"{rng.choice('bcdfglmnprst')}{i:x}o" for i in range(20_000)])
    odds = 1 / np.arange(10, 20_010)
    steps = np.cumsum(odds / odds.sum())

    def text(words: int) -> list[str]:
        drawn = vocabulary[np.searchsorted(steps, draw.random(words)).clip(max=19_999)].tolist()
        return [*drawn, "naïve"] if rng.random() < 0.2 else drawn

    def length() -> int:
        return max(8, min(180, round(rng.lognormvariate(4.1, 0.5))))

    evaluation = [text(length()) for _ in range(EVALUATION)]
    texts: list[list[str]] = []
    planted: dict[str, set[int]] = {"near": set(), "contaminated": set()}
    for i in range(count):
        if i % 50 == 49:
            source = texts[i - rng.randrange(1, 25)]
            one = _near(source, text(40), rng, shingles, jaccard)
            if one is not None:
                texts.append(one)
                planted["near"].add(i)
                continue
        one = text(length())
        if i % 100 == 3:
            other = rng.choice(evaluation)
            start = rng.randrange(len(other) - 7)
            at = rng.randrange(len(one) + 1)
            one[at:at] = other[start : start + 8]
            planted["contaminated"].add(i)
        texts.append(one)
    return [" ".join(t) for t in texts], [" ".join(t) for t in evaluation], planted


def _near(
    source: list[str],
    spare: list[str],
    rng: random.Random,
    shingles: Callable[[str], set[str]],
    jaccard: Callable[[set[str], set[str]], float],
) -> list[str] | None:
    """The source with words replaced while its similarity stays at 0.8 or above."""
    best, mine = None, shingles(" ".join(source))
    words = list(source)
    for replacement in spare:
        words[rng.randrange(len(words))] = replacement
        if jaccard(mine, shingles(" ".join(words))) < 0.8:
            break
        best = list(words)
    return best


def measure(task: str, count: int, seed: int) -> dict[str, Any]:
    """One figure, in this process."""
    import numpy as np

    from selfsteer.data import curate
    from selfsteer.data.queries import write_curated
    from selfsteer.data.records import Query
    from selfsteer.recipe.sections import Queries
    from selfsteer.stages.filter import FILTER_SEQUENCES, steering_filter

    texts, evaluation, planted = make_records(count, seed)
    queries = [Query.from_dict({"id": f"{i:08d}", "prompt": t}) for i, t in enumerate(texts)]
    index = curate.Contamination(8)
    for i, t in enumerate(evaluation):
        index.add("evaluation", Query.from_dict({"id": str(i), "prompt": t}))
    values = np.random.default_rng(seed).normal(-1, 0.3, (6, count))
    means = dict(zip(FILTER_SEQUENCES, values, strict=True))
    near = curate.NearDuplicates(0.8)
    near.add(Query.from_dict({"id": "warm", "prompt": "warm up"}))
    folder = Path(tempfile.mkdtemp())
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    (folder / "e.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in evaluation))
    found: dict[str, Any] = {}
    if task == "file to file":
        del queries  # it reads its own
    reset_peak()
    before, start = peak_mb(), time.process_time()
    if task == "bounds + filter":
        check = curate.bounds(10, 4000, ("Latin",))
        kept = [q for q in queries if check(q) is None]
        lost = sum(int(mask.sum()) for _, mask in steering_filter(means))
        found = {"kept": len(kept) - lost}
    elif task == "duplicates":
        seen = curate.Duplicates()
        found = {"kept": sum(seen.add(q) is None for q in queries)}
    elif task == "near-duplicates":
        hits = {i for i, q in enumerate(queries) if near.add(q) is not None}
        found = {"recall": len(hits & planted["near"]) / len(planted["near"]), "found": len(hits)}
        found["planted"] = len(planted["near"])
    elif task == "decontamination":
        hits = {i for i, q in enumerate(queries) if index.find(q)}
        found = {"recall": len(hits & planted["contaminated"]) / len(planted["contaminated"])}
        found |= {"found": len(hits), "planted": len(planted["contaminated"])}
    else:
        settings = Queries(
            path=str(folder / "in.jsonl"),
            min_chars=10,
            max_chars=4000,
            scripts=("Latin",),
            near_duplicates=0.8,
            against=(str(folder / "e.jsonl"),),
        )
        made = write_curated(settings, folder / "out.jsonl", 0.05)
        found = {"kept": made["queries"] + made["holdout"], "dropped": made["dropped"]}
    seconds = time.process_time() - start
    added = max(peak_mb() - before, 0)
    return {
        "task": task,
        "records": count,
        "seconds": round(seconds, 3),
        "records_per_s": round(count / seconds),
        "added_mb": round(added, 1),
        **found,
    }


def reset_peak() -> None:
    """Makes the peak of this process start from now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Peak memory since the last reset, MB."""
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def apart(task: str, count: int, seed: int) -> dict[str, Any]:
    """One figure, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (task, count, seed))


def table(rows: list[dict[str, Any]], header: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# Speed of the data machinery",
        "",
        f"{header['date']}, one thread of {header['cores']} cores {header['cpu']} that other work "
        f"shared, CPU time, seed {header['seed']}, Python "
        f"{header['versions']['python']}, numpy {header['versions']['numpy']}, datasketch "
        f"{header['versions']['datasketch']}. Made by `python benchmarks/data_speed.py`, whose "
        "docstring says what each step is.",
        "",
        "| step | records | records per CPU second | target | added peak, MB | bytes/record "
        "| planted | found of them |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        target = f"{TARGETS[r['task']]:,}" if r["task"] in TARGETS else ""
        recall = f"{r['recall']:.2%}" if "recall" in r else ""
        planted = f"{r['planted']:,}" if "planted" in r else ""
        size = f"{r['added_mb'] * 2**20 / r['records']:,.0f}"
        lines.append(
            f"| {r['task']} | {r['records']:,} | {r['records_per_s']:,} | {target} | "
            f"{r['added_mb']:,.1f} | {size} | {planted} | {recall} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, writes benchmarks/results/data_speed.{md,json}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 100_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    from importlib.metadata import version

    from selfsteer.data.jsonl import write_atomic
    from selfsteer.run.folder import versions

    rows = []
    for task in TASKS:
        for size in args.sizes:
            rows.append(apart(task, size, args.seed))
            print(json.dumps(rows[-1]), flush=True)
    info = Path("/proc/cpuinfo").read_text()
    names = [x.partition(":")[2].strip() for x in info.splitlines() if x.startswith("model name")]
    header = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "cpu": names[0] if names else platform.machine(),
        "seed": args.seed,
        "versions": {**versions(), "datasketch": version("datasketch")},
    }
    write_atomic(args.output / "data_speed.json", json.dumps({**header, "rows": rows}, indent=1))
    text = table(rows, header)
    write_atomic(args.output / "data_speed.md", text)
    print(text)


if __name__ == "__main__":
    main()
