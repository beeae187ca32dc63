"""`selfsteer check`: everything about a recipe that can be known before a night of sampling.

Cheapest first, each finding one line: ok, warning or FAILED, with what to do. What needs something
that failed is skipped; the rest goes on, so that one look shows all there is to mend. The stages'
own functions do the work, on a few queries, into a temporary folder.
"""

import math
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.curate import likeness
from selfsteer.data.digests import derive_seed
from selfsteer.data.queries import load_queries
from selfsteer.data.records import RESPONSES, Dropped, Principles, Query, Triple, Verdict
from selfsteer.engines.answers import answers
from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    REFUSED,
    Completion,
    Engine,
    Request,
    SamplingParams,
)
from selfsteer.engines.load import Engines
from selfsteer.errors import (
    ArtifactError,
    DataError,
    EngineError,
    SelfsteerError,
    listed,
    short,
)
from selfsteer.judges.base import Judge, Pair
from selfsteer.judges.checks import ChecksJudge
from selfsteer.judges.load import load_judge
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES, quality, steering, strangers
from selfsteer.judges.stats import FEW, above, known_interval, mean_interval, verdict_counts
from selfsteer.methods import METHODS, Aligning, Principled
from selfsteer.models import tree
from selfsteer.models.chat import ChatFormat, EncodedSequence
from selfsteer.models.load import LoadedModel, load_chat, load_model
from selfsteer.models.score import settle_layout, tree_difference
from selfsteer.models.store import scored
from selfsteer.principles.catalogue import load_catalogue
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.read import method_of
from selfsteer.recipe.sections import (
    ContrastRanking,
    JudgeConfig,
    Loading,
    PrincipledHygiene,
    Queries,
    Sampling,
    resolve_path,
)
from selfsteer.run.cost import Cost, Rates, Scale, disk_bytes, seconds, total
from selfsteer.run.execute import pinned, to_do
from selfsteer.run.folder import RunFolder, by_reason, refuse, refuse_absent, refuse_outdated
from selfsteer.run.stage import Artifact, Stage, Where
from selfsteer.stages.filter import Left
from selfsteer.stages.inputs import stored_triples
from selfsteer.stages.principles import WritePrinciples
from selfsteer.stages.sample import Sample, Wanted, in_contexts, params_of
from selfsteer.stages.train import Train
from selfsteer.terminal import duration, interval, progress_bar
from selfsteer.training.select import FEWEST
from selfsteer.verbs.common import amount, size
from selfsteer.verbs.planning import ASKED, Lengths, judge_asked

#: Shares above which something ordinary becomes a warning: written principles that cannot be used,
#: answers cut off, equal answers, and pairs that the judge's answer says nothing of.
FALLEN_BACK, UNFINISHED, EQUAL, UNPARSEABLE = 0.1, 0.2, 0.2, 0.2

#: A rule that this share of the plain answers keeps needs no principle.
KEPT = 0.9

#: Good answers this many times as long as bad ones, or the reverse, teach length.
LENGTH_RATIO = 2.0

#: Queries of the first round at most; how many make a verdict that the policy steers, or does not.
PILOT, ENOUGH, DECIDING = 8, 16, 32

#: A round takes so many times what the rounds before it say, at most.
SLOWER = 1.5

#: Methods that learn from how far the principles tell answers apart.
BY_CONTRAST = [method_of(m) for m in METHODS if issubclass(m, Principled) and m.by_contrast]

#: Queries and new tokens of the engine's first words.
PROBES, PROBE_TOKENS = 4, 64


@dataclass
class Line:
    """What one check found."""

    name: str
    status: str = "ok"
    found: str = ""
    todo: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def warn(self, todo: str, when: bool = True) -> None:
        """Makes it a warning, with one more thing to know or to do, where that holds."""
        if when:
            self.status = "warning"
            self.todo.append(todo)


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

    def take(self, other: "Checks", told: Iterable[Line]) -> None:
        """Takes over the lines of another one, and tells what it told."""
        self.exit_code = self.exit_code or other.exit_code
        self.lines += other.lines
        for line in told:
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
    #: Tokens per second of the first answers.
    speed: float


def check(
    recipe: Aligning, count: int, minutes: float, tell: Callable[[Line], None]
) -> dict[str, Any]:
    """Runs every check of a recipe; writes nothing into the run folder.

    Args:
        recipe: checked and complete.
        count: most queries of the steering check, a seeded subset.
        minutes: after which no more of them are taken.
        tell: gets each line as soon as it is known.

    Returns:
        All figures: ``exit_code`` is 0, or that of the first failure (2 config and data, 3
        artifact and engine), ``checks`` the lines by name.
    """
    c, began = Checks(tell), time.monotonic()
    until = began + 60 * minutes
    with c.line("recipe") as line:
        method, *beside = recipe.methods
        principles = recipe.principles.mode if isinstance(recipe, Principled) else "none"
        rounds = f"{recipe.iterations} iteration{'s' * (recipe.iterations != 1)}"
        line.found = (
            f"method {method}{''.join(f', baseline {b}' for b in beside)}, {rounds}, "
            f"principles {principles}, seed {recipe.seed}"
        )
    stages = _folder(c, recipe)
    queries, held_out = _queries(c, recipe)
    judge = _judge(c, recipe, [*queries, *held_out])
    chat, refused = _template(c, recipe, stages, queries, held_out)
    queries = [q for q in queries if q.id not in refused]
    chosen = sorted(queries, key=lambda q: derive_seed(recipe.seed, "check", q.id))[:count]
    probed = _model(c, recipe, chosen) if chosen else None
    if chat is None or probed is None:
        needed = {"queries": chosen, "a model that answers": probed}
        missing = " and ".join(what for what, there in needed.items() if not there)
        c.skip("disk principles budgets sampling steering ranking time", missing)
    else:
        costs = [stage.cost(Scale(len(queries), len(held_out))) for stage in stages]
        todo, judges = total(costs), [getattr(stage, "judge", None) for stage in stages]
        _disk(c, recipe, todo, probed)
        _judging(
            c,
            recipe,
            {s.name: (j, cost.judged) for s, j, cost in zip(stages, judges, costs, strict=True)},
        )
        if isinstance(recipe, Principled):
            with tempfile.TemporaryDirectory(prefix="selfsteer-check-") as scratch:
                probe = Probe(Path(scratch), began=began, most=len(chosen))
                rates = _steering(c, recipe, chat, probed, queries, chosen, judge, probe, until)
                if rates is None:
                    c.skip("ranking", "answers")
                else:
                    _ranking(c, recipe, probed, judge, probe, until)
            todo = _of_own_judge(recipe.judge, stages, costs, todo)
            _time(c, stages, todo, rates, _judge_cost(recipe.judge, todo.judged, probe.judged))
        else:
            c.skip("principles budgets sampling steering ranking time", "a method with principles")
    lines = {line.name: asdict(line) for line in c.lines}
    return {"recipe": recipe.name, "exit_code": c.exit_code, "checks": lines}


def _folder(c: Checks, recipe: Aligning) -> list[Stage]:
    """The stages that are not done."""
    run, stages = RunFolder(recipe.folder), list[Stage]()
    with c.line("folder") as line:
        parent = _existing(run.path)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ArtifactError(
                f"{run.path} cannot be written: {parent} is not a folder that you may write to. "
                "Choose another runs_dir or fix its permissions."
            )
        run.check_free()
        whole = pinned(recipe)[0].plan()
        stages = to_do(run, whole)
        if stale := run.stale(whole):
            refuse_absent(run, whole)
            refuse(run, stale)
        if outdated := run.outdated(whole):
            refuse_outdated(run, outdated)
        for _, fault in run.damaged(whole):
            raise fault
        done = len(whole) - len(stages)
        line.figures = {"stages": len(whole), "done": done}
        line.found = f"{run.path}: " + (
            f"{done} of {len(whole)} stages done, free" if done else f"{len(whole)} stages to do"
        )
    return stages


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


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
        selections = (s.settings.selection for s in recipe.plan() if isinstance(s, Train))
        held_back = [min(s.queries, len(queries) // 10) for s in selections if s.points]
        if held_back and max(held_back) < FEWEST:
            line.found += (
                f", too few to select checkpoints by (a tenth is fewer than {FEWEST}): the last "
                "step is kept"
            )
    if recipe.evaluation is not None:
        with c.line("evaluation") as line:
            held_out = load(line, recipe.evaluation.queries)
            seen = set(map(likeness, queries))
            overlap = sum(likeness(q) in seen for q in held_out)
            line.figures["overlap"] = overlap
            line.found += f", {overlap:,} of them also above" if overlap else ", none of them above"
            advice = "The evaluation is not held out. Take those queries out of one set."
            line.warn(advice, overlap > 0)
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


def _template(
    c: Checks,
    recipe: Aligning,
    stages: Sequence[Stage],
    queries: Sequence[Query],
    held_out: Sequence[Query],
) -> tuple[ChatFormat | None, set[str]]:
    """The chat format, and the queries of the run that the template refuses."""
    chat, refused = None, set[str]()
    with c.line("template") as line:
        for note in dict.fromkeys(n for stage in stages for n in stage.check()):
            line.warn(f"{note}.")
        loading, day = recipe.policy.loading, RunFolder(recipe.folder).day
        loading = loading.model_copy(update={"date": loading.date or day})
        chat = load_chat(resolve_path(recipe.policy.model), loading)
        token = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)
        role = "system role" if chat.has_system_role else "no system role"
        line.found = f"{role}; {token} ends a turn"
        line.figures = {
            "system_role": chat.has_system_role,
            "end_of_turn": token,
            "default_system": chat.default_system,
            "date": chat.day if chat.writes_date else None,
        }
        kept = not isinstance(recipe, Principled) or recipe.principles.system == "keep"
        if chat.default_system:
            line.found += (
                f"; writes a system prompt of its own, {short(chat.default_system)}, "
                f"{'which principles follow' if kept else 'which principles replace'}"
            )
        line.warn(
            "principles.system is replace, so plain and steered contexts differ in more than the "
            "principle.",
            bool(chat.default_system) and not kept,
        )
        if chat.writes_date:
            line.found += f"; writes today's date, {chat.day} throughout the run"
            line.warn(
                "A server writes its own date: prompts may change at midnight.",
                recipe.sampling.engine.answering.kind == "openai",
            )
        steered = isinstance(recipe, Principled)
        found = {
            "queries": _refused(chat, queries, ("plain", "good") if steered else ("plain",)),
            "evaluation": _refused(chat, held_out, ("plain",)),
        }
        refused = {*found["queries"]}
        line.figures["refused"] = {name: len(ids) for name, ids in found.items() if ids}
        for name, ids in found.items():
            line.warn(
                f"It refuses {len(ids):,} of the {name}, which will be dropped as {REFUSED}: "
                f"{listed(ids)} ({next(iter(ids.values()), '')}).",
                bool(ids),
            )
        if queries and len(refused) == len(queries):
            raise DataError(f"No query is left: {next(iter(found['queries'].values()))}.")
    return chat, refused


def _refused(
    chat: ChatFormat, queries: Sequence[Query], contexts: Sequence[str]
) -> dict[str, DataError]:
    """Why the template refuses queries in one of the contexts, by id."""
    found = {}
    for query in queries:
        try:
            for context in contexts:
                chat.prompt_text(
                    context_messages(query.messages, Principles("x", "x", ()), context)
                )
        except DataError as e:
            found[query.id] = e
    return found


def _model(c: Checks, recipe: Aligning, queries: Sequence[Query]) -> Probed | None:
    """Loads the policy as training does; it leaves memory with this function."""
    loaded, sequences, speed, layout = None, list[EncodedSequence](), 0.0, None
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
            f"{type(loaded.model).__name__}, {amount(weights)} parameters, {dtype} on "
            f"{loaded.device}, {context}"
        )
    if loaded is None:
        return None
    with c.line("engine") as line, Engines(None) as engines:
        engine = _answering(recipe, loaded, engines)
        sequences, speed = _first_words(
            line, engine, recipe.sampling, loaded.chat, queries[:PROBES], recipe.seed
        )
    if sequences:
        with c.line("layout") as line:
            layout = _settle(line, loaded, sequences)
    else:
        c.skip("layout", "answers")
    if layout is None:
        return None
    return Probed(weights, loaded.dtype.itemsize, loaded.context_length, layout, speed)


def _answering(recipe: Aligning, loaded: LoadedModel, engines: Engines) -> Engine:
    """Who answers for the policy, which is in memory already."""
    s, loading = recipe.sampling, recipe.policy.loading
    return engines.sampler(s.engine, loaded.source, loading, s.batch_size, loaded=loaded)


def _first_words(
    line: Line,
    engine: Engine,
    sampling: Sampling,
    chat: ChatFormat,
    queries: Sequence[Query],
    seed: int,
) -> tuple[list[EncodedSequence], float]:
    """Answers the queries under two seeds; returns the answers as sequences, and tokens/s.

    Raises:
        EngineError: nothing but empty answers.
    """
    s = sampling
    params = SamplingParams(s.temperature, s.top_p, min(s.max_new_tokens, PROBE_TOKENS))
    asked = [
        Request(f"{q.id}/{k}", q.messages, derive_seed(seed, "check/engine", i, k))
        for k in range(2)
        for i, q in enumerate(queries)
    ]
    start = time.monotonic()
    found = answers(engine, asked, params)
    said = [found[request.id] for request in asked]
    speed = sum(a.completion_tokens for a in said) / (time.monotonic() - start)
    whole = [a.reasoning + a.text for a in said]
    empty = whole.count("")
    if empty == len(said):
        reasons = Counter(a.finish_reason for a in said)
        raise EngineError(
            f"The policy answers nothing: {len(said)} answers, all empty "
            f"({', '.join(f'{n} {r}' for r, n in reasons.items())}). Look at what it says with "
            "another chat template, or choose another model."
        )
    halves = zip(whole[: len(queries)], whole[len(queries) :], strict=True)
    differ = sum(a != b for a, b in halves)
    line.figures = {"probes": len(queries), "differ": differ, "temperature": s.temperature}
    line.found = (
        f"answers; {differ} of {len(queries)} change with the seed"
        if s.temperature
        else "answers; greedy, as temperature is 0"
    )
    line.warn(
        f"It ignores temperature {s.temperature:g}, or is certain of every token: good, bad and "
        "plain answers will hardly differ.",
        s.temperature > 0 and not differ,
    )
    line.warn(f"{empty} of {len(said)} answers are empty; those are dropped.", empty > 0)
    sequences = [
        chat.exchange(request.messages, a.text, reasoning=a.reasoning)
        for request, a in zip(asked, said, strict=True)
        if a.completion_tokens
    ]
    return sequences, speed


def _settle(line: Line, loaded: LoadedModel, sequences: Sequence[EncodedSequence]) -> str:
    """The layout that the model settles on; the sequences should share prompts."""
    asked = loaded.layout
    with loaded.precision():
        reason = tree.obstacle(loaded.model)
        layout = settle_layout(loaded.model, asked, sequences, loaded.dtype)
        line.figures = {"asked": asked, "layout": layout}
        line.found = layout if asked == layout else f"{asked} settles on {layout}"
        if layout == "tree":
            difference = tree_difference(loaded.model, sequences)
            line.figures["difference"] = difference
            line.found += f", {difference:.1g} nats from padded on {len(sequences)} sequences"
    line.warn(
        f"Trees cannot be used: {reason}. Training is slower, its result the same."
        if reason
        else "Trees give other numbers on this model (see above), so they are not used.",
        (asked, layout) == ("auto", "padded"),
    )
    return layout


def _disk(c: Checks, recipe: Aligning, todo: Cost, probed: Probed) -> None:
    with c.line("disk") as line:
        need = disk_bytes(
            todo,
            tokens=recipe.sampling.max_new_tokens,
            parameters=probed.parameters,
            bytes_per_weight=probed.bytes_per_weight,
            checkpoints=0 if recipe.policy.lora else recipe.keep.checkpoints,
        )
        there = _existing(recipe.folder.absolute())
        free, models = shutil.disk_usage(there).free, need["models"] + need["checkpoints"]
        line.figures = {"need_at_most": need, "free": free}
        parts = ", ".join(f"{k} {size(n)}" for k, n in need.items() if n)
        needed = f"needs at most {parts} (estimate)" if parts else "nothing is left to write"
        line.found = f"{size(free)} free; {needed}"
        if models > free:
            raise ArtifactError(
                f"{there} has {size(free)} free, and the models alone need about {size(models)} "
                f"({parts}). Choose another runs_dir, lower keep.checkpoints or train adapters "
                "(policy.lora.rank=16)."
            )
        advice = "Full-length answers would not fit. Free some room or lower the budget."
        line.warn(advice, sum(need.values()) > free)


@dataclass
class Probe:
    """What the rounds have asked for so far, and the seconds that each kind of work took."""

    scratch: Path
    triples: list[Triple] = field(default_factory=list)
    #: pairs judged, and the tokens in and out that this took
    judged: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    #: when the check began, of `time.monotonic`, and how many queries it may ask
    began: float = field(default_factory=time.monotonic)
    most: int = 0

    def enough(self, wanted: int, usable: int) -> str:
        """What leaves ``wanted`` queries usable, at the pace and with the drops so far."""
        asked = math.ceil(wanted * len(self.triples) / usable)
        if self.most < asked:
            return f"give more than {self.most:,} queries (--queries, or queries.path)"
        spent = time.monotonic() - self.began
        needed = spent * (1 + SLOWER * (asked / len(self.triples) - 1))
        return f"--minutes {math.ceil(needed / 60)}"

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Adds the seconds of this block."""
        start = time.monotonic()
        yield
        self.seconds[kind] += time.monotonic() - start


def _steering(
    c: Checks,
    recipe: Principled,
    chat: ChatFormat,
    probed: Probed,
    queries: Sequence[Query],
    chosen: Sequence[Query],
    judge: Judge | None,
    probe: Probe,
    until: float,
) -> Rates | None:
    """Principles, answers and figures of some queries; the rates where all went well.

    A few of the chosen queries come first, then twice as many each time, until the verdict is
    clear, all are asked, or the next round would end after ``until`` (of `time.monotonic`). The
    lines are those of the last round.
    """
    left, answer = until - time.monotonic(), recipe.sampling.max_new_tokens / probed.speed
    size = min(max(int(left / 2 / (answer * len(RESPONSES))), 2), PILOT, len(chosen))
    while True:
        start, known = time.monotonic(), len(probe.triples)
        told = list[Line]()
        found = Checks(told.append)
        rates = _round(found, recipe, chat, probed, queries, chosen[:size], judge, probe)
        now, more = time.monotonic(), min(2 * size, len(chosen))
        each = (now - start) / (size - known)
        if more == size or _clear(found, size) or now + SLOWER * each * (more - size) > until:
            c.take(found, told)
            return rates
        size = more


def _clear(found: Checks, size: int) -> bool:
    """Whether more queries would change nothing: it cannot work, or it steers beyond chance."""
    lines = {line.name: line for line in found.lines}
    broken = any(
        lines[name].status == "FAILED" for name in ("principles", "budgets") if name in lines
    )
    unsure = size < DECIDING and "rules" in lines and lines["rules"].figures["unsure"]
    steers = size >= ENOUGH and lines["steering"].figures.get("steers", False)
    return broken or (steers and not unsure)


def _round(
    c: Checks,
    recipe: Principled,
    chat: ChatFormat,
    probed: Probed,
    queries: Sequence[Query],
    chosen: Sequence[Query],
    judge: Judge | None,
    probe: Probe,
) -> Rates | None:
    """The same on these queries; what earlier rounds asked is not asked again."""
    policy, loading = resolve_path(recipe.policy.model), recipe.policy.loading
    kept, fits, rates = list[Triple](), False, None
    with c.line("principles") as line:
        _write(line, recipe, chosen[len(probe.triples) :], probe)
    if len(triples := probe.triples) == len(chosen):
        with c.line("budgets") as line:
            trainings = [s for s in recipe.plan() if isinstance(s, Train)]
            new, limit = recipe.sampling.max_new_tokens, probed.context_length
            _fit(line, trainings, new, chat, limit, queries, triples)
            fits = True
    if not fits:
        c.skip("sampling steering", "prompts that fit" if triples else "principles")
        return None
    with c.line("sampling") as line:
        with probe.timed("loading"):
            loaded = load_model(policy, recipe.policy, inference=True)
        with Engines(None) as engines:
            kept, per_answer = _sample(line, _answering(recipe, loaded, engines), recipe, probe)
        del loaded
    if not kept:
        c.skip("steering", "finished answers")
        return None
    with c.line("steering") as line:
        loading = loading.model_copy(update={"layout": probed.layout})
        measured = _measure(line, policy, loading, kept, judge, probe, seed=recipe.seed)
        # what was written for a few queries includes loading the model for them
        writing = max(probe.seconds["writing"] - probe.seconds["loading"], 0)
        rates = Rates(writing / len(triples), per_answer, *measured)
    if isinstance(judge, ChecksJudge):
        with c.line("rules") as line:
            _by_rule(line, recipe, kept, judge)
    return rates


def _write(line: Line, recipe: Principled, queries: Sequence[Query], probe: Probe) -> None:
    """Adds the queries with their principles."""
    run = RunFolder(probe.scratch / f"principles-{len(probe.triples)}")
    writer = WritePrinciples(
        Artifact(run.path),
        Artifact(Path(resolve_path(recipe.policy.model))),
        recipe.principles,
        recipe.sampling.engine,
        where=Where(folder="check"),
        seed=recipe.seed,
        loading=recipe.policy.loading,
    )
    with probe.timed("writing"):
        writer.write(queries, run)
    probe.triples += stored_triples(run / writer.outputs[0])
    count = len(probe.triples)
    sources = Counter(str(t.extra["source"]) for t in probe.triples)
    line.figures = {"sources": dict(sources), "seconds": probe.seconds["writing"]}
    line.found = by_reason(sources)
    fallen = sum(n for s, n in sources.items() if s.startswith("fallback")) / count
    line.warn(
        f"{fallen:.0%} of the written principles cannot be used. Set principles.mode=picked, or a "
        "stronger principles.writer.",
        fallen > FALLEN_BACK,
    )


def _fit(
    line: Line,
    trainings: Sequence[Train],
    new: int,
    chat: ChatFormat,
    limit: int | None,
    queries: Sequence[Query],
    triples: Sequence[Triple],
) -> None:
    """Longest prompts, with what the principles add, against context and ``max_length``.

    Raises:
        DataError: no query fits.
    """
    count = len(queries)
    plain = np.zeros(count, dtype=np.int64)
    with progress_bar("tokens", count) as bar:
        for i, query in enumerate(queries):
            plain[i] = len(chat.prompt_ids(query.messages))
            bar.advance(1)
    added = max(
        len(chat.prompt_ids(context_messages(t.messages, t.principles, context)))
        - len(chat.prompt_ids(t.messages))
        for t in triples
        for context in ("good", "bad")
    )
    steered, longest = plain + added, int(plain.max())
    bounds = {f"{t.section}.max_length": t.settings.max_length for t in trainings}
    lengths = {f"{t.section}.max_length": plain if t.plain else steered for t in trainings}
    dropped = {key: int((lengths[key] >= bound).sum()) for key, bound in bounds.items()}
    cut = {key: int((lengths[key] + new > bound).sum()) for key, bound in bounds.items()}
    too_long = int((steered + new > limit).sum()) if limit else 0
    line.figures = {
        "longest_prompt": longest,
        "principles_add": added,
        "max_new_tokens": new,
        "context": limit,
        PROMPT_TOO_LONG: too_long,
        "dropped_by": dropped,
        "cut_by": cut,
    }
    line.found = (
        f"longest prompt {longest:,} tokens, principles {added:,}, answers {new:,}: "
        f"{longest + added + new:,}" + (f" of {limit:,}" if limit else "")
    )
    if too_long == count:
        raise DataError(
            f"No query fits: a prompt of {plain.min():,} tokens and more, principles of {added:,} "
            f"and sampling.max_new_tokens {new:,} exceed the context of {limit:,}. Lower "
            "sampling.max_new_tokens, or choose a model with a longer context."
        )
    line.warn(
        f"{too_long:,} of {count:,} queries would be dropped as prompt_too_long. Lower "
        "sampling.max_new_tokens or leave long queries out.",
        too_long > 0,
    )
    for key, bound in bounds.items():
        line.warn(
            f"{dropped[key]:,} of {count:,} prompts do not fit {key} {bound:,}.", dropped[key] > 0
        )
        line.warn(
            f"Answers that fill their budget would be cut in training for {cut[key]:,} of "
            f"{count:,} queries: {key} is {bound:,}.",
            cut[key] > dropped[key] == 0,
        )


def _sample(
    line: Line, engine: Engine, recipe: Principled, probe: Probe
) -> tuple[list[Triple], dict[str, float]]:
    """The answered triples, and per response the seconds of one answer.

    Raises:
        ArtifactError: no triple is left.
    """
    # methods that distil keep answers without an end, whatever the recipe says
    own = (s.sampling for s in recipe.plan() if isinstance(s, Sample))
    sampling, triples, count = next(own, recipe.sampling), probe.triples, len(probe.triples)
    models = dict.fromkeys(RESPONSES, "policy")
    asking = in_contexts(models, sampling)
    with (
        probe.timed("sampling"),
        progress_bar("sampling", count * len(models), sampling.max_new_tokens) as bar,
    ):
        said = asking.answers(
            triples,
            lambda source: engine,
            params_of(sampling),
            seed=derive_seed(recipe.seed, "check"),
            store=probe.scratch / "answers",
            advance=bar.advance,
        )
    elapsed = probe.seconds["sampling"]
    tokens = {r: sum(a[i].completion_tokens for a in said) for i, r in enumerate(models)}
    faults = {r: Counter(filter(None, (fault(a[i]) for a in said))) for i, r in enumerate(models)}
    cut = {r: found["unfinished"] / count for r, found in faults.items()}
    lost = unfinished_by_stage(recipe, [dict(zip(models, a, strict=True)) for a in said])
    found = [answer for answers in said for answer in answers]
    sampled = max(sum(tokens.values()), 1)
    made = list(map(asking.make, triples, said))
    kept = [t for t in made if isinstance(t, Triple)]
    hygiene = getattr(recipe, "hygiene", PrincipledHygiene())
    usable = Left(kept, hygiene, load_catalogue(recipe.principles.catalogue)).sift()
    dropped = Counter(d.reason for d in made if isinstance(d, Dropped)) + usable.reasons
    same = sum(len(set(t.responses.values())) < len(models) for t in kept) / max(len(kept), 1)
    line.figures = {
        "answers": len(found),
        "tokens_per_second": sampled / elapsed,
        "mean_tokens": {r: n / count for r, n in tokens.items()},
        "unfinished": cut,
        "faults": {r: dict(found) for r, found in faults.items()},
        "lost": lost,
        "equal": same if kept else None,
        "usable": len(usable),
        "dropped": dict(dropped),
    }
    shares = ", ".join(f"{r} {share:.0%}" for r, share in cut.items())
    worst = max(cut, key=lambda r: cut[r])
    ending = (
        f"{shares} of the answers do not end within sampling.max_new_tokens "
        f"{sampling.max_new_tokens:,}. Raise it, keep them (sampling.keep_unfinished=true)"
        + (f", or ask for shorter answers in the {worst} principles" if worst != "plain" else "")
    )
    if len(kept) < 2:
        more = "See why answers are missing." if count > 1 else "Give more queries."
        nothing = f"and steering cannot be measured on fewer than 2. {more}"
        raise ArtifactError(
            f"{len(kept)} of {count} triples left{drops(dropped)}"
            + (f": {ending}." if dropped["unfinished"] else f", {nothing}")
        )
    line.found = (
        f"{len(found):,} answers at {sampled / elapsed:,.0f} tokens/s; unfinished: {shares}; "
        f"{len(usable)} of {count} triples usable{drops(dropped)}"
    )
    gone = " and ".join(f"{share:.0%} of the {title}" for title, share in lost.items() if share)
    line.warn(f"{gone} would be dropped: {ending}.", max(lost.values(), default=0) > UNFINISHED)
    line.warn(
        f"{shares} of the answers are cut off and kept as they are, without an end. Raise "
        f"sampling.max_new_tokens {sampling.max_new_tokens:,} if that is not what you want.",
        sampling.keep_unfinished and cut[worst] > UNFINISHED,
    )
    line.warn(
        f"{same:.0%} of the queries get the same answer in two contexts. Raise "
        "sampling.temperature, or choose a model that follows instructions.",
        same > EQUAL,
    )
    return kept, {r: elapsed * n / sampled / count for r, n in tokens.items()}


def fault(answer: Completion) -> str | None:
    """What is wrong with an answer, whatever the others of its query are."""
    if answer.missing or answer.finish_reason == "length":
        return answer.missing or "unfinished"
    return None if answer.text.strip() else "empty"


def unfinished_by_stage(
    recipe: Principled, said: Sequence[Mapping[str, Completion]]
) -> dict[str, float]:
    """Stage that samples → the share of its records that it would drop as unfinished.

    The policy answers for whoever writes the responses of a stage, its generator included.
    """
    stages = {
        s.title: s.writers
        for s in recipe.plan()
        if isinstance(s, Sample) and not s.sampling.keep_unfinished
    }
    return {
        title: sum(any(fault(a[r]) == "unfinished" for r in writers) for a in said) / len(said)
        for title, writers in stages.items()
    }


def _measure(
    line: Line,
    policy: str,
    loading: Loading,
    triples: Sequence[Triple],
    judge: Judge | None,
    probe: Probe,
    *,
    seed: int,
) -> tuple[float, float | None]:
    """Puts the steering figures into the line.

    Returns:
        The seconds of scoring one sequence, and of judging one pair if there is a judge.
    """
    own = dict.fromkeys((*PLAIN_SEQUENCES, "plain/plain", *GAP_SEQUENCES), triples)
    principles = [t.principles for t in triples if t.principles is not None]
    lent = strangers(principles)
    foreign = [replace(t, principles=p) for t, p in zip(triples, lent, strict=True)]
    texts = {**own, "stranger-good/good": foreign, "stranger-bad/bad": foreign}
    loaded = load_model(policy, loading)
    flat = [
        loaded.chat.sequence(t, name.removeprefix("stranger-"))
        for name, under in texts.items()
        for t in under
    ]
    with probe.timed("scoring"):
        values = scored(probe.scratch / "scores", loaded, flat, "scoring")
    del loaded  # the judge's model may need the room
    grid = np.array([[float(v.double().sum()), len(v)] for v in values])
    sums, lengths = (
        dict(zip(texts, column.reshape(len(texts), -1), strict=True)) for column in grid.T
    )
    figures = quality(triples, {n: sums[n] for n in own}, lengths, judge=None)
    verdicts = _verdicts(judge, triples, probe) if judge else None
    rng = np.random.default_rng(derive_seed(seed, "check/steering"))
    found = steering(triples, {n: sums[n] / lengths[n] for n in texts}, verdicts, rng)
    # of fewer queries, intervals are too wide to say that it does, or does not
    few = len(triples) < (ENOUGH if found["steers"] else DECIDING)
    only_gap = lent == principles
    undecided = few or (found["steers"] and only_gap and not found["accuracy"])
    line.figures = {
        **found,
        "steers": found["steers"] and not undecided,
        "undecided": undecided,
        "one_principle_for_all": only_gap,
        "verdicts": None if verdicts is None else verdict_counts(verdicts),
        "on_policyness": figures["on_policyness"],
        "tokens": figures["tokens"],
    }
    right, policyness = found["accuracy"], figures["on_policyness"]
    missing = "judge" if judge is None else "verdict"
    verdict = "no verdict" if undecided else "steers" if found["steers"] else "does not steer"
    verdict += " yet" * few
    line.found = (
        f"{verdict} on {len(triples)} queries"
        + (f"; accuracy {interval(right, '.2f')}" if right else f"; no {missing}")
        + f"; on-policyness good {policyness['chosen']:.2f}, bad {policyness['rejected']:.2f}"
    )
    _advise(line, verdicts or (), probe.enough(DECIDING, len(triples)) if few else "")
    per_judged = probe.seconds["judging"] / (len(triples) - 1) if judge else None
    return probe.seconds["scoring"] / len(flat), per_judged


def _verdicts(judge: Judge, triples: Sequence[Triple], probe: Probe) -> list[Verdict]:
    """Verdicts on good against bad; the time is that of all but one, which loads a model."""
    pairs = list(map(Pair.of, triples))
    first = judge.compare_all(pairs[:1])
    with probe.timed("judging"):
        rest = judge.compare_all(pairs[1:])
    for j in (*first, *rest):
        tokens = {"prompt_tokens": j.prompt_tokens, "completion_tokens": j.completion_tokens}
        probe.judged.update({"pairs": 1, **tokens})
    return [j.verdict for j in (*first, *rest)]


def _advise(line: Line, verdicts: Sequence[Verdict], more: str) -> None:
    """What the figures of steering mean, and what to do about it.

    Args:
        line: with them.
        verdicts: of the judge, if there is one.
        more: how to ask more queries, where these are too few.
    """
    few = bool(more)
    found, tokens, steers = line.figures, line.figures["tokens"], line.figures["steers"]
    for half in () if few else ("good", "bad"):
        gap, net = above(found["gap"][half], 0), above(found["net_gap"][half], 0)
        line.warn(
            f"The {half} principle changes nothing: its gap is not above 0 beyond chance.", not gap
        )
        line.warn(
            f"Answers react to the wording of the {half} principle, not to what it asks for.",
            gap and not net,
        )
    line.warn(
        "The judge cannot tell good answers from bad ones, or prefers the bad ones.",
        bool(found["accuracy"]) and not (few or above(found["accuracy"], 0.5)),
    )
    line.warn(
        f"{found['triples']} queries are too few to tell whether the policy steers; {ENOUGH} to "
        f"{DECIDING} are enough: {more}.",
        few,
    )
    line.warn(
        "A run would learn noise. Use a model that follows a system message, or simpler "
        "principles (principles.mode=picked principles.features_per_query=1).",
        not (steers or found["undecided"]),
    )
    line.warn(
        "All queries have the same principles, so the net gap is only the gap, which any model "
        f"has: {'the' if found['accuracy'] else 'name a judge, whose'} accuracy decides.",
        found["one_principle_for_all"],
    )
    chosen, rejected = tokens["chosen"], tokens["rejected"]
    line.warn(
        f"Good answers have {chosen:.0f} tokens, bad ones {rejected:.0f}: training on them teaches "
        "length.",
        max(chosen, rejected) > LENGTH_RATIO * min(chosen, rejected),
    )
    for feature, figures in found["features"].items():
        line.warn(
            f"{feature}: adds {interval(figures['adds'])}, does not steer on "
            f"{figures['triples']} queries; consider dropping it.",
            steers and figures["steers"] is False,
        )
    lost = verdicts.count(Verdict.UNPARSEABLE)
    line.warn(
        f"{lost} of {len(verdicts)} pairs are unparseable for the judge: they do not count.",
        lost > UNPARSEABLE * len(verdicts),
    )


def _by_rule(line: Line, recipe: Principled, triples: Sequence[Triple], judge: ChecksJudge) -> None:
    """How many plain answers keep each rule, and how many under the good principle.

    A rule of a feature is looked at where the principle names that feature, unless the recipe's
    principles know no such feature.
    """
    rng = np.random.default_rng(derive_seed(recipe.seed, "check/rules"))
    texts = {name: [t.responses[name] for t in triples] for name in ("plain", "good")}
    fixed = recipe.principles.mode == "fixed"
    known = () if fixed else load_catalogue(recipe.principles.catalogue).by_name
    rules, missing, few = dict[str, dict[str, Any]](), list[str](), False
    for rule, kept in judge.by_rule([t.query for t in triples], texts).items():
        both = list(zip(kept["plain"], kept["good"], strict=True))
        feature = next((f for f in judge.rules if rule.startswith(f"{f}: ")), None)
        if feature in known:
            named = (t.principles and feature in t.principles.features for t in triples)
            both = list(compress(both, named))
        plain, good = (float(np.mean(x)) for x in zip(*both, strict=True)) if both else (None, None)
        gain = known_interval((b - a for a, b in both), rng)
        rules[rule] = {"queries": len(both), "plain": plain, "good": good, "gain": gain}
        few |= len(both) < FEW
        if plain is None or gain is None or len(both) < FEW or above(gain, 0):
            continue
        lowered = gain[2] is not None and gain[2] < 0
        if plain < KEPT or lowered:
            missing.append(rule)
            line.warn(
                f"{rule}: {plain:.2f} of the plain answers keep it, {good:.2f} under the good "
                f"principle ({len(both)} queries): "
                + ("fewer." if lowered else "no gain beyond chance.")
            )
    line.figures = {"rules": rules, "missing": missing, "unsure": few or bool(missing)}
    raised = sum(bool(r["gain"]) and above(r["gain"], 0) for r in rules.values())
    line.found = (
        f"the good principle has more answers keep {raised} of {len(rules)} rules beyond chance, "
        f"on {len(triples)} queries"
        if any(r["queries"] >= FEW for r in rules.values())
        else f"no verdict: none of {len(rules)} rules was asked for on {FEW} queries"
    )
    more = any(rules[rule]["queries"] < DECIDING for rule in missing)
    line.warn(
        "What the principle does not bring about cannot be learnt from it. Say what the rule wants "
        "in the feature's good guideline, give the rule a feature of its own, or drop it"
        + ("; or measure more queries: --queries 200 --minutes 15." if more else "."),
        bool(missing),
    )


def _ranking(
    c: Checks,
    recipe: Principled,
    probed: Probed,
    judge: Judge | None,
    probe: Probe,
    until: float,
) -> None:
    """Whether the contrast of the principles ranks the policy's own answers; if there is time.

    Two plain answers to each query, neither of which was written under a principle: how far the
    contrast tells them apart, and how often a judge puts them in the same order.
    """
    spent = probe.seconds
    if time.monotonic() + (spent["sampling"] + spent["scoring"]) / 2 + spent["judging"] > until:
        c.skip("ranking", "more time (--minutes)")
        return
    with c.line("ranking") as line:
        policy, s = resolve_path(recipe.policy.model), recipe.sampling
        two = [Wanted("plain", "policy", number) for number in range(2)]
        with Engines(None) as engines:
            said = replace(in_contexts({}, s), wanted=two).answers(
                probe.triples,
                # in no variable: the contrast loads the policy again, and one copy is enough
                lambda source: engines.sampler(
                    s.engine, policy, recipe.policy.loading, s.batch_size
                ),
                params_of(s),
                seed=derive_seed(recipe.seed, "check"),
                store=probe.scratch / "answers",
            )
        # the contrast reads every token that there is, of answers without an end as well
        usable = [
            (t, a, b)
            for t, (a, b) in zip(probe.triples, said, strict=True)
            if t.principles
            and not {fault(a), fault(b)} - {None, "unfinished"}
            and a.text.strip()
            and b.text.strip()
            and a.text != b.text
        ]
        clip = ContrastRanking().clip
        loading = recipe.policy.loading.model_copy(update={"layout": probed.layout})
        contrast = PrincipleContrast(policy, loading, clip=clip)
        answered = [
            replace(t, responses={"plain": c.text}, finish_reasons={"plain": c.finish_reason})
            for t, *two_answers in usable
            for c in two_answers
        ]
        scores = contrast.score(
            [[contrast.loaded.chat.sequence(t, name) for name in contrast.read] for t in answered]
        )
        del contrast
        both = [
            (
                Pair(
                    replace(t.query, extra=_with_principles(t)),
                    *(a.text, b.text),
                    (a.finished, b.finished),
                ),
                first - second,
            )
            for (t, a, b), first, second in zip(usable, scores[::2], scores[1::2], strict=True)
            if first is not None and second is not None
        ]
        cut_off = sum(c.finish_reason == "length" for _, *ended in usable for c in ended)
        verdicts = [j.verdict for j in judge.compare_all([p for p, _ in both])] if judge else []
        decided = [
            (v, gap)
            for v, (_, gap) in zip(verdicts, both, strict=False)
            if v in (Verdict.FIRST, Verdict.SECOND)
        ]
        agreed = [float((v is Verdict.FIRST) == (gap > 0)) for v, gap in decided]
        rng = np.random.default_rng(derive_seed(recipe.seed, "check/ranking"))
        line.figures = {
            "decides": recipe.by_contrast,
            "pairs": len(both),
            "answers": 2 * len(usable),
            "cut_off": cut_off,
            "spread": float(np.mean([abs(gap) for _, gap in both])) if both else None,
            "decided": len(decided),
            "agreement": mean_interval(agreed, rng) if agreed else None,
        }
        if not both:
            # which is no fault: most methods rank nothing
            line.found = "nothing to rank: no query has two plain answers that differ"
            return
        line.found = (
            f"the principles tell two plain answers apart by {line.figures['spread']:.3f} nats per "
            f"token on {len(both)} queries"
        )
        if cut_off:
            line.found += f" ({cut_off} of the {2 * len(usable)} answers are cut off)"
        if agreed:
            line.found += (
                f"; as the judge does in {interval(line.figures['agreement'], '.2f')} of "
                f"{len(decided)} that it decides"
            )
            few = len(decided) < DECIDING
            line.warn(
                f"That is not above chance, and {listed(BY_CONTRAST)} learn from this ranking: "
                "they would learn noise. Choose a method whose pairs need no ranking (pbaa, sso).",
                not few and not above(line.figures["agreement"], 0.5),
            )


def _with_principles(triple: Triple) -> dict[str, Any]:
    """What a query holds whose answers a judge may compare by its principles."""
    assert triple.principles
    return {**triple.extra, "principles": triple.principles.to_dict()}


def _of_own_judge(
    own: JudgeConfig | None, stages: Sequence[Stage], costs: Sequence[Cost], todo: Cost
) -> Cost:
    """With the pairs of the recipe's judge alone: how fast other ones are was not measured."""
    judged = {
        stage.name: (cost.judged, own is not None and getattr(stage, "judge", None) == own)
        for stage, cost in zip(stages, costs, strict=True)
        if cost.judged
    }
    others = [f"judging in {name}" for name, (_, measured) in judged.items() if not measured]
    pairs = sum(n for n, measured in judged.values() if measured)
    return replace(todo, judged=pairs, unknown=(*todo.unknown, *others))


def _judge_cost(judge: JudgeConfig | None, pairs: int, judged: Counter[str]) -> dict[str, Any]:
    """What a judge at a server will be asked, by the mean of what it was asked so far."""
    if judge is None or judge.engine.kind != "openai" or not pairs or not judged["pairs"]:
        return {}
    read, written = (
        round(judged[name] * pairs / judged["pairs"])
        for name in ("prompt_tokens", "completion_tokens")
    )
    asked = dict(zip(ASKED, (2 * pairs, read, written), strict=True))
    return {**asked, "cost": judge.engine.cost_of(read, written)}


def _judging(
    c: Checks, recipe: Aligning, stages: Mapping[str, tuple[JudgeConfig | None, int]]
) -> None:
    """What judges are asked of which nothing is measured here, by stage."""
    measured = recipe.judge if isinstance(recipe, Principled) else None
    lengths = Lengths(response=min(Lengths.response, recipe.sampling.max_new_tokens))
    asked = {
        name: found
        for name, (judge, pairs) in stages.items()
        if judge != measured and (found := judge_asked(judge, pairs, lengths))
    }
    if asked:
        with c.line("judging") as line:
            line.figures = asked
            line.found = "; ".join(f"{name}: {_told(found)}" for name, found in asked.items())
            line.found += " (estimate from assumed lengths, as by selfsteer plan)"


def _told(asked: Mapping[str, Any]) -> str:
    """What a judge at a server gets, in words."""
    cost = "" if asked["cost"] is None else f", cost {asked['cost']:,.4g}"
    return (
        f"the judge gets {asked['requests']:,} requests, {asked['prompt_tokens']:,} tokens in, "
        f"{asked['completion_tokens']:,} out{cost}"
    )


def _time(
    c: Checks, stages: Sequence[Stage], todo: Cost, rates: Rates | None, asked: Mapping[str, Any]
) -> None:
    if rates is None:
        c.skip("time", "the rates of sampling and scoring")
        return
    with c.line("time") as line:
        kinds = seconds(todo, rates)
        unknown = [*todo.unknown, *(["judge"] if todo.judged and rates.per_judged is None else [])]
        line.figures = {"seconds": kinds, "not_counted": unknown, "judge": dict(asked)}
        parts = ", ".join(f"{k} {duration(s)}" for k, s in kinds.items() if s >= 1)
        line.found = (
            f"about {duration(sum(kinds.values()))} for {len(stages)} stages to do"
            + (f": {parts}" if parts else "")
            + " (estimate from the rates above)"
        )
        if asked:
            line.found += f"; {_told(asked)}"
        line.warn(f"Not counted: {', '.join(unknown)}.", bool(unknown))


def drops(dropped: Counter[str]) -> str:
    """`` (5 unfinished, 4 equals_plain)``, or nothing."""
    return f" ({by_reason(dropped)})" if dropped else ""
