"""The evidence: fills the cells that are missing and writes the page from those that are there.

    python benchmarks/evidence/run.py --list           # what is there and what is missing
    python benchmarks/evidence/run.py --minutes 60     # fill cells for an hour, then write the page
    python benchmarks/evidence/run.py --only main      # one table, with the search it needs
    python benchmarks/evidence/run.py --table          # the page alone

Resumable: a cell is one JSON under ``cells/``, a run that was broken off goes on where it was. Run
folders and the base models that are built lie in ``.runs``, or where ``--runs`` says; what is
finished is removed there.
"""

import argparse
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cells
import page
import running

from selfsteer.errors import ArtifactError
from selfsteer.run.folder import RunFolder


def states(wanted: Iterable[cells.Cell]) -> list[tuple[str, cells.Cell]]:
    """Each cell with ``done``, ``missing``, or ``waits`` where its search is not done."""
    found = []
    for cell in wanted:
        state = "done" if cell.found() else "missing" if cell.settings() else "waits"
        found.append((state, cell))
    return found


def fill(wanted: list[cells.Cell], runs: Path, jobs: int, until: float) -> int:
    """Fills what is missing, in order, and begins nothing after ``until``; how many failed.

    A cell whose search is under way is passed over until it is done.
    """
    taken: set[cells.Cell] = set()
    failed: list[cells.Cell] = []
    turn = threading.Condition()
    working = 0

    def next_cell() -> cells.Cell | None:
        while time.monotonic() < until:
            todo = [(state, c) for state, c in states(wanted) if state != "done" and c not in taken]
            ready = next((c for state, c in todo if state == "missing"), None)
            if ready or not (todo and working):
                return ready
            turn.wait()  # what another worker does may be all that is missing of a search
        return None

    def work() -> None:
        nonlocal working
        while True:
            with turn:
                cell = next_cell()
                if cell is None:
                    return
                taken.add(cell)
                working += 1
            start = time.monotonic()
            try:
                running.fill(cell, runs)
                print(f"{cell.name}: {time.monotonic() - start:.0f} s", flush=True)
            except (running.Failed, ArtifactError) as e:
                print(f"{cell.name}: {e}", file=sys.stderr, flush=True)
                failed.append(cell)
            with turn:
                working -= 1
                turn.notify_all()

    with ThreadPoolExecutor(jobs) as pool:
        for worker in [pool.submit(work) for _ in range(jobs)]:
            worker.result()
    return len(failed)


def main() -> None:
    """Lists, fills, or only writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="what is there, in order of priority")
    parser.add_argument("--only", choices=["search", *(t.name for t in cells.TABLES)])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing later")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--runs", type=Path, default=cells.HERE / ".runs", help="scratch folder")
    args = parser.parse_args()
    wanted = cells.wanted(args.only)
    if args.list:
        for state, cell in states(wanted):
            print(f"{state:<8} {cell.name}")
        return
    failed = 0
    if not args.table:
        with RunFolder(args.runs).locked():
            until = time.monotonic() + 60 * args.minutes
            failed = fill(wanted, args.runs.absolute(), args.jobs, until)
    page.write()
    print(f"{page.README}: {sum(s == 'done' for s, _ in states(wanted))} of {len(wanted)} cells")
    if failed:
        raise SystemExit(f"{failed} cells failed; the same command tries them again")


if __name__ == "__main__":
    main()
