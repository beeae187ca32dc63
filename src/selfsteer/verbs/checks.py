"""`selfsteer check`: everything about a recipe that can be known before a night of sampling.

Cheapest first, each finding one line: ok, warning or FAILED, with what to do. What needs something
that failed is skipped; the rest goes on, so that one look shows all there is to mend. The stages'
own functions do the work, on a few queries, into a temporary folder.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.queries import load_queries
from selfsteer.data.records import Query, Triple
from selfsteer.engines.base import Engine
from selfsteer.engines.load import Engines
from selfsteer.errors import ArtifactError, SelfsteerError
from selfsteer.judges.base import Judge
from selfsteer.judges.load import load_judge
from selfsteer.methods import Aligning, Principled
from selfsteer.methods.pbaa import WithBaseline
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import LoadedModel, load_chat, load_model
from selfsteer.recipe.sections import Queries, resolve_path
from selfsteer.run.cost import Cost, Rates, Scale, disk_bytes, seconds, total
from selfsteer.run.folder import RunFolder, refuse
from selfsteer.run.stage import Artifact, Stage, Where
from selfsteer.stages.inputs import stored_triples
from selfsteer.stages.principles import WritePrinciples
from selfsteer.stages.train import Train
from selfsteer.terminal import duration
from selfsteer.verbs.common import size
from selfsteer.verbs.rehearsal import Line, drops, first_words, fit, measure, sample_some, settle

#: Share of written principles that cannot be used above which it is a warning.
FALLEN_BACK = 0.1

STYLES = {"ok": "green", "warning": "yellow", "FAILED": "bold red", "skipped": "dim"}


class Checks:
    """The lines so far, told one by one; a failure ends its own check only."""

    def __init__(self, tell: Callable[[Line], None]) -> None:
        self.lines: list[Line] = []
        self.exit_code = 0
        self._tell = tell

    @contextmanager
    def line(self, name: str) -> Iterator[Line]:
        """One check; an expected error inside becomes its FAILED line."""
        line = Line(name)
        try:
            yield line
        except SelfsteerError as e:
            line.status, line.found, line.todo = "FAILED", str(e), []
            self.exit_code = self.exit_code or e.exit_code
        self.lines.append(line)
        self._tell(line)

    def skip(self, names: str, missing: str) -> None:
        """Says in one line what could not be looked at."""
        skipped = [Line(name, "skipped", f"needs {missing}") for name in names.split()]
        self.lines += skipped
        self._tell(Line(", ".join(x.name for x in skipped), "skipped", f"needs {missing}"))


@dataclass(frozen=True)
class Probed:
    """What loading the policy told."""

    parameters: int
    bytes_per_weight: int
    context_length: int | None
    layout: str


def check(recipe: Aligning, count: int, tell: Callable[[Line], None]) -> dict[str, Any]:
    """Runs every check of a recipe; writes nothing into the run folder.

    Args:
        recipe: checked and complete.
        count: queries of the steering check, a seeded subset.
        tell: gets each line as soon as it is known.

    Returns:
        All figures: ``exit_code`` is 0, or that of the first failure (2 config and data, 3
        artifact and engine), ``checks`` the lines by name.
    """
    c = Checks(tell)
    with c.line("recipe") as line:
        beside = recipe.baseline if isinstance(recipe, WithBaseline) else None
        baseline = f", baseline {beside}" if beside else ""
        principles = recipe.principles.mode if isinstance(recipe, Principled) else "none"
        line.found = (
            f"method {recipe.method}{baseline}, {recipe.iterations} iteration(s), "
            f"principles {principles}, seed {recipe.seed}"
        )
    stages = _folder(c, recipe)
    queries, held_out = _queries(c, recipe)
    judge = _judge(c, recipe, [*queries, *held_out])
    chat = _template(c, recipe, stages)
    chosen = sorted(queries, key=lambda q: derive_seed(recipe.seed, "check", q.id))[:count]
    chosen.sort(key=lambda q: q.id)
    probed = _model(c, recipe, chosen) if chat and chosen else None
    if chat is None or probed is None:
        missing = " and ".join(
            what
            for what, there in (("queries", chosen), ("a model that answers", probed))
            if not there
        )
        c.skip("disk principles budgets sampling steering time", missing)
    else:
        scale = Scale(len(queries), len(held_out))
        todo = total(stage.cost(scale) for stage in stages)
        _disk(c, recipe, todo, probed)
    if chat is not None and probed is not None and not isinstance(recipe, Principled):
        c.skip("principles budgets sampling steering time", "a method with principles")
    elif chat is not None and probed is not None and isinstance(recipe, Principled):
        with tempfile.TemporaryDirectory(prefix="selfsteer-check-") as scratch:
            rates = _steering(c, recipe, chat, probed, queries, chosen, judge, Path(scratch))
        _time(c, stages, todo, rates)
    return {
        "recipe": recipe.name,
        "exit_code": c.exit_code,
        "checks": {line.name: asdict(line) for line in c.lines},
    }


def _folder(c: Checks, recipe: Aligning) -> list[Stage]:
    """The stages that are not done."""
    run, stages = RunFolder(recipe.folder), []
    with c.line("folder") as line:
        parent = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ArtifactError(
                f"{run.path} cannot be written: {parent} is not a folder that you may write to. "
                "Choose another runs_dir or fix its permissions."
            )
        run.check_free()
        whole = recipe.plan()
        stages = [s for s in whole if not run.is_done(s)]
        stale = run.stale(whole)
        if stale:
            refuse(run, stale)
        done = len(whole) - len(stages)
        line.figures = {"stages": len(whole), "done": done}
        line.found = f"{run.path}: " + (
            f"{done} of {len(whole)} stages done, free" if done else f"{len(whole)} stages to do"
        )
    return stages


def _queries(c: Checks, recipe: Aligning) -> tuple[Sequence[Query], Sequence[Query]]:
    def load(line: Line, settings: Queries) -> Sequence[Query]:
        queries, dropped, *_ = load_queries(settings)
        line.figures = {"queries": len(queries), "dropped": dict(dropped)}
        line.found = f"{len(queries):,} queries{drops(dropped)}"
        return queries

    queries: Sequence[Query] = []
    held_out: Sequence[Query] = []
    with c.line("queries") as line:
        queries = load(line, recipe.queries)
    if recipe.evaluation is not None:
        with c.line("evaluation") as line:
            held_out = load(line, recipe.evaluation.queries)
            seen = {q.messages for q in queries}
            overlap = sum(q.messages in seen for q in held_out)
            line.figures["overlap"] = overlap
            line.found += f", {overlap:,} of them also above" if overlap else ", none of them above"
            if overlap:
                line.warn("The evaluation is not held out. Take those queries out of one set.")
    return queries, held_out


def _judge(c: Checks, recipe: Aligning, queries: Sequence[Query]) -> Judge | None:
    judge = None
    if recipe.judge is not None:
        with c.line("judge") as line:
            found = load_judge(recipe.judge)
            assert found is not None
            found.check(queries)
            judge = found
            line.found = f"can judge answers to all {len(queries):,} queries"
    return judge


def _template(c: Checks, recipe: Aligning, stages: Sequence[Stage]) -> ChatFormat | None:
    chat = None
    with c.line("template") as line:
        for note in dict.fromkeys(n for stage in stages for n in stage.check()):
            line.warn(f"{note}. That works, but principle and query share a turn.")
        chat = load_chat(resolve_path(recipe.policy.model), recipe.policy)
        token = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)
        role = "system role" if chat.has_system_role else "no system role"
        line.found = f"{role}; {token} ends a turn"
        line.figures = {"system_role": chat.has_system_role, "end_of_turn": token}
    return chat


def _model(c: Checks, recipe: Aligning, queries: Sequence[Query]) -> Probed | None:
    """Loads the policy as training does; it leaves memory with this function."""
    loaded = None
    with c.line("model") as line:
        start = time.monotonic()
        loaded = load_model(resolve_path(recipe.policy.model), recipe.policy)
        weights = sum(p.numel() for p in loaded.model.parameters())
        dtype = str(loaded.dtype).removeprefix("torch.")
        line.figures = {
            "class": type(loaded.model).__name__,
            "parameters": weights,
            "dtype": dtype,
            "device": str(loaded.device),
            "context": loaded.context_length,
            "seconds": time.monotonic() - start,
        }
        context = f"context {loaded.context_length:,}" if loaded.context_length else "any context"
        line.found = (
            f"{type(loaded.model).__name__}, {_amount(weights)} parameters, {dtype} on "
            f"{loaded.device}, {context}"
        )
    if loaded is None:
        return None
    sequences, layout = [], None
    with c.line("engine") as line, Engines(None) as engines:
        engine = answering(recipe, loaded, engines)
        sequences = first_words(line, engine, recipe.sampling, loaded.chat, queries, recipe.seed)
    if not sequences:
        c.skip("layout", "answers")
        return None
    with c.line("layout") as line:
        layout = settle(line, loaded, sequences)
    if layout is None:
        return None
    return Probed(weights, loaded.dtype.itemsize, loaded.context_length, layout)


def answering(recipe: Aligning, loaded: LoadedModel, engines: Engines) -> Engine:
    """Who answers for the policy, which is in memory already."""
    s = recipe.sampling
    return engines.sampler(
        s.engine, loaded.source, recipe.policy.loading, s.batch_size, loaded=loaded
    )


def _disk(c: Checks, recipe: Aligning, todo: Cost, probed: Probed) -> None:
    with c.line("disk") as line:
        need = disk_bytes(
            todo,
            tokens=recipe.sampling.max_new_tokens,
            parameters=probed.parameters,
            bytes_per_weight=probed.bytes_per_weight,
            checkpoints=0 if recipe.policy.lora else recipe.keep.checkpoints,
        )
        path = recipe.folder.absolute()
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        line.figures = {"need_at_most": need, "free": free}
        parts = ", ".join(f"{k} {size(n)}" for k, n in need.items() if n)
        line.found = f"{size(free)} free; needs at most {parts or 'nothing'} (estimate)"
        if need["models"] + need["checkpoints"] > free:
            raise ArtifactError(
                f"{there} has {size(free)} free, and the models alone need about "
                f"{size(need['models'] + need['checkpoints'])} ({parts}). Choose another "
                "runs_dir, lower keep.checkpoints or train adapters (policy.lora.rank=16)."
            )
        if sum(need.values()) > free:
            line.warn("Full-length answers would not fit. Free some room or lower the budget.")


def _steering(
    c: Checks,
    recipe: Principled,
    chat: ChatFormat,
    probed: Probed,
    queries: Sequence[Query],
    chosen: Sequence[Query],
    judge: Judge | None,
    scratch: Path,
) -> Rates | None:
    """Principles, answers and figures of the chosen queries; the rates where all went well."""
    policy = resolve_path(recipe.policy.model)
    triples: list[Triple] = []
    kept: list[Triple] = []
    fits = False
    rates = None
    with c.line("principles") as line:
        start = time.monotonic()
        writer = WritePrinciples(
            Artifact(scratch),
            Artifact(Path(policy)),
            recipe.principles,
            recipe.sampling.engine,
            where=Where(folder="check"),
            seed=recipe.seed,
            loading=recipe.policy.loading,
        )
        writer.write(chosen, RunFolder(scratch))
        writing = time.monotonic() - start
        triples = list(stored_triples(scratch / writer.outputs[0]))
        sources = Counter(str(t.extra["source"]) for t in triples)
        line.figures = {"sources": dict(sources), "seconds": writing}
        line.found = ", ".join(f"{n:,} {source}" for source, n in sources.most_common())
        fallen = sum(n for source, n in sources.items() if source.startswith("fallback"))
        if fallen > FALLEN_BACK * len(triples):
            line.warn(
                f"{fallen / len(triples):.0%} of the written principles cannot be used. Set "
                "principles.mode=picked, or a stronger principles.writer."
            )
    if triples:
        with c.line("budgets") as line:
            fit(
                line,
                [s for s in recipe.plan() if isinstance(s, Train)],
                recipe.sampling.max_new_tokens,
                chat,
                probed.context_length,
                queries,
                triples,
            )
            fits = True
    if not fits:
        c.skip("sampling steering", "prompts that fit" if triples else "principles")
        return None
    with c.line("sampling") as line:
        start = time.monotonic()
        loaded = load_model(policy, recipe.policy, inference=True)
        taken = time.monotonic() - start
        with Engines(None) as engines:
            engine = answering(recipe, loaded, engines)
            kept, per_answer = sample_some(
                line,
                engine,
                triples,
                recipe.sampling,
                recipe.hygiene,
                recipe.principles.catalogue,
                seed=recipe.seed,
            )
        del loaded
    if not kept:
        c.skip("steering", "finished answers")
        return None
    with c.line("steering") as line:
        loading = recipe.policy.loading.model_copy(update={"layout": probed.layout})
        per_forward, per_judged = measure(
            line, policy, loading, kept, judge, scratch, seed=recipe.seed
        )
        # what was written for a few queries includes loading the model for them
        per_principles = max(writing - taken, 0) / len(triples)
        rates = Rates(per_principles, per_answer, per_forward, per_judged)
    return rates


def _time(c: Checks, stages: Sequence[Stage], todo: Cost, rates: Rates | None) -> None:
    if rates is None:
        c.skip("time", "the rates of sampling and scoring")
        return
    with c.line("time") as line:
        kinds = seconds(todo, rates)
        unknown = [*todo.unknown, *(["judge"] if todo.judged and rates.per_judged is None else [])]
        line.figures = {"seconds": kinds, "not_counted": unknown}
        parts = ", ".join(f"{k} {duration(s)}" for k, s in kinds.items() if s >= 1)
        line.found = (
            f"about {duration(sum(kinds.values()))} for {len(stages)} stages to do"
            + (f": {parts}" if parts else "")
            + " (estimate from the rates above)"
        )
        if unknown:
            line.warn(f"Not counted: {', '.join(unknown)}.")


def _amount(n: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g}{unit}"
    return f"{n:.0f}"
