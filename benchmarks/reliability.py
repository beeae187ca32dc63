"""What runs survive: killed anywhere, and with any of their files damaged.

python benchmarks/reliability.py --part kills [--points 200] [--recipes sso contrast rlcd]
python benchmarks/reliability.py --part kills --recipes ranks ranks-fsdp2 server ray --points 6
python benchmarks/reliability.py --part kills --recipes sweep train export merge judge --points 5
python benchmarks/reliability.py --part damages
python benchmarks/reliability.py --part fuzz [--cases 1000] [--kinds recipes queries]

Every run is a child forked from this process, which has torch loaded; so a kill costs about a
second. The points of a recipe are counted in an undisturbed run: each file that is opened for
writing, renamed or removed in the run folder (*before* it happens), each line or file of which only
a half is written (*torn*), and times drawn at random. A run is killed and resumed at one point
after the other until it is finished, then compared with the undisturbed one: files, records,
counts and weights must be the same. Runs go on where an earlier command stopped: figures are kept
in ``results/reliability.json`` and added up.

Runs of several processes (`SEVERAL`) are killed from outside: all processes at once, the command
alone, or one of the others. Whatever is killed, no process may be left two minutes after the end.

Other commands (`VERBS`) are killed like runs, and given again until they end: what they wrote, and
their ``--json``, must be the same.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import psutil

RESULTS = Path(__file__).parent / "results"

#: The tiny world, eight queries, a checkpoint after every step.
COMMON = (
    "policy={model: 'package:selfsteer.testbed/checkpoint', threads: 1, dtype: float32}",
    "queries={path: '{data}/prompts.jsonl', limit: 8}",
    "sampling.max_new_tokens=64",
    "sampling.shard_size=4",
    "sampling.batch_size=4",
    "training.batch_size=4",
    "training.epochs=2",
    "training.save_every_steps=1",
    "seed=7",
)
PRINCIPLED = ("principles={mode: picked, features: random}",)
GIVEN = "queries={path: '{data}/given.jsonl', limit: 8}"
ORACLE = "judge=oracle"
EVALUATED = (
    "evaluation.queries={path: '{data}/held-out.jsonl', limit: 3}",
    ORACLE,
)

#: What each method needs beside `COMMON`. The tiny model cannot judge its own answers, so
#: self-rewarding is missing; its stages are those of best-of-n.
METHODS: dict[str, tuple[str, ...]] = {
    "sso": (
        *("principles={mode: generated, max_new_tokens: 96, batch_size: 8, shard_size: 4}",),
        *("generator.batch_size=4", "generator.save_every_steps=1", "baseline=pbaa", *EVALUATED),
    ),
    "pbaa": PRINCIPLED,
    "sso-online": (
        *(*PRINCIPLED, "iterations=1", "filter.near_on_policy={quantile: 0.1}"),
        "filter.gap={quantile: 0.1}",
    ),
    "contrast": (*PRINCIPLED, *EVALUATED),
    "distil": PRINCIPLED,
    "good-over-plain": PRINCIPLED,
    "bad-to-plain": (*PRINCIPLED, "iterations=2"),
    "dlma": PRINCIPLED,
    "rlcd": (*PRINCIPLED, "reward={batch_size: 4, forward_pairs: 2}"),
    "best-of-n": ("ranking={samples: 2, judge: oracle}", *EVALUATED),
    "best-of-n-principles": (*PRINCIPLED, "ranking.samples=2"),
    "pbaa-best-of-n": (*PRINCIPLED, "ranking.samples=2"),
    "sgpo": (GIVEN,),
    "spin": (GIVEN, "iterations=1"),
    "spin-judged": (GIVEN, "iterations=1", ORACLE),
    "irft": (GIVEN, "iterations=1"),
    "reward": (
        "reward={data: '{data}/pairs.jsonl', batch_size: 4, forward_pairs: 2, holdout: 0.25}",
    ),
}

#: A server whose answers depend on prompt and seed alone.
SERVER = Path(__file__).parents[1] / "tests" / "fakes.py"


@dataclass(frozen=True)
class Several:
    """A run of several processes.

    ``mark`` is in the command line of those that may be killed alone, or a variable of theirs;
    the command then ends with the exit code ``code``.
    """

    method: str
    settings: tuple[str, ...]
    mark: str
    code: int


SEVERAL = {
    "ranks": Several("bad-to-plain", ("--nproc=2",), "RANK", 3),
    "ranks-fsdp2": Several("pbaa", ("--nproc=2", "--profile=fsdp2"), "RANK", 3),
    "server": Several(
        "sso",
        (
            "principles={mode: generated, max_new_tokens: 96, shard_size: 4}",
            "sampling.batch_size=null",
            "sampling.engine={kind: openai, concurrency: 4, backoff: 0.01, "
            f"launch: '{sys.executable} {SERVER} {{model}} {{port}}'}}",
        ),
        str(SERVER),
        3,
    ),
    "ray": Several(
        "pbaa",
        ("sampling.engine={kind: ray, replicas: 2, resources: {num_cpus: 0.5}}",),
        "Replica",
        0,
    ),
}


#: Other commands. ``{data}/run`` is a finished run with adapters, ``{runs}/run`` a copy of it.
VERBS: dict[str, tuple[str, ...]] = {
    "sweep": (
        *("sweep", "smoke", "runs_dir={runs}", "name=run", "method=pbaa", "generator=null"),
        *("baseline=null", "evaluation=null", "principles={mode: picked, features: random}"),
        *("queries.limit=168", "sampling.shard_size=84", "policy.threads=1", "seed=7"),
        *("training.batch_size=16", "training.selection.points=1", "training.save_every_steps=2"),
        "training.learning_rate=1e-3,2e-4",
    ),
    "train": (
        *("train", "package:selfsteer.testbed/checkpoint", "{data}/pairs.jsonl", "objective=pbaa"),
        *("batch_size=4", "save_every_steps=1", "epochs=2", "threads=1", "dtype=float32"),
        "output={runs}/model",
    ),
    "export": ("export", "{data}/run", "--format", "parquet", "--to", "{runs}/out"),
    "export --model": ("export", "{data}/run", "--model", "--to", "{runs}/out"),
    "merge": ("merge", "{data}/run/iteration-1/policy/adapter", "{runs}/out"),
    "judge": (
        *("judge", "{runs}/run", "--judge", "oracle", "--json"),
        *("--judge", "principles:package:selfsteer.testbed/checkpoint"),
    ),
    "queries": (
        *("queries", "{data}/prompts.jsonl", "--to", "{runs}/clean.jsonl", "--holdout", "0.4"),
        *("--against", "{data}/held-out.jsonl", "--near-duplicates", "0.8"),
    ),
    "report": ("report", "{runs}/run"),
}

#: What a command says whose folder was whole when it was killed.
THERE = re.compile(r"selfsteer: \S+ is there already; choose another")


def write_data(folder: Path) -> None:
    """Prompts, conversations, and preferences: faultless answers over faulty ones."""
    from selfsteer.data.jsonl import dump_lines, write_atomic
    from selfsteer.data.records import Preference
    from selfsteer.testbed.corpus import as_query
    from selfsteer.testbed.grammar import respond
    from selfsteer.testbed.questions import questions

    rng, pairs = random.Random(0), []
    for question in rng.sample(list(questions("train")), 14):
        good = dict.fromkeys(question.features, "good")
        chosen = respond(question, good, rng)
        rejected = respond(question, dict.fromkeys(good, "odd"), rng)
        query = as_query(question)
        pairs.append(Preference(query.id, query.messages, chosen, rejected))
    write_atomic(folder / "pairs.jsonl", dump_lines(pairs))
    for name, some in (("prompts", pairs[:10]), ("held-out", pairs[10:])):
        write_atomic(folder / f"{name}.jsonl", dump_lines(p.query for p in some))
    said = (
        [*p.query.to_dict()["messages"], {"role": "assistant", "content": p.chosen}] for p in pairs
    )
    write_atomic(folder / "given.jsonl", dump_lines({"messages": m} for m in said))


def arguments(recipe: str, data: Path, runs: Path) -> list[str]:
    """The command line of a run of a method, of several processes, or of another command."""
    if recipe in VERBS:
        said = VERBS[recipe]
        return [a.replace("{data}", str(data)).replace("{runs}", str(runs)) for a in said]
    several = SEVERAL.get(recipe)
    method = several.method if several else recipe
    own = (*METHODS[method], *(several.settings if several else ()))
    common = [s for s in COMMON if method != "reward" or s.startswith(("policy", "seed"))]
    settings = {text.partition("=")[0]: text for text in (*common, *own)}  # the last one counts
    given = (text.replace("{data}", str(data)) for text in settings.values())
    return ["run", method, f"runs_dir={runs}", "name=run", *given]


# -- killing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Where a run is killed: before the n-th change of its folder, in the n-th write, or by time.

    ``stop`` asks it to stop, by SIGTERM, before the n-th change. ``logged`` kills it ``after`` so
    many seconds from the n-th line that it adds to its ledger or its metrics. ``whom`` says which
    of several processes: ``all``, the ``command``, or ``another``, by a mark of it.
    """

    kind: str
    at: float
    after: float = 0.0
    whom: str = "command"


def load() -> None:
    """Imports all that a run needs, so that its children need not."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command line does
    import torch

    import selfsteer.cli
    import selfsteer.engines.transformers
    import selfsteer.evaluation.judged_sets
    import selfsteer.judges.oracle
    import selfsteer.stages.fit
    import selfsteer.stages.fit_reward
    import selfsteer.stages.teach
    import selfsteer.view  # noqa: F401

    torch.set_num_threads(1)


#: The last words of a run that was asked to stop.
RESUMED = re.compile(r"interrupted; .*(Go on with: selfsteer run \S+|the same command resumes)\n$")


def die() -> NoReturn:
    """As a machine that loses power would end it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Counting:
    """Counts what a process changes in a folder; kills it at a given one."""

    def __init__(self, folder: Path, kill: Kill | None) -> None:
        self.folder, self.kill = str(folder), kill
        self.counts: Counter[str] = Counter()

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: told before the system is asked."""
        if event == "open":
            path, _, flags = args
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path, changes = args[0], True
        else:
            return
        if changes and isinstance(path, str | Path) and str(path).startswith(self.folder):
            if self._is_at("change"):
                die()
            if self.kill == Kill("stop", self.counts["change"]):
                os.kill(os.getpid(), signal.SIGTERM)

    def opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """``open``, whose files are killed in the middle of a write."""

        def opening(path: Any, *args: Any, **kwargs: Any) -> Any:
            file = real(path, *args, **kwargs)
            if str(path).startswith(self.folder) and set(args[0] if args else "r") & set("wa+"):
                return Torn(file, self)
            return file

        return opening

    def tear(self, file: Any, data: Any) -> None:
        """Writes, or half of it and dies."""
        if self._is_at("torn"):
            file.write(data[: len(data) // 2])
            file.flush()
            die()

    def _is_at(self, kind: str) -> bool:
        self.counts[kind] += 1
        return self.kill == Kill(kind, self.counts[kind])


class Torn:
    """A file whose writes may be cut in the middle."""

    def __init__(self, file: Any, counting: Counting) -> None:
        self._file, self._counting = file, counting

    def write(self, data: Any) -> Any:
        """As of the file."""
        self._counting.tear(self._file, data)
        return self._file.write(data)

    def writelines(self, pieces: Any) -> None:
        """As of the file."""
        for piece in pieces:
            self.write(piece)

    def __enter__(self) -> "Torn":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclass
class Ended:
    """A child's end: its exit code, negative for a signal, its words, and what it changed.

    ``struck`` has all its processes when it was killed from outside. ``seconds`` that it took.
    """

    code: int
    said: str
    counts: Mapping[str, int]
    struck: Sequence[psutil.Process] = ()
    seconds: float = 0.0


def attempt(
    args: Sequence[str], folder: Path, kill: Kill | None = None, *, mark: str = ""
) -> Ended:
    """Runs a command in a child of this process.

    Args:
        args: of the command line.
        folder: where its changes count.
        kill: where it is killed.
        mark: of its processes that may be killed alone, see `Several`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log, counts = Path(scratch, "log"), Path(scratch, "counts")
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _work(args, Counting(folder, kill), log, counts)
        struck = strike(child, kill, folder, mark) if kill and kill.kind in OUTSIDE else []
        _, status = os.waitpid(child, 0)
        told = json.loads(counts.read_text()) if counts.exists() else {}
        said = log.read_text("utf-8", "replace")
        return Ended(os.waitstatus_to_exitcode(status), said, told, struck)


#: Kinds of kills that come from outside of the process.
OUTSIDE = ("time", "logged")

#: Seconds until all processes of a run that was killed must be gone. Ray's agents look for its
#: server for a minute before they end.
LEFT_S = 120.0


def strike(child: int, kill: Kill, folder: Path, mark: str) -> list[psutil.Process]:
    """Waits for the time of a kill from outside, and kills.

    Returns:
        All processes that the run had then; none if it ended before.
    """
    began, before = time.monotonic(), logged(folder)
    due = kill.at if kill.kind == "time" else math.inf
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = time.monotonic() - began
        if due == math.inf and logged(folder) >= before + kill.at:
            due = now + kill.after
        if now >= due:
            command = psutil.Process(child)
            found = [command, *command.children(recursive=True)]
            victims = {"all": found, "command": found[:1]}.get(kill.whom)
            if victims is None:
                others = [p for p in found[1:] if is_marked(p, mark)]
                victims = others and [others[int(kill.at) % len(others)]]
            for victim in victims:
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
            if victims:
                return found
        time.sleep(0.005)
    return []


def logged(folder: Path) -> int:
    """How many lines the ledger and the metrics of the run in this folder have."""
    logs = (folder / "run" / name for name in ("ledger.jsonl", "metrics.jsonl"))
    return sum(log.read_bytes().count(b"\n") for log in logs if log.exists())


def is_marked(process: psutil.Process, mark: str) -> bool:
    """Whether a process has a mark in its command line, or a variable of that name."""
    with suppress(psutil.Error):  # it has just ended
        return mark in " ".join(process.cmdline()) or mark in process.environ()
    return False


def _work(args: Sequence[str], counting: Counting, log: Path, counts: Path) -> NoReturn:
    """The child: never returns, whatever happens."""
    code = 1
    try:
        file = open(log, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
        sys.stdout = sys.stderr = file
        for stream in (1, 2):  # those of its own children
            os.dup2(file.fileno(), stream)
        from selfsteer import cli
        from selfsteer.data import jsonl
        from selfsteer.engines import answers
        from selfsteer.run import folder

        sys.argv = ["selfsteer", *args]
        sys.addaudithook(counting.hear)
        for module in (jsonl, folder, answers):
            mock.patch.object(module, "open", counting.opened(open), create=True).start()
        try:
            cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        counts.write_text(json.dumps(counting.counts))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


# -- comparing -------------------------------------------------------------------------------------

#: What says when, where and how often work was done.
TIMED = {"ledger.jsonl", "progress.json", "lock", "day", "recipe.yaml", "resolved.json"}

#: Stores by content, whose parts depend on where a run was interrupted.
STORES = {"scores", "judgements", "usage", "superseded"}


def without_times(value: Any) -> Any:
    """JSON without seconds, and without the text of a figure that holds some."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "share")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def state(run: Path, depth: int = 0) -> dict[str, Any]:
    """All that must not depend on interruptions: files, and the ledger's counts.

    Args:
        run: a run folder.
        depth: folders between it and the runs in it, where it is none itself.
    """
    import hashlib

    from selfsteer.run.folder import RunFolder

    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run)
        if set(name.parts[depth : depth + 1]) & (STORES | TIMED):
            continue
        if path.suffix == ".json":
            found[str(name)] = without_times(json.loads(path.read_bytes()))
        elif name.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(name)] = [without_times(line) for line in lines]
        else:
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    for stage, entry in RunFolder(run).newest.items():
        kept = ("event", "fingerprint", "n_in", "n_out", "dropped")
        found[f"ledger: {stage}"] = {k: entry.get(k) for k in kept}
    return found


def differences(mine: Mapping[str, Any], undisturbed: Mapping[str, Any]) -> list[str]:
    """Names that only one has, or that differ."""
    names = mine.keys() | undisturbed.keys()
    return sorted(n for n in names if mine.get(n) != undisturbed.get(n))


@dataclass
class Outcome:
    """What became of a recipe's runs."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    #: runs that ended otherwise than the undisturbed one, by what differs
    lost: list[str] = field(default_factory=list)
    #: resumed runs that failed, by their last words
    failed: list[str] = field(default_factory=list)


def result(recipe: str, runs: Path, said: str) -> dict[str, Any]:
    """What a run made, or another command made and said."""
    if recipe not in VERBS:
        return state(runs / "run")
    found = state(runs, 2 if recipe == "sweep" else 1)
    if "--json" in VERBS[recipe] and (begins := re.search(r"^\{", said, re.MULTILINE)):
        found["said"] = without_times(json.JSONDecoder().raw_decode(said, begins.start())[0])
    return found


def begin(recipe: str, folder: Path, name: str) -> tuple[Path, list[str]]:
    """An empty folder for a run or another command, and its command line.

    Raises:
        RuntimeError: the run that it needs fails.
    """
    data = folder / "data"
    # what other commands write may name its place, which must be the same then
    runs = folder / ("runs" if recipe in VERBS else name)
    shutil.rmtree(runs, ignore_errors=True)
    args = arguments(recipe, data, runs)
    if {f"{data}/run", f"{runs}/run"} & {a.partition("/iteration-1")[0] for a in args}:
        if not (data / "run").exists():
            lora = "policy.lora={rank: 2}"
            made = attempt([*arguments("pbaa", data, data), *EVALUATED[1:], lora], data)
            if made.code:
                raise RuntimeError(f"no run for {recipe}: {made.said}")
        if f"{runs}/run" in args:
            shutil.copytree(data / "run", runs / "run")
    return runs, args


def undisturbed(method: str, folder: Path) -> tuple[dict[str, Any], Ended]:
    """A whole run's state and end.

    Raises:
        RuntimeError: it failed by itself.
    """
    write_data(folder / "data")
    runs, args = begin(method, folder, "calm")
    began = time.monotonic()
    ended = attempt(args, runs)
    if ended.code:
        raise RuntimeError(f"{method} does not run: {ended.said}")
    ended.counts = {**ended.counts, "logged": logged(runs)}
    ended.seconds = time.monotonic() - began
    return result(method, runs, ended.said), ended


def killed(
    method: str, folder: Path, calm: Mapping[str, Any], kills: Sequence[Kill], outcome: Outcome
) -> None:
    """Kills a run at one point after the other, resumes it each time, compares in the end."""
    runs, args = begin(method, folder, "rough")
    several = SEVERAL.get(method)
    struck: list[psutil.Process] = []
    for kill in [*kills, None]:
        ended = attempt(args, runs, kill, mark=several.mark if several else "")
        struck += ended.struck
        stopped = ended.code == 128 + signal.SIGTERM and RESUMED.search(ended.said)
        lost_one = several is not None and bool(ended.struck) and ended.code == several.code
        if "Traceback" in ended.said:
            outcome.failed.append(f"{kill}: {ended.said[-2000:]}")
            return
        if kill and (stopped or ended.code == -signal.SIGKILL or lost_one):
            outcome.kills[kill.whom if several else kill.kind] += 1
            if not ended.code:
                break
        elif ended.code and not (method in VERBS and THERE.search(ended.said)):
            outcome.failed.append(f"{kill}: {ended.said[-2000:]}")
            return
        else:
            break
    outcome.runs += 1
    for process in psutil.wait_procs(struck, timeout=LEFT_S)[1]:
        outcome.lost.append(f"{kills}: left is process {' '.join(process.cmdline()).strip()}")
        process.kill()
    if differing := differences(result(method, runs, ended.said), calm):
        outcome.lost.append(f"{kills}: {differing}")


def chain(
    rng: random.Random,
    counts: Mapping[str, int],
    seconds: float,
    kills: int,
    *,
    weights: tuple[int, int, int, int] = (5, 3, 1, 1),
) -> list[Kill]:
    """Points one after the other: mostly a few changes apart, so that a run meets many of them.

    Args:
        rng: draws them.
        counts: what an undisturbed run has of each kind.
        seconds: that it took.
        kills: how many.
        weights: of changes, torn writes, stops and times.
    """
    made = []
    for _ in range(kills):
        kind = rng.choices(("change", "torn", "stop", "time"), weights)[0]
        if kind == "time":
            made.append(Kill(kind, round(rng.uniform(0.05, max(seconds, 0.1)), 3)))
        else:
            most = counts.get("torn" if kind == "torn" else "change", 0) * 0.6
            made.append(Kill(kind, 1 + int(rng.random() ** 2 * most)))
    return made


def chain_of_several(
    rng: random.Random, counts: Mapping[str, int], seconds: float, kills: int
) -> list[Kill]:
    """As `chain`, but from outside: all processes, the command or another one.

    Another one comes last, because a run on Ray goes on without it.
    """
    made, whoms = [], rng.choices(("all", "command", "another"), k=kills)
    for whom in sorted(whoms, key="another".__eq__):
        if rng.random() < 1 / 3:
            kill = Kill("time", rng.uniform(0.05, seconds), whom=whom)
        else:
            at = 1 + int(rng.random() ** 2 * counts["logged"] * 0.6)
            kill = Kill("logged", at, after=rng.random(), whom=whom)
        made.append(kill)
    return made


def part_kills(
    found: dict[str, Any], recipes: Sequence[str], points: int, per_run: int
) -> Iterator[None]:
    """Kills runs of each recipe until so many points more were met; adds to what was found.

    Yields:
        After each run that was compared.
    """
    load()
    for method in recipes:
        known = found.setdefault(method, {"kills": {}, "runs": 0, "lost": [], "failed": []})
        before, began = sum(known["kills"].values()), time.monotonic()
        outcome = Outcome(
            Counter(known["kills"]), known["runs"], lost=known["lost"], failed=known["failed"]
        )
        with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
            calm, ended = undisturbed(method, Path(scratch))
            known |= {"seconds": round(ended.seconds, 1), "changes": dict(ended.counts)}
            while sum(outcome.kills.values()) < before + points and not outcome.failed:
                # the runs count too: a chain that met no point would be drawn again
                rng = random.Random(f"{method} {sum(outcome.kills.values())} {outcome.runs}")
                draw: Callable[..., list[Kill]] = chain_of_several if method in SEVERAL else chain
                if method in VERBS:  # all of them end at once when they are asked to
                    draw = partial(chain, weights=(5, 3, 0, 2))
                kills = draw(rng, ended.counts, ended.seconds, per_run)
                killed(method, Path(scratch), calm, kills, outcome)
                known |= {"kills": dict(sorted(outcome.kills.items())), "runs": outcome.runs}
                yield
        took = time.monotonic() - began
        print(f"{method}: {sum(outcome.kills.values()) - before} kills in {took:.0f} s", flush=True)


# -- damages ---------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """One bit of the byte in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "emptied": lambda data: b"",
    "a bit flipped": flipped,
    "cut in half": lambda data: data[: len(data) // 2],
    "null": lambda data: b"null",
    "no text": lambda data: b"\xff",
    "other JSON": lambda data: b'{"event": 1, "models": [], "preferences": {}}\n',
    "deleted": lambda data: None,
}

#: What reads a run folder; a second with ``--redo`` would make it whole.
READERS = (("show", "--json"), ("run", "--dry-run"), ("compare", "--json"), ("export",))


def part_damages(found: dict[str, Any], recipes: Sequence[str]) -> Iterator[None]:
    """Damages each file of a finished run in each way, and asks every reader.

    Counted are: the file is named (exit code 3), or the answer is that of the undamaged run. An
    answer that differs, or a traceback, is a loss. Without a file, or the end of the ledger, the
    run is one that has not come that far, and is shown as such.

    Yields:
        After each recipe's run.
    """
    load()
    for method in recipes:
        counts: Counter[str] = Counter()
        losses: list[str] = []
        with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
            undisturbed(method, Path(scratch))
            run = Path(scratch) / "calm" / "run"
            whole = {reader: _read(reader, run, Path(scratch)) for reader in READERS}
            files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != "recipe.yaml")
            for path, damage in product(files, DAMAGES):
                data = path.read_bytes()
                changed = DAMAGES[damage](data)
                if changed == data:
                    continue
                path.unlink() if changed is None else path.write_bytes(changed)
                counts["damages"] += 1
                for reader in READERS:
                    case = f"{path.relative_to(run)}, {damage}, {reader[0]}"
                    ended = _read(reader, run, Path(scratch))
                    if "Traceback" in ended.said:
                        losses.append(f"{case}: {ended.said[-500:]}")
                    elif (ended.code, ended.said) == (whole[reader].code, whole[reader].said):
                        counts["the same answer"] += 1
                    elif ended.code:
                        counts[f"exit code {ended.code}"] += 1
                    elif not path.exists() or path.name == "ledger.jsonl":
                        counts["unfinished"] += 1
                    else:
                        losses.append(f"{case}: another answer")
                path.write_bytes(data)
        found[method] = {**counts, "lost": losses}
        yield


def _read(reader: Sequence[str], run: Path, scratch: Path) -> Ended:
    shutil.rmtree(scratch / "to", ignore_errors=True)
    more = ("--to", str(scratch / "to")) if reader[0] == "export" else ()
    return attempt([reader[0], str(run), *reader[1:], *more], scratch / "nowhere")


# -- hostile inputs --------------------------------------------------------------------------------


def part_fuzz(found: dict[str, Any], kinds: Sequence[str], cases: int) -> Iterator[None]:
    """Tries so many further cases of each kind (``tests/reliability/fuzz.py``).

    Yields:
        After each kind.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.reliability.fuzz import KINDS, fuzz

    counted = ("cases", "accepted", "refused", "tracebacks", "hangs", "losses", "seconds")
    for kind in kinds or KINDS:
        known = found.setdefault(kind, {"lost": [], "slowest_s": 0.0, **dict.fromkeys(counted, 0)})
        tally = fuzz(kind, 0, range(known["cases"], known["cases"] + cases))
        known |= {name: round(known[name] + getattr(tally, name), 1) for name in counted}
        known["slowest_s"] = round(max(known["slowest_s"], tally.slowest_s), 2)
        known["lost"] += tally.found
        print(f"{kind}: {tally.cases:,} cases in {tally.seconds:.0f} s", flush=True)
        yield


# -- the page --------------------------------------------------------------------------------------


def page(results: Mapping[str, Any]) -> str:
    """``reliability.md``."""
    text = [
        "# What runs survive",
        "",
        f"`python benchmarks/reliability.py`, {results['where']}, {results['when']}.",
    ]
    if kills := results.get("kills"):
        total = sum(sum(k["kills"].values()) for k in kills.values())
        lost = sum(len(k["lost"]) + len(k["failed"]) for k in kills.values())
        text += [
            "",
            f"## Kills: {total:,} points, {lost} losses",
            "",
            "A run is killed (SIGKILL) or stopped, and resumed, at one point after the other. Then "
            "its files, counts and weights are compared with those of an undisturbed run.",
            "",
            "| method | killed before a change | within a write | at a random time | "
            "stopped (SIGTERM) | runs compared | other results | failures |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, k in kills.items():
            if method in SEVERAL or method in VERBS:
                continue
            points = [k["kills"].get(kind, 0) for kind in ("change", "torn", "time", "stop")]
            ends = [k["runs"], len(k["lost"]), len(k["failed"])]
            text.append(f"| {method} | {' | '.join(map(str, points + ends))} |")
    if several := {name: k for name, k in (kills or {}).items() if name in SEVERAL}:
        text += [
            "",
            "Runs of several processes: two ranks (gloo), also with sharded weights (FSDP2), a "
            "server that the run launches, two replicas of Ray. They are killed (SIGKILL) some "
            "time after a line of the ledger or of the metrics, or at a random time. `another` is "
            "a rank, the server (or what watches it) or a replica. All processes must be gone two "
            "minutes after the end of the run.",
            "",
            "| run | all processes killed | the command alone | another alone | "
            "runs compared | other results | failures |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, k in several.items():
            points = [k["kills"].get(whom, 0) for whom in ("all", "command", "another")]
            ends = [k["runs"], len(k["lost"]), len(k["failed"])]
            text.append(f"| {name} | {' | '.join(map(str, points + ends))} |")
    if verbs := {name: k for name, k in (kills or {}).items() if name in VERBS}:
        text += [
            "",
            "Other commands are killed (SIGKILL) and given again until they end. What they wrote "
            "and their `--json` are compared with those of an undisturbed one.",
            "",
            "| command | killed before a change | within a write | at a random time | "
            "compared | other results | failures |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, k in verbs.items():
            points = [k["kills"].get(kind, 0) for kind in ("change", "torn", "time")]
            ends = [k["runs"], len(k["lost"]), len(k["failed"])]
            text.append(f"| {name} | {' | '.join(map(str, points + ends))} |")
    if damages := results.get("damages"):
        text += [
            "",
            "## Damages",
            "",
            "Each file of a finished run but recipe.yaml, which is its user's, is damaged in each "
            f"of these ways: {', '.join(DAMAGES)}. Then {', '.join(f'`{r[0]}`' for r in READERS)} "
            "read the run.",
            "",
            "| method | damages | exit code 3 | exit code 2 | "
            "the undamaged run's answer | shown as unfinished | wrong answers, tracebacks |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, d in damages.items():
            names = ("damages", "exit code 3", "exit code 2", "the same answer", "unfinished")
            values = [*(d.get(n, 0) for n in names), len(d["lost"])]
            text.append(f"| {method} | {' | '.join(f'{v:,}' for v in values)} |")
    if fuzzed := results.get("fuzz"):
        total = sum(kind["cases"] for kind in fuzzed.values())
        text += [
            "",
            f"## Hostile inputs: {total:,} cases",
            "",
            "Random and mutated inputs of each kind (`tests/reliability/fuzz.py`). One is used, "
            "or refused in one paragraph with exit code 2 or 3. Anything else is a fault: a "
            "traceback, more than 10 s, or a record that neither comes out nor is counted as "
            "dropped. A case of `server` is 40 requests to a server.",
            "",
            "| inputs | cases | used | refused | tracebacks | hangs | losses | cases per s | "
            "slowest, s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for kind, k in fuzzed.items():
            names = ("cases", "accepted", "refused", "tracebacks", "hangs", "losses")
            counts = " | ".join(f"{k[name]:,}" for name in names)
            speed = f"{k['cases'] / max(k['seconds'], 0.1):,.0f}"
            text.append(f"| {kind} | {counts} | {speed} | {k['slowest_s']:.2f} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Parses the command line and adds to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=("kills", "damages", "fuzz"), required=True)
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=[*METHODS, *SEVERAL, *VERBS],
        default=["sso", "contrast", "rlcd"],
    )
    parser.add_argument("--points", type=int, default=70, help="kills more of each recipe")
    parser.add_argument("--per-run", type=int, default=8, help="kills of one run at most")
    parser.add_argument("--kinds", nargs="+", default=[], help="of hostile inputs; default: all")
    parser.add_argument("--cases", type=int, default=1000, help="hostile inputs more of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    from selfsteer.data.jsonl import write_atomic

    stored = given.out / "reliability.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    found = results.setdefault(given.part, {})
    results["where"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    results["when"] = time.strftime("%Y-%m-%d")
    parts = {
        "kills": lambda: part_kills(found, given.recipes, given.points, given.per_run),
        "damages": lambda: part_damages(found, given.recipes),
        "fuzz": lambda: part_fuzz(found, given.kinds, given.cases),
    }
    for _ in parts[given.part]():
        write_atomic(stored, json.dumps(results, indent=1) + "\n")
        write_atomic(stored.with_suffix(".md"), page(results))
    lost = [x for of in found.values() for x in (*of["lost"], *of.get("failed", ()))]
    print("\n".join(lost) or "no losses")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
