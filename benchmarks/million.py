r"""Every stage that asks no model, on many records: does memory stay flat, and the time of each?

    python benchmarks/million.py                            # hours, and 20 GB of disk
    python benchmarks/million.py --sizes 10000 100000       # minutes
    python benchmarks/million.py --sizes 10000000 --answer-words 20 --remove --minutes 240 \
        --only queries "principles, picked" "sampling, scripted engine" preferences "export trl"

Records are made up as they are written: queries of 60 words drawn from the tiny world's, answers
of 120 words each, or of `--answer-words`. Models are scripted: the engine answers at once with
words cut out of a long text, and log-probs are made of lengths.
Everything else is the program's own code, called as the stages call it, file to file.

Each figure is measured in a process of its own, on one thread, after the same stage has worked on
64 records, so that imports and tokenizers are loaded. Seconds are the process's CPU time; the peak
is the highest resident memory of the whole process, and what comes on top of where it was before
the stage began.

With `--minutes` a stage under way is ended as well, and how far it came is a result. With
`--remove` a file goes as soon as no stage that was asked for reads it. To go on, name the stages
that are left with `--only`: each begins with what the one before it left on disk.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_speed import peak_mb, reset_peak

ROOT = Path(__file__).parent
WARM, MB = 64, 2**20
QUERY_WORDS, ANSWER_WORDS = 60, 120
SETTINGS = (
    "principles={mode: picked, features: random}",
    "sampling={max_new_tokens: 256}",
    "generator.queries=1000000000",
    "baseline=null",
    "judge=null",
    "evaluation=null",
)
#: Stages that ask for hours at a million are measured up to here.
MOST = {"queries, near-duplicates": 1_000_000, "filter by scripted log-probs": 100_000}
#: What the stages read in the folder of their size, by the first word of their names.
READS = {
    "queries": {"prompts.jsonl"},
    "principles": {"queries.jsonl"},
    "sampling": {"principles.jsonl"},
    "filter": {"triples"},
    "preferences": {"triples"},
    "training's": {"preferences"},
    "quality": {"preferences", "triples"},
    "export": {"preferences", "triples"},
}
EXPORTED = (
    "trl",
    "trl-prompts",
    "trl-unpaired",
    "llama-factory",
    "llama-factory-sharegpt",
    "distilabel",
    "chat",
    "parquet",
    "authors",
)


def words(seed: int) -> list[str]:
    """A text of words that the tiny model's tokenizer knows, as often as its queries have them."""
    from selfsteer.data.jsonl import read_jsonl
    from selfsteer.recipe.sections import resolve_path

    path = Path(resolve_path("package:selfsteer.testbed/queries/align.jsonl"))
    found = [word for _, row in read_jsonl(path) for word in row["prompt"].split()]
    return random.Random(seed).choices(found, k=200_000)


def write_prompts(path: Path, count: int, seed: int) -> None:
    """A file of prompts, unlike each other."""
    from selfsteer.data.jsonl import dump_line, write_atomic

    text, rng, piece = words(seed), random.Random(seed), QUERY_WORDS // 3
    last = len(text) - piece

    def prompt() -> str:
        found = [text[i : i + piece] for i in (int(rng.random() * last) for _ in range(3))]
        return " ".join(word for words in found for word in words) + "?"

    write_atomic(path, (dump_line({"prompt": prompt()}) for _ in range(count)))


class Scripted:
    """An engine that answers at once."""

    batch_size = None

    def __init__(self) -> None:
        self._words = words(0)
        self._length = int(os.environ.get("MILLION_ANSWER_WORDS", ANSWER_WORDS))

    def generate(
        self,
        requests: Sequence[Any],
        sampling: Any,
        advance: Callable[[int, int], None] = lambda items, tokens: None,
    ) -> Iterator[Any]:
        """Words of a text, from another place for each answer."""
        from selfsteer.engines.base import Completion

        for request in requests:
            start = request.seed % (len(self._words) - self._length)
            answer = " ".join(self._words[start : start + self._length])
            advance(1, 0)
            yield Completion(request.id, answer, "stop", QUERY_WORDS, self._length)


def placed(folder: Path, *more: str) -> dict[str, Any]:
    """The stages of the smoke recipe's round by title, as if ``folder`` were the run's."""
    from dataclasses import replace

    from selfsteer.methods import load_recipe
    from selfsteer.run.stage import Artifact, Where

    def here(value: Any) -> Any:
        made = isinstance(value, Artifact) and value.maker
        return Artifact(folder / value.path.name) if made else value

    found = {}
    for stage in load_recipe("smoke", [*SETTINGS, *more]).plan():
        fields = {name: here(value) for name, value in vars(stage).items()}
        found[stage.title] = replace(stage, **{**fields, "where": Where()})
    return found


def read_queries(folder: Path, near: float | None) -> int:
    """Prompts to ``queries.jsonl``: bounds, exact duplicates, id order, near-duplicates."""
    from selfsteer.data.queries import write_curated
    from selfsteer.recipe.sections import Queries

    settings = Queries(
        path=str(folder / "prompts.jsonl"), min_chars=10, max_chars=4000, near_duplicates=near
    )
    return int(write_curated(settings, folder / "queries.jsonl", None)["queries"])


def done(folder: Path, title: str, *more: str) -> int:
    """Runs a stage; how many records it makes."""
    from selfsteer.run.folder import RunFolder

    return int(placed(folder, *more)[title].run(RunFolder(folder)).n_out)


def principles(folder: Path) -> int:
    """Queries to picked principles."""
    return done(folder, "principles")


def sampling(folder: Path) -> int:
    """Principles to triples."""
    from selfsteer.engines.load import Engines

    engine = Scripted()
    Engines.sampler = lambda *args: engine  # type: ignore[method-assign, assignment]
    shutil.rmtree(folder / "triples", ignore_errors=True)
    return done(folder, "triples")


def hygiene(folder: Path) -> int:
    """Triples to ``filtered.jsonl``: hygiene and lengths in tokens."""
    return done(folder, "filter")


def scripted_filter(folder: Path) -> int:
    """The same with v1's filter: six sequences a triple are tokenised, their scores stored."""
    import torch

    from selfsteer.models import store

    def scripted(model: Any, sequences: Sequence[Any], **settings: Any) -> list[Any]:
        return [
            torch.full((len(s.response_ids),), -1.0 - (len(s.prompt_ids) * 7 % 11) / 20)
            for s in sequences
        ]

    store.score_sequences = scripted  # type: ignore[assignment]
    shutil.rmtree(folder / "scores", ignore_errors=True)
    left = done(folder, "filter", "filter={steering_order: false, gap: off}")
    shutil.rmtree(folder / "scores")
    return left


def preferences(folder: Path) -> int:
    """Triples to preferences, hygiene and lengths included."""
    from dataclasses import replace

    from selfsteer.run.folder import RunFolder
    from selfsteer.run.stage import Artifact

    shutil.rmtree(folder / "preferences", ignore_errors=True)
    stage = replace(placed(folder)["preferences"], samples=Artifact(folder / "triples"))
    return int(stage.run(RunFolder(folder)).n_out)


def quality(folder: Path) -> int:
    """The records that are measured, found and joined; their log-probs are scripted."""
    import torch

    from selfsteer.models import store

    def scripted(folder: Path, loaded: Any, sequences: Sequence[Any], label: str) -> list[Any]:
        return [torch.full((len(s.response_ids),), -1.0) for s in sequences]

    store.scored = scripted
    return done(folder, "quality")


def examples(folder: Path) -> int:
    """Preferences to token ids and made-up reference log-probs, then an epoch of reading them."""
    import torch

    from selfsteer.models.load import load_model
    from selfsteer.objectives import Objective
    from selfsteer.recipe.sections import Loading, resolve_path
    from selfsteer.stages.fit import encode
    from selfsteer.stages.inputs import stored_pairs
    from selfsteer.training.batches import StepSampler

    loaded = load_model(resolve_path("package:selfsteer.testbed/checkpoint"), Loading())
    pairs = stored_pairs(folder / "preferences")
    found, _, _ = encode(loaded, pairs, Objective.named("pbaa"), 2048, folder)
    found.refer(lambda part: [torch.full((len(s.response_ids),), -1.0) for s in part])
    steps = StepSampler([e.tokens() for e in found], 128, seed=0)
    return sum(len([found[i] for i in step]) for step in steps)


def export(folder: Path, fmt: str) -> int:
    """Preferences, or triples, to the files of another program."""
    from selfsteer.formats import export as write
    from selfsteer.stages.inputs import stored_preferences, stored_triples

    target = folder / f"export-{fmt}"
    shutil.rmtree(target, ignore_errors=True)
    found = stored_preferences(folder / "preferences")
    write(stored_triples(folder / "triples") if fmt == "authors" else found, fmt, target, "data")
    return len(found)


def import_back(folder: Path, fmt: str) -> int:
    """What was exported, back to our records."""
    from selfsteer.data.jsonl import dump_line, write_atomic
    from selfsteer.data.reading import import_records

    source = folder / f"export-{fmt}"
    if fmt != "parquet":
        (source,) = (p for p in source.iterdir() if p.name != "dataset_info.json")
    found = import_records(source, folder)
    write_atomic(folder / "imported.jsonl", map(dump_line, found.records))
    return len(found.records)


def tasks() -> Iterator[tuple[str, Callable[[Path], int]]]:
    """Names and what to do, in the order in which they need each other."""
    yield "queries, near-duplicates", lambda folder: read_queries(folder, 0.8)
    yield "queries", lambda folder: read_queries(folder, None)
    yield "principles, picked", principles
    yield "sampling, scripted engine", sampling
    yield "filter: hygiene, lengths", hygiene
    yield "filter by scripted log-probs", scripted_filter
    yield "preferences", preferences
    yield "training's examples", examples
    yield "quality, scripted log-probs", quality
    for fmt in EXPORTED:
        yield f"export {fmt}", lambda folder, fmt=fmt: export(folder, fmt)  # type: ignore[misc]
        yield f"import {fmt}", lambda folder, fmt=fmt: import_back(folder, fmt)  # type: ignore[misc]


def measure(task: str, folder: Path, count: int) -> dict[str, Any]:
    """One figure, in this process."""
    work = dict(tasks())[task]
    work(folder / str(WARM))
    reset_peak()
    before, start, began = peak_mb(), time.process_time(), time.time()
    out = work(folder / str(count))
    seconds = time.process_time() - start
    return {
        "task": task,
        "records": count,
        "date": time.strftime("%Y-%m-%d"),
        "out": out,
        "seconds": round(seconds, 2),
        "us_per_record": round(seconds / count * 1e6, 1),
        "peak_mb": round(peak_mb()),
        "added_mb": round(peak_mb() - before, 1),
        "written_mb": round(
            sum(p.stat().st_size for p in since(folder / str(count), began)) / MB, 1
        ),
    }


def since(folder: Path, began: float) -> list[Path]:
    """The files that were written there from a moment on."""
    found = [p for p in folder.rglob("*") if p.is_file()]
    return [p for p in found if p.stat().st_mtime >= began]


def apart(task: str, folder: Path, count: int, seconds: float | None) -> dict[str, Any]:
    """One figure, in a process of its own; what is on disk of it where the time is over before."""
    began, start = time.time(), time.monotonic()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(measure, (task, folder, count)).get(seconds)
        except multiprocessing.TimeoutError:
            (child,) = multiprocessing.active_children()
            status = Path(f"/proc/{child.pid}/status").read_text()
            ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            written = since(folder / str(count), began)
    records = 0
    for path in written:
        if re.fullmatch(r"shard-\d+\.jsonl|\..+\.jsonl\.partial", path.name):
            with open(path, "rb") as file:
                records += sum(1 for _ in file)
    return {
        "task": task,
        "records": count,
        "date": time.strftime("%Y-%m-%d"),
        "stopped_after": round((time.monotonic() - start) / 60, 1),
        "on_disk": records,
        "seconds": round(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), 2),
        "peak_mb": round(int(status.partition("VmHWM:")[2].split()[0]) / 1024),
        "written_mb": round(sum(p.stat().st_size for p in written) / MB, 1),
    }


def reads(task: str) -> set[str]:
    """Names of what a stage reads."""
    return READS.get(task.split()[0].rstrip(","), set())


def remove_read(task: str, left: Sequence[str], folder: Path) -> None:
    """Removes what a stage read and none of those that are left reads."""
    for name in reads(task).difference(*map(reads, left)):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def table(rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> str:
    """The Markdown page."""
    stopped = [r for r in rows if "on_disk" in r]
    sizes = sorted({r["records"] for r in rows if r not in stopped})
    found = {(r["task"], r["records"]): r for r in rows if "on_disk" not in r}
    shorter = {n: r["answer_words"] for (_, n), r in found.items() if "answer_words" in r}
    names, dates = list(dict.fromkeys(r["task"] for r in rows)), [r["date"] for r in rows]
    columns = [f"{what} at {n:,}" for what in ("µs", "MB") for n in sizes]
    kept, had = "kept on disk, bytes/record", header["versions"]
    lines = [
        "# A million records",
        "",
        f"{min(dates)} to {max(dates)}, one thread of {header['cores']} cores {header['cpu']} that "
        f"other work shared, CPU time, seed {header['seed']}, Python {had['python']}, numpy "
        f"{had['numpy']}, torch {had['torch']}. Made by `python "
        "benchmarks/million.py`, whose docstring says what is measured. A dash: not measured.",
        "",
        "CPU time per record, µs; and memory on top of what the process held before, MB, with the "
        "largest size's in bytes per record:",
        "",
        f"| stage | {' | '.join(columns)} | bytes/record | {kept} |",
        "|---|" + "---:|" * (2 * len(sizes) + 2),
    ]
    for name in names:
        mine = [found.get((name, n)) for n in sizes]
        last = next((r for r in reversed(mine) if r is not None), None)
        if last is None:
            continue
        each = last["added_mb"] * MB / last["records"]
        cells = [f"{r['us_per_record']:,.0f}" if r else "-" for r in mine]
        cells += [f"{r['added_mb']:,.0f}" if r else "-" for r in mine]
        sized = [r for r in mine if r and "written_mb" in r]
        disk = f"{sized[-1]['written_mb'] * MB / sized[-1]['records']:,.0f}" if sized else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {each:,.0f} | {disk} |")
    for count, words in sorted(shorter.items()):
        lines += ["", f"At {count:,} records an answer has {words} words, not {ANSWER_WORDS}."]
    for r in stopped:
        lines += [
            "",
            f"{r['records']:,} records: stopped after {r['stopped_after']:,.0f} minutes "
            f"({r['seconds']:,.0f} s of CPU time) in {r['task']}, with {r['on_disk']:,} records "
            f"and {r['written_mb']:,.0f} MB on disk; it had held {r['peak_mb']:,} MB at most.",
        ]
    return "\n".join(lines) + "\n"


def write_results(rows: Sequence[dict[str, Any]], seed: int, output: Path) -> None:
    """benchmarks/results/million.{md,json}; rows that are there already stay unless made again."""
    from selfsteer.data.jsonl import write_atomic
    from selfsteer.run.folder import versions

    info = Path("/proc/cpuinfo").read_text()
    models = [x.partition(":")[2].strip() for x in info.splitlines() if x.startswith("model name")]
    header = {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "seed": seed,
        "versions": versions(),
    }
    write_atomic(output / "million.json", json.dumps({**header, "rows": list(rows)}, indent=1))
    write_atomic(output / "million.md", table(rows, header))


def main() -> None:
    """Measures, prints, writes the results after every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", help="names of stages; default: all")
    parser.add_argument("--minutes", type=float, help="end the stage under way then")
    parser.add_argument("--answer-words", type=int, default=ANSWER_WORDS)
    parser.add_argument("--remove", action="store_true", help="files that no stage left reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-million"))
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
    os.environ["MILLION_ANSWER_WORDS"] = str(args.answer_words)
    there = args.output / "million.json"
    rows: list[dict[str, Any]] = json.loads(there.read_text())["rows"] if there.exists() else []
    order = [name for name, _ in tasks()]
    began = time.monotonic()
    chosen = {
        n: [t for t in order if (t in args.only if args.only else n <= MOST.get(t, n))]
        for n in args.sizes
    }
    for count in (WARM, *args.sizes):
        folder = args.work / str(count)
        folder.mkdir(parents=True, exist_ok=True)
        needed = count == WARM or any("prompts.jsonl" in reads(t) for t in chosen[count])
        if needed and not (folder / "prompts.jsonl").exists():
            write_prompts(folder / "prompts.jsonl", count, args.seed)
    warmed: set[str] = set()
    for count in args.sizes:
        for number, task in enumerate(chosen[count]):
            if task not in warmed:
                dict(tasks())[task](args.work / str(WARM))
                warmed.add(task)
            left = began + args.minutes * 60 - time.monotonic() if args.minutes else None
            if left is not None and left <= 0:
                print(f"stopped before {task!r} at {count:,}: {args.minutes:g} minutes are over")
                return
            made = apart(task, args.work, count, left)
            if args.answer_words != ANSWER_WORDS:
                made["answer_words"] = args.answer_words
            rows = [r for r in rows if (r["task"], r["records"]) != (task, count)] + [made]
            print(json.dumps(made), flush=True)
            write_results(
                sorted(rows, key=lambda r: order.index(r["task"])), args.seed, args.output
            )
            if "on_disk" in made:
                return
            if args.remove:
                remove_read(task, chosen[count][number + 1 :], args.work / str(count))
            if task.startswith("import "):
                shutil.rmtree(args.work / str(count) / f"export-{task.removeprefix('import ')}")
    print((args.output / "million.md").read_text())


if __name__ == "__main__":
    main()
