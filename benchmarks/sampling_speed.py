"""What the pipeline keeps of the transformers engine's speed, for several sizes of shards.

    python benchmarks/sampling_speed.py              # about 8 minutes on one core

Each row is `selfsteer bench sampling` on the tiny model with the demo's prompts: the engine asked
for all answers at once, and the same prompts through the sample stage, in turns, both ways in the
same batch size. Seconds are the process's CPU time, so that other work on the machine counts
little; what the stage spends waiting for the disk is therefore timed apart.
"""

import argparse
import json
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent

#: Queries per shard, batch size, queries asked, repeats.
SIZES = (
    (512, 256, 1024, 3),
    (512, 64, 1024, 3),
    (128, 64, 512, 5),
    (32, 64, 256, 5),
    (16, 64, 256, 5),
)


def measure(shard: int, batch: int, queries: int, repeats: int) -> dict[str, Any]:
    """One row: `selfsteer.verbs.sampling_speed.bench` in CPU time."""
    from selfsteer.methods import load_recipe
    from selfsteer.verbs.common import aligning
    from selfsteer.verbs.sampling_speed import bench

    given = (f"sampling.shard_size={shard}", f"sampling.batch_size={batch}", "policy.threads=1")
    return bench(aligning(load_recipe("demo", given)), queries, repeats, clock=time.process_time)


def sync_seconds(count: int = 50) -> float:
    """Wall time of writing one shard and its mark."""
    from selfsteer.data.jsonl import write_atomic

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        start = time.perf_counter()
        for i in range(count):
            write_atomic(Path(folder) / f"{i}.jsonl", "x" * 400_000)
            write_atomic(Path(folder) / f"{i}.done.json", "{}")
        return (time.perf_counter() - start) / count


def main() -> None:
    """Measures, prints and writes ``sampling_speed.{md,json}``."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    out = parser.parse_args().out
    rows = [measure(*size) for size in SIZES]
    sync = sync_seconds()
    where = (
        f"{date.today()}, one thread of 2 cores AMD EPYC that other work shared, CPU time, seed 0, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    lines = [
        "# What the pipeline keeps of an engine's speed",
        "",
        f"{where}. Made by `python benchmarks/sampling_speed.py`, whose docstring says how. Engine "
        "transformers, the tiny model; tokens per second are medians, with lowest and highest.",
        "",
        "| queries per shard | answers per shard | batch size | direct, tokens/s | pipeline, "
        "tokens/s | kept |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ways = []
        for way in ("direct", "pipeline"):
            rates = row[way]["tokens_per_second"]
            ways.append(f"{row[way]['median']:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})")
        lines.append(
            f"| {row['shard_size']} | {2 * row['shard_size']} | {row['batch_size']} | "
            f"{' | '.join(ways)} | {row['kept']:.1%} |"
        )
    lines += [
        "",
        f"Writing a shard of 400 kB and its mark, synced, takes {1000 * sync:.0f} ms of wall time "
        "more.",
        "",
    ]
    figures = {"where": where, "rows": rows, "sync_seconds": sync}
    (out / "sampling_speed.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "sampling_speed.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
