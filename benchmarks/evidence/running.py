"""One cell: a run of the real command line, and the JSON that is made of it."""

import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cells
from cells import (
    ANNOTATED,
    ARMS,
    COMMON,
    PBAA,
    REWARD_JUDGE,
    SHARP_CELLS,
    STRONG_WRITER,
    SWAPPED,
    UNEVEN,
    Cell,
    swapped,
)
from measures import figures, rounded, sharpness

from selfsteer.data.digests import derive_seed, digest
from selfsteer.data.jsonl import dump_lines, read_jsonl, read_shards, write_atomic
from selfsteer.data.records import Preference, Query, Verdict
from selfsteer.judges.base import Pair
from selfsteer.judges.reward import RewardJudge
from selfsteer.principles import writer
from selfsteer.recipe.sections import JudgeConfig, resolve_path
from selfsteer.run.folder import versions
from selfsteer.testbed.corpus import answer_example, choosable
from selfsteer.testbed.questions import question
from selfsteer.testbed.world import QUERIES

#: Base model, or base and seed → held while what several cells share is made.
MAKING: defaultdict[tuple[int, ...], threading.Lock] = defaultdict(threading.Lock)


class Failed(Exception):
    """A run ended with an error; its message says which."""


def selfsteer(*words: str, log: Path) -> None:
    """The real command line, on one thread; what it says goes into a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "selfsteer.cli", *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        ended = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
    if ended.returncode != 0:
        last = log.read_text("utf-8").strip().splitlines()[-1]
        raise Failed(f"{' '.join(words[:3])} ended with {ended.returncode}: {last} (see {log})")


def base_model(base: int, runs: Path) -> str:
    """The checkpoint of a base: the shipped one, or one built with another seed or world."""
    if base == 0:
        return "package:selfsteer.testbed/checkpoint"
    folder = runs / "models" / f"base-{base}"
    with MAKING[base,]:
        if not (folder / "testbed.json").exists():
            of = (f"--seed={base % UNEVEN}", *(["--uneven"] if base >= UNEVEN else []))
            selfsteer("testbed", "build", str(folder), *of, log=runs / "logs" / "models.log")
    return str(folder)


def query_file(
    seed: int, size: int, runs: Path, *, answered: bool = False, tasks: Sequence[str] = ()
) -> Path:
    """The alignment queries of a seed; a larger set of the same seed holds the smaller one.

    ``answered``: each with an answer drawn as the testbed's training data draw theirs.
    ``tasks``: of these kinds alone.
    """
    kind = "".join([*("-" + task for task in tasks), *(["-answered"] if answered else [])])
    path = runs / "queries" / f"seed{seed}-{size}{kind}.jsonl"
    if not path.exists():
        rows = [row for _, row in read_jsonl(QUERIES["align"])]
        rows = [row for row in rows if not tasks or question(row["prompt"]).task in tasks]
        rows.sort(key=lambda row: derive_seed(seed, "evidence", row["id"]))
        chosen = sorted(rows[:size], key=lambda row: row["id"])
        if answered:
            chosen = [with_answer(row, seed) for row in chosen]
        write_atomic(path, dump_lines(chosen))
    return path


def with_answer(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """A query and a plain answer of the training data's mixed quality."""
    rng = random.Random(derive_seed(seed, "answer", row["id"]))
    example = answer_example(question(row["prompt"]), "plain", rng)
    turns = [m.to_dict() for m in example.messages]
    return {
        "id": row["id"],
        "messages": [*turns, {"role": "assistant", "content": example.response}],
    }


def principle_file(queries: Path, seed: int) -> Path:
    """Principles that name two of the features that the oracle scores an answer to a query on."""
    path = queries.with_name(f"{queries.stem}-principles.jsonl")
    if not path.exists():
        lines = []
        for _, row in read_jsonl(queries):
            rng = random.Random(derive_seed(seed, "truth", row["id"]))
            features = tuple(rng.sample(choosable(question(row["prompt"])), 2))
            lines.append({**row, "principles": writer.picked(features).to_dict()})
        write_atomic(path, dump_lines(lines))
    return path


def swapped_file(written: Path, share: int, seed: int, target: Path) -> None:
    """Principles of a run, good and bad swapped for a share of the queries, in %.

    A larger share of the same seed holds the smaller one.
    """
    rows = [row for _, row in read_jsonl(written)]
    order = sorted(rows, key=lambda row: derive_seed(seed, "swapped", row["id"]))
    for row in order[: round(len(rows) * share / 100)]:
        both = row["principles"]
        both["good"], both["bad"] = both["bad"], both["good"]
    write_atomic(target, dump_lines(rows))


def fill(cell: Cell, runs: Path) -> dict[str, Any]:
    """Runs a cell and writes its JSON; a run that was broken off goes on.

    Raises:
        Failed: the command line ended with an error.
    """
    settings, arm = cell.settings(), ARMS[cell.arm]
    assert settings is not None
    made = audited if arm.audited else train_reward if arm.sets else train_policy
    found = made(cell, runs)
    refuse_other_base(cell, found)
    result = {
        "arm": cell.arm,
        "base": cell.base,
        "seed": cell.seed,
        "settings": list(settings),
        **found,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, CPU, one thread",
        "versions": versions(),
    }
    write_atomic(cell.path, compact(json.dumps(result, indent=1)) + "\n")
    shutil.rmtree(runs / "runs" / cell.name, ignore_errors=True)
    return result


def refuse_other_base(cell: Cell, found: dict[str, Any]) -> None:
    """Refuses a cell whose base model is not that of the other arms, by what it answers.

    Bases are built where they are needed, and another version of the builder builds others.

    Raises:
        Failed: another cell's base of the same number and seed scored otherwise.
    """
    if not cell.base or cell.trial is not None or "base_scores" not in found:
        return
    for path in sorted(cells.CELLS.glob(f"*-base{cell.base}-seed{cell.seed}.json")):
        there = json.loads(path.read_text("utf-8"))
        if there.get("base_scores", found["base_scores"]) != found["base_scores"]:
            raise Failed(
                f"{cell.name} starts from another base model than {path.name}: it was built, or "
                "sampled, by another version. Remove the cells of that base, and fill them again"
            )


def run_policy(cell: Cell, runs: Path, *words: str) -> Path:
    """The run of a cell that trains a policy; its folder."""
    settings, arm = cell.settings(), ARMS[cell.arm]
    assert settings is not None
    answered = "method=spin" in settings
    queries = query_file(cell.seed, arm.size, runs, answered=answered, tasks=arm.tasks)
    given = list(settings)
    if STRONG_WRITER in settings:
        truth = str(principle_file(queries, cell.seed))
        given = [s.replace("{truth}", truth) for s in given]
    if REWARD_JUDGE in settings:
        judge = str(reward_run(Cell("reward-annotated", cell.base, cell.seed), runs) / "reward")
        given = [s.replace("{reward}", judge) for s in given]
    shared = (
        f"runs_dir={runs / 'runs'}",
        f"seed={cell.seed}",
        f"policy.model={base_model(cell.base, runs)}",
        f"queries.path={queries}",
        f"evaluation.queries.path={QUERIES[cell.split]}",
    )
    folder, log = runs / "runs" / cell.name, runs / "logs" / f"{cell.name}.log"
    wrong = next((share for share in SWAPPED if swapped(share) in settings), None)
    swaps = runs / "queries" / f"base{cell.base}-seed{cell.seed}-swapped{wrong}.jsonl"
    given = [s.replace(f"{{swapped-{wrong}}}", str(swaps)) for s in given]
    if (arm.shared or wrong) and not folder.exists():
        name = f"principles-base{cell.base}-seed{cell.seed}-{arm.size}"
        first = ("run", "demo", *shared, *COMMON, *PBAA, f"name={name}")
        with MAKING[cell.base, cell.seed]:
            selfsteer(*first, "--until", "principles", log=log)
        if arm.shared:
            copy_whole(runs / "runs" / name, folder)
        else:
            written = runs / "runs" / name / "iteration-1" / "principles.jsonl"
            swapped_file(written, wrong, cell.seed, swaps)
    selfsteer("run", "demo", *shared, *given, f"name={cell.name}", *words, log=log)
    return folder


def train_policy(cell: Cell, runs: Path) -> dict[str, Any]:
    """Figures of an arm that trains a policy; its pairs, if any, are kept for the reward models."""
    folder = run_policy(cell, runs)
    pairs = folder / "iteration-1" / "preferences"
    if pairs.exists() and not pairs_folder(cell, runs).exists():
        copy_whole(pairs, pairs_folder(cell, runs))
    found = figures(folder)
    if cell in SHARP_CELLS:
        asked = folder / "evaluation" / "answers-base.jsonl"
        last = max(folder.glob("iteration-*/policy"))
        found["sharpness"] = rounded(sharpness(str(last), asked, cell.seed))
        known = runs / "answers" / f"sharpness-base{cell.base}-seed{cell.seed}.json"
        if not known.exists():
            of_base = sharpness(resolve_path(base_model(cell.base, runs)), asked, cell.seed)
            write_atomic(known, json.dumps(rounded(of_base)))
        found["base_sharpness"] = json.loads(known.read_text("utf-8"))
    return found


def pairs_folder(cell: Cell, runs: Path) -> Path:
    """Where the pairs of a cell are kept; other settings make other pairs."""
    return runs / "pairs" / f"{cell.name}-{digest(cell.settings())}"


def pairs_of(cell: Cell, runs: Path) -> Path:
    """The pairs of a cell, made again where they are not kept."""
    kept = pairs_folder(cell, runs)
    with MAKING[cell.base, cell.seed, *cell.arm.encode()]:
        if not kept.exists():
            folder = run_policy(cell, runs, "--until", "preferences")
            copy_whole(folder / "iteration-1" / "preferences", kept)
    return kept


def judged_pairs(base: int, runs: Path) -> list[Preference]:
    """Two plain answers of the base to each final query, as the oracle ranks them."""
    name = f"test-pairs-base{base}"
    given = (f"runs_dir={runs / 'runs'}", f"name={name}", "seed=0", *COMMON, *ANNOTATED)
    model = f"policy.model={base_model(base, runs)}"
    with MAKING[base, 0, 0]:
        queries = f"queries.path={QUERIES['final']}"
        log = runs / "logs" / f"{name}.log"
        selfsteer("run", "demo", *given, model, queries, "--until", "preferences", log=log)
    shards = runs / "runs" / name / "iteration-1" / "preferences"
    return [Preference.from_dict(row) for row in read_shards(shards)]


def reward_run(cell: Cell, runs: Path) -> Path:
    """The run of a cell that trains a reward model, trained where it is not kept; its folder."""
    arm = ARMS[cell.arm]
    kept = runs / "rewards" / f"{cell.name}-{digest(cell.settings())}"
    sets = {name: pairs_of(Cell(name, cell.base, cell.seed), runs) for name in arm.sets}
    data = json.dumps([{"name": name, "path": str(path)} for name, path in sets.items()])
    with MAKING[cell.base, cell.seed, *cell.arm.encode()]:
        if not kept.exists():
            selfsteer(
                "run",
                "reward",
                f"runs_dir={runs / 'runs'}",
                f"name={cell.name}",
                f"seed={cell.seed}",
                f"policy.model={base_model(cell.base, runs)}",
                "policy.threads=1",
                f"reward.data={data}",
                "reward.max_length=512",
                *arm.settings,
                log=runs / "logs" / f"{cell.name}.log",
            )
            copy_whole(runs / "runs" / cell.name, kept)
    return kept


def train_reward(cell: Cell, runs: Path) -> dict[str, Any]:
    """Figures of a reward model: ``scores`` is 1000 for each test pair that it ranks as the oracle.

    A tie is 500. The test pairs are answers of the base, on the final queries.
    """
    folder = reward_run(cell, runs)
    pairs = judged_pairs(cell.base, runs)
    judge = RewardJudge(JudgeConfig(kind="reward", model=str(folder / "reward")), None)
    asked = [Pair(Query(p.id, p.prompt), p.chosen, p.rejected) for p in pairs]
    points = {Verdict.FIRST: 1000, Verdict.SECOND: 0}
    right = [points.get(judgement.verdict, 500) for judgement in judge.compare_all(asked)]
    report = json.loads((folder / "reward.json").read_text("utf-8"))
    entries = [e for _, e in read_jsonl(folder / "ledger.jsonl") if e["event"] == "finish"]
    return {
        "queries": digest([p.id for p in pairs]),
        "scores": right,
        "held_out": report["held_out"]["accuracy"],
        "seconds": {e["stage"]: round(e["seconds"], 1) for e in entries},
    }


def audited(cell: Cell, runs: Path) -> dict[str, Any]:
    """What `selfsteer audit` says of an arm's policy, and of its generator where it has one.

    ``changes``: label → figure → mean change against the base; 128 of the final queries.
    """
    folder = run_policy(cell, runs)
    log = runs / "logs" / f"{cell.name}.log"
    selfsteer("audit", str(folder), f"--seed={cell.seed}", log=log)
    report = json.loads((folder / "audit" / "audit.json").read_text("utf-8"))
    entries = [e for _, e in read_jsonl(folder / "ledger.jsonl") if e["event"] == "finish"]
    figures = ("score/plain", "score/good", "score/bad", "gap/good", "gap/bad")
    changes = report["changes"].items()
    return {
        "asked": report["queries"],
        "changes": {k: {f: round(v["whole"][f][0], 4) for f in figures} for k, v in changes},
        "verdicts": {label: change["verdict"] for label, change in changes},
        "base_figures": {f: round(report["models"]["base"][f], 4) for f in figures},
        "seconds": {e["stage"]: round(e["seconds"], 1) for e in entries},
    }


def compact(text: str) -> str:
    """Indented JSON with each list of plain numbers on one line."""
    return re.sub(r"\[[\s\d.,e-]+\]", lambda m: re.sub(r"\s+", "", m[0]), text)


def copy_whole(source: Path, target: Path) -> None:
    """A folder's copy that is there whole or not at all."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("lock"))
    partial.replace(target)
