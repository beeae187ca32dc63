"""How usable the data browser is with many triples: index, page, order, search, one triple.

python benchmarks/view_speed.py [--triples 100000]

Invented triples of realistic length (a query of 60 words, three responses of 120), hygiene's fate
of each, no stored log-probs. Figures are medians of a few tries in one process.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import dump_lines
from selfsteer.methods import load_recipe
from selfsteer.report.browser import Index, Wanted, build
from selfsteer.run.folder import RunFolder, versions
from selfsteer.view import RunView, Sampled

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("name=many", "policy.model=nobody/nothing", "queries.path=none.jsonl")
TRIPLES, FILTER = "iteration-1/triples", "iteration-1/filter"
SHARD = 1000


def invented(n: int, rng: random.Random) -> dict[str, Any]:
    """A triple; the n-th of its kind."""

    def text(words: int) -> str:
        return " ".join(rng.choices(VOCABULARY, k=words))

    good = text(120)
    return {
        "id": f"q{n:06d}",
        "messages": [{"role": "user", "content": text(60)}],
        "principles": {"good": text(30), "bad": text(30), "features": [rng.choice(WORDS)]},
        "responses": {"plain": good if n % 50 == 0 else text(120), "good": good, "bad": text(120)},
    }


WORDS = ("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty")
VOCABULARY = [f"{word}{n}" for word in WORDS for n in range(40)]


def make(run: Path, triples: int) -> Sampled:
    """A run that has sampled and filtered them."""
    rng = random.Random(0)
    (run / TRIPLES).mkdir(parents=True)
    (run / "resolved.json").write_text(load_recipe("sso", SETTINGS).model_dump_json())
    with (
        open(run / "iteration-1" / "filtered.jsonl", "w") as kept,
        open(run / f"{FILTER}.dropped.jsonl", "w") as dropped,
    ):
        for number in range(0, triples, SHARD):
            part = [invented(n, rng) for n in range(number, min(number + SHARD, triples))]
            (run / TRIPLES / f"shard-{number // SHARD:05d}.jsonl").write_text(dump_lines(part))
            kept.write(dump_lines(t for n, t in enumerate(part, number) if n % 50))
            lost = (t for n, t in enumerate(part, number) if not n % 50)
            dropped.write(
                dump_lines({"id": t["id"], "reason": "equals_plain", "record": t} for t in lost)
            )
    counts = {"n_in": triples, "n_out": triples, "dropped": {}, "seconds": 1.0, "notes": {}}
    where = {"method": "sso", "round": 1, "fingerprint": "f", "time": 0}
    for stage, kind, output in (
        (TRIPLES, "Sample", TRIPLES),
        (FILTER, "FilterTriples", "iteration-1/filtered.jsonl"),
    ):
        made = {"kind": kind, "title": stage.rpartition("/")[2], "outputs": [output], **counts}
        entry = {"event": "finish", "stage": stage, **where, **made}
        RunFolder(run).append("ledger.jsonl", entry)
    (found,) = RunView.open(run).sampled
    return found


def median_ms(work: Callable[[int], Any], tries: int = 5) -> list[float]:
    """Wall and CPU milliseconds; each try gets its number, so that nothing is found in a cache."""
    taken = []
    for n in range(tries):
        wall, cpu = time.perf_counter(), time.process_time()
        work(n)
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [round(1000 * statistics.median(t), 1) for t in zip(*taken, strict=True)]


def shown(value: float | list[float]) -> str:
    """A cell of the table."""
    return ", ".join(f"{v:,}" for v in value) if isinstance(value, list) else f"{value:,}"


def main() -> None:
    """Measures and writes ``results/view.{json,md}``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--triples", type=int, default=100_000)
    count = parser.parse_args().triples
    with tempfile.TemporaryDirectory() as folder:
        rows = make(Path(folder) / "many", count)
        stored = sum(p.stat().st_size for p in rows.shards)
        begin, used = time.perf_counter(), time.process_time()
        index = Index(build(rows))
        figures: dict[str, Any] = {
            "triples": count,
            "shards_mb": round(stored / 1e6),
            "index_mb": round(index.path.stat().st_size / 1e6),
            "index_s": [
                round(time.perf_counter() - begin, 1),
                round(time.process_time() - used, 1),
            ],
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "open_ms": median_ms(lambda n: Index(index.path)),
            "page_ms": median_ms(lambda n: index.page(Wanted(), 1000 * n, 50)),
            "filter_and_order_ms": median_ms(
                lambda n: index.page(
                    Wanted(fate="kept", sort="length_difference", feature=WORDS[n]), 0, 50
                )
            ),
            "search_all_texts_ms": median_ms(
                lambda n: index.page(Wanted(q=f"amber{n} heron1"), 0, 50)
            ),
            "triple_ms": median_ms(lambda n: next(index.records([count // 7 * n + 1]))),
        }
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
    }
    (RESULTS / "view.json").write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")
    lines = [
        "# The data browser with many triples",
        "",
        f"{about['date']}; {about['hardware']}, load average {about['load']}: read wall times as "
        "upper bounds.",
        "Made by `python benchmarks/view_speed.py`: invented triples of 60 + 3 × 120 words without "
        "stored",
        "log-probs, seed 0. Peak memory is of a process that also made the triples.",
        "",
        "| figure | value; of times: wall, CPU |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {shown(value)} |" for name, value in figures.items()),
        "",
    ]
    (RESULTS / "view.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
