"""Grows a query set with the model itself: what the authors announced and never released.

Three ways, each with its share: in *depth* (one query made harder) and in *breadth* (one query of
the same kind on another subject), the two directions of Evol-Instruct (arXiv 2304.12244), and
*instruct* (several queries shown, one more asked for: Self-Instruct, arXiv 2212.10560). Less than
those: no evolution of the prompts, no filter by a stronger model. What a model writes is parsed
strictly and must be new: to the seeds, to each other, to the evaluation sets.
"""

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from typing_extensions import override

from selfsteer.data import curate
from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import dump_lines, write_atomic
from selfsteer.data.queries import contamination, load_queries
from selfsteer.data.records import Dropped, Message, Query, content_id
from selfsteer.engines.answers import answers
from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    REQUEST_FAILED,
    Engine,
    Request,
    SamplingParams,
)
from selfsteer.engines.load import Engines
from selfsteer.errors import DataError
from selfsteer.judges.load import load_judges
from selfsteer.recipe.sections import Augment, GrownQueries, JudgeConfig, Queries, Sampling
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage, identity
from selfsteer.stages.inputs import stored_queries
from selfsteer.stages.sample import check_budget, check_sampler
from selfsteer.terminal import Bar, progress_bar, say, warn

#: Bounds and likeness where the recipe sets none: a query of 3 characters is no query.
MIN_CHARS, MAX_CHARS, NEAR_DUPLICATES = 10, 2000, 0.8

#: Queries shown to ask for one more.
SHOWN = 3

_LABEL = "New query"

_TASKS = {
    "depth": "Below is a query that somebody asked an assistant. Write a harder one in its place: "
    "add a condition, a limit or a detail that a careful answer has to deal with. It must be "
    "clear to somebody who never saw the query below.",
    "breadth": "Below is a query that somebody asked an assistant. Write another of the same kind, "
    "about as long and as difficult, on a different subject.",
    "instruct": "Below are queries that people asked an assistant. Write one more that could stand "
    "among them, but asks for something that none of them asks for.",
}
_FORMAT = f"Do not answer any query. Reply in this form only:\n{_LABEL}: text of the query"


class Outcome(StrEnum):
    """What the parser makes of a model's reply."""

    OK = "ok"
    NO_LABEL = "no_label"
    SEVERAL = "several"
    EMPTY = "empty"
    SCAFFOLDING = "scaffolding"
    ECHOES_PROMPT = "echoes_prompt"


def prompt(how: str, sources: Sequence[Query]) -> list[Message]:
    """Asks for one new query made from these.

    Args:
        how: depth or breadth (one source), or instruct (several).
        sources: shown without their system messages; of a conversation all turns.
    """
    shown = [q.transcript for q in sources]
    if how == "instruct":
        shown = [f"{i}. {text}" for i, text in enumerate(shown, 1)]
    listed = "\n".join(shown)
    label = "Queries:\n" if how == "instruct" else "Query: "
    return [Message("user", f"{_TASKS[how]}\n\n{label}{listed}\n\n{_FORMAT}")]


_LABELLED = re.compile(rf"^[ \t*#>-]*{_LABEL}[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
_SCAFFOLD = re.compile(
    r"^[ \t*#>-]*(?:(?:new|original|given|the|rewritten|harder)[ \t]+)?"
    r"(?:query|queries|prompt|question|answer|response|explanation|note)(?:[ \t]*\d+)?[ \t*]*:",
    re.IGNORECASE | re.MULTILINE,
)


def parse_query(reply: str) -> tuple[Outcome, str]:
    r"""Reads ``New query: …`` from a reply; the text is empty unless the outcome is OK.

    >>> parse_query('Sure.\nNew query: "Why do bees dance?"')
    (<Outcome.OK: 'ok'>, 'Why do bees dance?')
    """
    _, *found = _LABELLED.split(reply)
    text = found[0].strip().lstrip("* \t\n") if found else ""
    if len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("“", "”")):
        text = text[1:-1].strip()
    faults = {
        Outcome.NO_LABEL: not found,
        Outcome.SEVERAL: len(found) > 1,
        Outcome.EMPTY: not curate.words(text),
        Outcome.SCAFFOLDING: _SCAFFOLD.search(text),
        Outcome.ECHOES_PROMPT: _echoes(text),
    }
    outcome = next((fault for fault, applies in faults.items() if applies), Outcome.OK)
    return outcome, text if outcome is Outcome.OK else ""


#: Words of a prompt's own sentence that make a reply an echo of it; fewer are common speech.
_ECHO = 4


def _echoes(text: str) -> bool:
    """Whether the text is a part of what the prompts themselves say, or holds a sentence of it."""
    mine = curate.words(text)
    for task in (*_TASKS.values(), _FORMAT):
        for sentence in re.split(r"[.:]\s", task):
            short, long = sorted((mine, curate.words(sentence)), key=len)
            if len(short) >= _ECHO and f" {' '.join(short)} " in f" {' '.join(long)} ":
                return True
    return False


@dataclass(frozen=True)
class Reply:
    """One thing asked of the model, and its reply."""

    how: str
    sources: tuple[str, ...]
    text: str = ""
    finish_reason: str = ""


class _Pool:
    """The growing set, and all that a new query is held against.

    Args:
        seeds: what there is.
        settings: bounds, likeness, evaluation sets.
        evaluation: queries that nothing like may be added of.
        check: raises DataError on a query that is of no use.
    """

    def __init__(
        self,
        seeds: Sequence[Query],
        settings: GrownQueries,
        evaluation: Sequence[Query],
        check: Callable[[Query], None],
    ) -> None:
        s, self._check = settings, check
        self.queries = {query.id: query for query in seeds}
        self._bounds = curate.bounds(s.min_chars or MIN_CHARS, s.max_chars or MAX_CHARS, s.scripts)
        self._seen = curate.Duplicates()
        self._near = curate.NearDuplicates(s.near_duplicates or NEAR_DUPLICATES)
        self._evaluation, _ = contamination(s)
        for query in evaluation:
            self._evaluation.add("evaluation", query)
            self._near.insert(query)
        for query in seeds:
            self._seen.add(query)
            self._near.insert(query)

    def offer(self, reply: Reply, round_: int) -> str | None:
        """Takes the query of a reply in, or says why not."""
        if reply.finish_reason.startswith((PROMPT_TOO_LONG, REQUEST_FAILED)):
            return reply.finish_reason
        if reply.finish_reason == "length":
            return "unfinished"
        outcome, text = parse_query(reply.text)
        if outcome is not Outcome.OK:
            return outcome.value
        sources = [self.queries[i] for i in reply.sources]
        kept = sources[0].messages[:1] if reply.how != "instruct" else ()
        messages = (*(m for m in kept if m.role == "system"), Message("user", text))
        lineage = {"how": reply.how, "from": list(reply.sources), "round": round_}
        query = Query(content_id(messages), messages, {"augmented": lineage})
        if any(curate.words(text) == curate.words(s.text) for s in sources):
            return "equals_source"
        reason = self._fault(query)
        if reason is None:
            self.queries[query.id] = query
        return reason

    def _fault(self, query: Query) -> str | None:
        """Why a query is not wanted, or not new; the first reason counts."""
        if reason := self._bounds(query) or self._seen.add(query):
            return reason
        if query.id in self.queries:
            return "duplicate"
        if self._evaluation.find(query):
            return "contaminated"
        try:
            self._check(query)
        except DataError:
            return "judge_cannot_score"
        return None if self._near.add(query) is None else "near_duplicate"


def augment(
    seeds: Sequence[Query],
    settings: GrownQueries,
    engine: Engine,
    path: Path,
    *,
    seed: int,
    evaluation: Sequence[Query] = (),
    check: Callable[[Query], None] = lambda query: None,
    drop: Callable[[Dropped], None] = lambda dropped: None,
) -> StageResult:
    """Writes the seeds and the new queries, each with its lineage in ``augmented``, in id order.

    A round asks for what is still missing, from seeds and earlier finds alike. Replies are stored
    beside ``path`` until the end; what is accepted follows from them, so that an
    interrupted run asks nothing twice.

    Args:
        seeds: what there is, in id order.
        settings: with ``augment``; the bounds, ``near_duplicates`` (0.8 if unset), ``against``
            and ``ngram`` hold for new queries too.
        engine: who writes.
        path: the JSONL file to write; ``augmented.jsonl`` keeps its replies in ``augment/``.
        seed: of choices and sampling.
        evaluation: queries that must stay held out, beside the sets of ``against``.
        check: raises DataError on a query that the judge has no use for.
        drop: told every reply that is not taken.

    Returns:
        Records in are seeds and replies; drops by reason. The notes say what each way yielded and
        how varied the set was before and is now.

    Raises:
        DataError: there are as many seeds as queries wanted.
    """
    wanted = settings.augment
    assert wanted is not None
    if len(seeds) >= wanted.to:
        raise DataError(
            f"queries.augment.to {wanted.to:,} is not above the {len(seeds):,} queries that are "
            "there already. Raise it, or remove queries.augment."
        )
    pool = _Pool(seeds, settings, evaluation, check)
    scratch, rounds = path.with_name("augment"), 0
    asked, added, dropped = Counter[str](), Counter[str](), Counter[str]()
    with progress_bar("augment", wanted.to - len(seeds)) as bar:
        while len(pool.queries) < wanted.to and rounds < wanted.attempts:
            rounds += 1
            store = scratch / f"round-{rounds:03d}.jsonl"
            for reply in _round(pool.queries, wanted, engine, store, rounds, seed, bar):
                reason = pool.offer(reply, rounds)
                asked[reply.how] += 1
                added[reply.how] += reason is None
                bar.advance(reason is None)
                if reason is not None:
                    dropped[reason] += 1
                    drop(Dropped(f"round-{rounds}/{asked.total()}", reason, asdict(reply)))
    queries = [pool.queries[i] for i in sorted(pool.queries)]
    write_atomic(path, dump_lines(queries))
    if len(queries) < wanted.to:
        warn(
            f"{wanted.attempts} rounds of augmentation came to {len(queries):,} of "
            f"{wanted.to:,} queries"
        )
    varied = curate.diversity({"before": seeds, "after": queries})
    for name, figures in varied.items():
        shown = ", ".join(f"{k.replace('_', '-')} {v:.3f}" for k, v in figures.items())
        say(f"  diversity {name}: {shown}")
    notes = {
        "rounds": rounds,
        "replies": dict(sorted(asked.items())),
        "added": dict(sorted((+added).items())),
        "diversity": varied,
    }
    shutil.rmtree(scratch, ignore_errors=True)  # last: until then nothing is asked twice
    return StageResult(len(seeds) + asked.total(), len(queries), dropped, notes=notes)


def _round(
    queries: Mapping[str, Query],
    wanted: Augment,
    engine: Engine,
    store: Path,
    number: int,
    seed: int,
    bar: Bar,
) -> list[Reply]:
    """Asks for as many queries as are missing; stored answers are not asked for again."""
    ids, rng = list(queries), random.Random(derive_seed(seed, number))
    shares = {"depth": wanted.depth, "breadth": wanted.breadth, "instruct": wanted.instruct}
    asks = {}
    for i in range(wanted.to - len(ids)):
        (how,) = rng.choices(list(shares), list(shares.values()))
        count = min(SHOWN, len(ids)) if how == "instruct" else 1
        asks[str(i)] = Reply(how, tuple(rng.sample(ids, count)))
    requests = [
        Request(
            i,
            tuple(prompt(a.how, [queries[j] for j in a.sources])),
            derive_seed(seed, "augment", f"round-{number}", a.how, i),
        )
        for i, a in asks.items()
    ]
    found = answers(
        engine,
        requests,
        SamplingParams(wanted.temperature, wanted.top_p, wanted.max_new_tokens),
        store=store,
        advance=lambda n, tokens: bar.advance(0, tokens),
    )
    return [
        replace(asks[i], text=said.text, finish_reason=said.finish_reason)
        for i, said in found.items()
    ]


#: What of sampling settings new queries depend on; how they are sampled is settled by ``augment``.
BY_BATCHES = {"identity": lambda sampling: [identity(sampling.engine), sampling.batch_size]}


@dataclass(frozen=True)
class GrowQueries(Stage):
    """The queries, and what the policy adds to them.

    Args:
        queries: those given.
        policy: who writes.
        settings: how many, and what they must be like.
        sampling: who answers, and in which batches; the rest of it is for answers to queries.
        held_out: evaluation queries, which nothing like may be added.
        judges: who will judge answers; a query that one of them has no use for is not taken.
    """

    queries: Artifact
    policy: Artifact
    settings: GrownQueries
    sampling: Sampling = field(metadata=BY_BATCHES)
    held_out: Queries | None = None
    judges: tuple[JudgeConfig, ...] = field(
        default=(), metadata={"identity": lambda judges: [j.kind for j in judges]}
    )

    title = "augment"
    makes = ("augmented.jsonl",)
    leaves = ("augment",)

    @override
    def records(self, scale: Scale) -> int:
        grown = self.settings.augment
        return max(self.queries.records(scale), grown.to if grown else 0)

    @override
    def cost(self, scale: Scale) -> Cost:
        """How many replies are of use is not known before."""
        return Cost(unknown=(self.name,))

    @override
    def check(self) -> Iterator[str]:
        assert self.settings.augment is not None
        yield from check_sampler(self.sampling, (), self.loading)
        budget = {"queries.augment.max_new_tokens": self.settings.augment.max_new_tokens}
        yield from check_budget(str(self.policy.path), self.loading, budget)

    @override
    def run(self, run: RunFolder) -> StageResult:
        judges, s = load_judges(self.judges), self.sampling

        def check(query: Query) -> None:
            for judge in judges:
                judge.check([query])

        with Engines(run.path) as engines, run.drops(self.name) as drops:
            result = augment(
                list(stored_queries(self.queries.path)),
                self.settings,
                engines.sampler(s.engine, str(self.policy.path), self.loading, s.batch_size),
                run / self.outputs[0],
                seed=derive_seed(self.seed, "augment"),
                evaluation=load_queries(self.held_out).queries if self.held_out else (),
                check=check,
                drop=drops.add,
            )
        result.notes |= engines.notes
        return result
