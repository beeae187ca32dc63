"""Size and first paint of a report of many triples, in a real browser.

    python -m benchmarks.report runs/demo            # a finished run; two minutes

Takes a finished run and repeats its records under new ids until an iteration holds 10,000 triples
and as many preferences, and its training metrics until a training has 2,000 steps: what a report of
a large run has to read. Then writes the report and opens it in chromium, a new profile each time.
Log-probs are addressed by content, so that the repeated records find theirs.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.browsing import ARGUMENTS, CHROMIUM, DESKTOP, PHONE, Browser

ROOT = Path(__file__).parent
OPENINGS, STEPS = 7, 2000


def repeat(path: Path, count: int) -> int:
    """Repeats a JSONL file's records under new ids; returns how many there are then."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    grown = [{**rows[i % len(rows)], "id": f"q{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in grown), "utf-8")
    return len(grown)


def grow(run: Path, target: Path, count: int) -> None:
    """A copy of a run with so many triples and preferences."""
    models = shutil.ignore_patterns("*.safetensors", "report*")
    shutil.copytree(run, target, ignore=models)
    folder = target / "iteration-1"
    # one shard is as much to read as many
    for other in sorted((folder / "preferences").glob("shard-*.jsonl"))[1:]:
        other.unlink()
    for name in ("filtered.jsonl", "principles.jsonl", "preferences/shard-00000.jsonl"):
        repeat(folder / name, count)
    lines = [json.loads(x) for x in (target / "metrics.jsonl").read_text("utf-8").splitlines()]
    stages = {entry["stage"]: [e for e in lines if e["stage"] == entry["stage"]] for entry in lines}
    with open(target / "metrics.jsonl", "w", encoding="utf-8") as file:
        for entries in stages.values():
            for step in range(STEPS):
                file.write(json.dumps({**entries[step % len(entries)], "step": step + 1}) + "\n")


def paint(browser: Browser, url: str, size: tuple[int, int]) -> float:
    """Milliseconds from navigation to the first contentful paint."""
    with browser.visit(url, size) as visit:
        script = (
            "new Promise(done => new PerformanceObserver(list => done(list.getEntries()"
            ".find(e => e.name == 'first-contentful-paint').startTime))"
            ".observe({type: 'paint', buffered: true}))"
        )
        assert visit.said == []
        return float(visit.page.evaluate(script))


def measure(run: Path, count: int) -> dict[str, Any]:
    """Writes the report of a grown run and opens it."""
    from playwright.sync_api import sync_playwright

    from selfsteer.report.document import write_report

    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        grown = Path(scratch) / "run"
        grow(run, grown, count)
        wall, cpu = time.monotonic(), time.process_time()
        written = write_report(grown)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        browser = Browser(chromium)
        url = written.html.as_uri()
        paint(browser, url, DESKTOP)  # the first opening pays for the browser's own start
        paints = {
            name: [round(paint(browser, url, size), 1) for _ in range(OPENINGS)]
            for name, size in (("desktop", DESKTOP), ("phone", PHONE))
        }
        version = chromium.version
        chromium.close()
        return {
            "triples": count,
            "preferences": count,
            "steps": STEPS,
            "not_drawn": written.not_drawn,
            "html_bytes": written.html.stat().st_size,
            "first_paint_ms": paints,
            "write_seconds": round(wall, 1),
            "write_cpu_seconds": round(cpu, 1),
            "chromium": version,
        }


def table(found: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# A report of many triples",
        "",
        f"{found['date']}, {found['cores']} cores {found['cpu']} that other work shared (load "
        f"average {found['load']}), chromium {found['chromium']}, Python "
        f"{found['versions']['python']}. Made by `python -m benchmarks.report`, whose docstring "
        "says what the run is.",
        "",
        f"{found['triples']:,} triples, {found['preferences']:,} preferences, {found['steps']:,} "
        "steps in each training.",
        "",
        "| | measured | wanted |",
        "|---|---:|---:|",
        f"| report.html | {found['html_bytes'] / 1e6:.2f} MB | 5 MB |",
    ]
    for name, paints in found["first_paint_ms"].items():
        lines.append(
            f"| first contentful paint, {name}, median of {len(paints)} | "
            f"{statistics.median(paints):.0f} ms (worst {max(paints):.0f}) | 1,000 ms |"
        )
    lines.append(
        f"| writing it | {found['write_seconds']:.0f} s, {found['write_cpu_seconds']:.0f} s of "
        "CPU time | |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, writes benchmarks/results/report.{md,json}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="a finished run of one iteration")
    parser.add_argument("--triples", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    args = parser.parse_args()

    from selfsteer.data.jsonl import write_atomic
    from selfsteer.run.folder import versions

    info = Path("/proc/cpuinfo").read_text()
    names = [x.partition(":")[2].strip() for x in info.splitlines() if x.startswith("model name")]
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "cpu": names[0] if names else platform.machine(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
        **measure(args.run, args.triples),
    }
    write_atomic(args.output / "report.json", json.dumps(found, indent=1) + "\n")
    write_atomic(args.output / "report.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
