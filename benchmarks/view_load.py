"""What `selfsteer view` takes from a run that 200 people watch.

python benchmarks/view_load.py [--readers 200] [--queries 64]

A smoke run and its page work at the same time, as two processes; readers of a third process open
the page and ask again when it says so, as the script in the page does. CPU seconds are those that
the system counts for each process and its children, of the page from the moment it answers.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from selfsteer.run.folder import versions

RESULTS = Path(__file__).parent / "results"

#: Seconds over which the readers arrive.
ARRIVAL = 10.0


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and of the children that it has waited for."""
    used = process.cpu_times()
    return float(used.user + used.system + used.children_user + used.children_system)


async def get(port: int, path: str) -> bytes:
    """The body of an answer, over a connection of its own: between turns a page has none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        )
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if b" 200 " not in head.splitlines()[0]:
        raise SystemExit(f"{path}: {head.decode()}")
    return body


async def reader(port: int, number: int, of: int, seen: dict[str, Any]) -> None:
    """One open page, until the run has ended."""
    await asyncio.sleep(ARRIVAL * number / of)
    await get(port, "/live?run=watched")
    while not seen["over"]:
        began = time.perf_counter()
        found = json.loads(await get(port, "/api/live?run=watched"))
        seen["seconds"].append(time.perf_counter() - began)
        await asyncio.sleep(found["next"])


async def watched(
    port: int, run: subprocess.Popen[bytes], readers: int
) -> tuple[float, list[float]]:
    """CPU seconds of the run, and how long each answer took its reader."""
    seen: dict[str, Any] = {"over": False, "seconds": []}
    process, used = psutil.Process(run.pid), 0.0
    tasks = [asyncio.create_task(reader(port, i, readers, seen)) for i in range(readers)]
    while run.poll() is None:
        try:
            used = cpu_seconds(process)
        except psutil.Error:
            break
        await asyncio.sleep(0.1)
    seen["over"] = True
    for task in tasks:  # those that wait for their turn would wait on
        task.cancel()
    failed = await asyncio.gather(*tasks, return_exceptions=True)
    if wrong := [e for e in failed if isinstance(e, Exception)]:
        raise wrong[0]
    return used, seen["seconds"]


def measure(readers: int, queries: int, runs: Path) -> dict[str, Any]:
    """Figures of one run."""
    command = [sys.executable, "-m", "selfsteer.cli"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    given = [f"runs_dir={runs}", "name=watched", f"queries.limit={queries}"]
    begin = time.perf_counter()
    run = subprocess.Popen([*command, "run", "smoke", *given], **quiet)
    while not (runs / "watched" / "resolved.json").exists():
        if run.poll() is not None:
            raise SystemExit(f"the run ended with {run.returncode}")
        time.sleep(0.2)
    page = subprocess.Popen(
        [*command, "view", str(runs), "--port", "0", "--json"], stdout=subprocess.PIPE
    )
    try:
        assert page.stdout is not None
        port = urlsplit(json.loads(page.stdout.readline())["url"]).port
        assert port is not None
        asyncio.run(get(port, "/"))
        process = psutil.Process(page.pid)
        started = cpu_seconds(process)
        used, seconds = asyncio.run(watched(port, run, readers))
        of_page = cpu_seconds(process) - started
    finally:
        page.terminate()
        page.wait()
    if run.wait():
        raise SystemExit(f"the run ended with {run.returncode}")
    seconds.sort()
    return {
        "readers": readers,
        "run, wall s": round(time.perf_counter() - begin, 1),
        "run, CPU s": round(used, 1),
        "page, CPU s": round(of_page, 2),
        "page, share of the run's CPU s": round(of_page / used, 4),
        "page, CPU s to start": round(started, 1),
        "answers": len(seconds),
        "answer, median ms": round(1000 * seconds[len(seconds) // 2], 1),
        "answer, 99 % ms": round(1000 * seconds[int(0.99 * len(seconds))], 1),
    }


def main() -> None:
    """Measures and writes ``results/view_load.{json,md}``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--queries", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.readers, arguments.queries, Path(folder))
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s)",
        "versions": versions(),
    }
    (RESULTS / "view_load.json").write_text(
        json.dumps({**about, "figures": figures}, indent=1) + "\n"
    )
    lines = [
        "# The page under many readers, during a run",
        "",
        f"{about['date']}; {about['hardware']}. Made by `python benchmarks/view_load.py "
        f"--readers {arguments.readers} --queries {arguments.queries}`:",
        f"a smoke run, its page and {arguments.readers} readers, who open the page within "
        f"{ARRIVAL:.0f} s and ask again when it says so. CPU",
        "seconds of the page are counted from its first answer.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:,} |" for name, value in figures.items()),
        "",
    ]
    (RESULTS / "view_load.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
