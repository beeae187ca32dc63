"""A few queries through a recipe's own stages, up to the first training, in a temporary folder."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import read_jsonl, read_shards
from selfsteer.data.records import RESPONSES, Principles, Query, Triple
from selfsteer.engines.load import Engines
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.judges.base import Pair, ScoringJudge
from selfsteer.judges.load import load_judge
from selfsteer.judges.principles import PrincipleContrast
from selfsteer.methods import Aligning, Principled
from selfsteer.methods.contrast import Distilled
from selfsteer.recipe.sections import ContrastRanking, resolve_path
from selfsteer.run.execute import execute
from selfsteer.run.folder import by_reason, read_dropped
from selfsteer.run.stage import Stage
from selfsteer.stages.filter import FilterTriples
from selfsteer.stages.sample import in_contexts, params_of
from selfsteer.stages.train import Train, TrainReward
from selfsteer.view import RunView, answers_of

if TYPE_CHECKING:
    from selfsteer.models.chat import ChatFormat

Recipe = TypeVar("Recipe", bound=Aligning)


@dataclass
class Answer:
    """One answer to a query.

    ``score`` is the judge's. ``contrast`` is the mean over its tokens of how much likelier the good
    principle makes them than the bad one, in nats, and ``pieces`` are those tokens one by one.
    """

    name: str
    text: str
    #: ``chosen`` or ``rejected``, where it is in a pair; or what else it is for.
    role: str | None = None
    finished: bool = True
    score: float | None = None
    contrast: float | None = None
    pieces: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Row:
    """What became of a query: ``dropped`` is the reason and the stage; None: it is kept."""

    query: Query
    principles: Principles | None = None
    answers: dict[str, Answer] = field(default_factory=dict)
    verdict: str | None = None
    dropped: str | None = None


@dataclass
class Preview:
    """The queries, and what is to be known of all of them."""

    rows: list[Row]
    #: What would be trained on.
    kept_as: str
    judge: str | None
    scale: str | None
    notes: list[str]

    @property
    def coloured(self) -> bool:
        """Whether any token has a figure."""
        return any(a.pieces for row in self.rows for a in row.answers.values())

    @property
    def summary(self) -> str:
        """``5 queries: 4 kept as pairs, 1 dropped (1 unfinished in triples)``."""
        lost = Counter(row.dropped for row in self.rows if row.dropped)
        gone = f", {lost.total()} would be dropped ({by_reason(lost)})" if lost else ""
        kept = len(self.rows) - lost.total()
        return f"{len(self.rows)} queries: {kept} kept as {self.kept_as}{gone}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        rows = [
            {
                **row.query.to_dict(),
                "principles": row.principles and row.principles.to_dict(),
                "answers": [asdict(a) for a in row.answers.values()],
                "verdict": row.verdict,
                "dropped": row.dropped,
            }
            for row in self.rows
        ]
        about = {"judge": self.judge, "scale": self.scale, "notes": self.notes}
        return {"summary": self.summary, **about, "queries": rows}


def preview(recipe: Aligning, given: Mapping[str, Any], count: int, folder: Path) -> Preview:
    """Runs the stages before the first training on a few queries, and gathers what they made.

    Args:
        recipe: checked and complete.
        given: its settings as the user gave them.
        count: queries.
        folder: a temporary one.

    Raises:
        ConfigError: the recipe trains before anything is asked.
    """
    small = lessened(recipe, count, folder)
    stages = before_training(small.plan())
    if len(stages) < 2:
        raise ConfigError(
            f"Method {recipe.method} trains a model before it asks one, so there is nothing to "
            "preview; set improver_training: null for that."
        )
    notes = _notes(recipe, small)
    try:
        execute(small, given, until=stages[-1].name)
        rows = list(gathered(RunView.open(small.folder)).values())
    except ArtifactError as e:
        if not (small.folder / "resolved.json").exists():
            raise
        rows = list(gathered(RunView.open(small.folder)).values())
        if not all(row.dropped for row in rows):
            raise
        notes.append(str(e))
    made = Preview(rows, _kept_as(small), None, None, notes)
    if isinstance(recipe, Distilled):
        _good_answers(recipe, rows, folder)
    _judge(recipe, made)
    if isinstance(recipe, Principled):
        notes += _means(rows)
        _contrast(recipe, made.rows)
    return made


def lessened(recipe: Recipe, count: int, folder: Path) -> Recipe:
    """The recipe with so many queries in its first round, and nothing after its rounds."""
    shares = [s.share for s in recipe.plan() if getattr(s, "share", None) is not None]  # type: ignore[attr-defined]
    sliced = any(share.size is None for share in shares)
    wanted, own = count * recipe.iterations if sliced else count, recipe.queries.limit
    few: dict[str, Any] = {"limit": wanted if own is None else min(wanted, own)}
    if hasattr(recipe.queries, "augment"):
        few["augment"] = None
    changed = {
        "runs_dir": str(folder),
        "queries": recipe.queries.model_copy(update=few),
        "evaluation": None,
        "benchmarks": None,
        "tracking": (),
    }
    return recipe.model_copy(update=changed)


def before_training(stages: Iterable[Stage]) -> list[Stage]:
    """The stages before the first one that trains."""
    out = []
    for stage in stages:
        if isinstance(stage, Train | TrainReward):
            break
        out.append(stage)
    return out


def _first_training(recipe: Aligning) -> Train | TrainReward | None:
    return next((s for s in recipe.plan() if isinstance(s, Train | TrainReward)), None)


def _kept_as(recipe: Aligning) -> str:
    trained = _first_training(recipe)
    if isinstance(trained, TrainReward):
        return "pairs for the reward model"
    if trained is not None and trained.title != "policy":
        return "triples for the generator"
    distils = trained is not None and trained.teacher is not None
    return "answers whose every token is trained on" if distils else "pairs"


def _notes(recipe: Aligning, small: Aligning) -> list[str]:
    """What differs from the real run."""
    trained = _first_training(small)
    found = []
    if trained is not None and trained.title != "policy":
        found.append(f"The policy's own data come after another training: {trained.name}.")
    if getattr(recipe.queries, "augment", None) is not None:
        found.append("queries.augment is left out: these are given queries.")
    if any(isinstance(s, FilterTriples) and s.filter for s in small.plan()):
        found.append("Bounds of the filter that are means over all triples are means over these.")
    return found


# -- what the stages made --------------------------------------------------------------------------


def gathered(view: RunView) -> dict[str, Row]:
    """Query id → what is known of it, from the files of a run's first round."""
    rows: dict[str, Row] = {}
    other = "given" if getattr(view.recipe, "needs_answers", False) else "rewritten"
    for value in _lines(view.folder / "queries.jsonl"):
        query = Query.from_dict(value)
        rows[query.id] = Row(query)
    first = next(iter(view.rounds), None)
    if first is not None:
        for triple in first.principles:
            rows[triple.id].principles = triple.principles
    for stage in view.stages:
        made = view.folder / stage.outputs[0]
        if stage.kind == "RankAnswers":
            for value in _lines(made / "candidates"):
                _take(rows, value["id"], value, other)
        if stage.kind in ("Sample", "RankAnswers", "WritePairs"):
            for value in _lines(made):
                _take(rows, value["id"], value, other)
        kept = stage.dropped_file
        for dropped in read_dropped(kept) if kept else ():
            if dropped.id in rows and stage.kind != "ReadQueries":
                record = dropped.record if isinstance(dropped.record, Mapping) else {}
                _take(rows, dropped.id, record, other)
                rows[dropped.id].dropped = f"{dropped.reason} in {stage.title}"
    for row in rows.values():
        order = [name for name in RESPONSES if name in row.answers]
        row.answers = {name: row.answers[name] for name in dict.fromkeys([*order, *row.answers])}
    # the others are of later rounds
    return {i: row for i, row in rows.items() if row.answers or row.dropped}


def _lines(path: Path) -> Iterator[Any]:
    if path.is_dir():
        yield from read_shards(path)
    elif path.exists():
        yield from (value for _, value in read_jsonl(path))


def _take(rows: Mapping[str, Row], identity: str, record: Mapping[str, Any], other: str) -> None:
    """Takes over principles and answers of a triple, of candidates or of a pair.

    Args:
        rows: get them.
        identity: of the query.
        record: as it is stored.
        other: what an answer of a pair is called that no stage sampled.
    """
    row, reasons = rows[identity], record.get("finish_reasons") or {}
    if row.principles is None and record.get("principles"):
        row.principles = Triple.from_dict(record).principles
    for name, text in answers_of(record).items():
        row.answers[name] = Answer(name, text, finished=reasons.get(name) != "length")
    for side in ("chosen", "rejected"):
        turns = record.get(side)
        if not turns:
            continue
        text = turns if isinstance(turns, str) else turns[-1]["content"]
        known = list(row.answers.values())
        # a lead-in may have been cut off
        alike = [a for a in known if a.text == text] or [a for a in known if a.text.endswith(text)]
        new = Answer(other, text, finished=reasons.get(side) != "length")
        made = row.answers.setdefault(side, new) if not alike else alike[0]
        made.role = side
    for answer, score in zip(row.answers.values(), record.get("scores") or (), strict=False):
        answer.score = score


def _good_answers(recipe: Distilled, rows: Iterable[Row], folder: Path) -> None:
    """Adds what the policy says under the good principle, which no stage of the method asks."""
    asked = [
        (row, Triple(row.query.id, row.query.messages, row.principles, {}))
        for row in rows
        if row.principles and row.answers
    ]
    s, policy = recipe.sampling, resolve_path(recipe.policy.model)
    with Engines(None) as engines:
        said = in_contexts({"good": policy}, s).answers(
            [triple for _, triple in asked],
            lambda source: engines.sampler(s.engine, source, recipe.policy.loading, s.batch_size),
            params_of(s),
            seed=derive_seed(recipe.seed, "preview"),
            store=folder / "good",
        )
    for (row, _), (c,) in zip(asked, said, strict=True):
        if not c.missing:
            finished = c.finish_reason != "length"
            row.answers["good"] = Answer("good", c.text, "for comparison", finished)


# -- scores ----------------------------------------------------------------------------------------


def _judge(recipe: Aligning, made: Preview) -> None:
    """Scores by the recipe's judge; a judge that only compares compares good with bad."""
    if recipe.judge is None or recipe.judge.kind == "human":
        return
    judge = load_judge(recipe.judge)
    assert judge is not None
    made.judge = judge.name
    if isinstance(judge, ScoringJudge):
        made.scale = judge.scale
        every = [(row.query, a) for row in made.rows for a in row.answers.values()]
        scores = judge.score_all([(q, a.text) for q, a in every], [a.finished for _, a in every])
        for (_, answer), score in zip(every, scores, strict=True):
            answer.score = score
        return
    both = [r for r in made.rows if {"good", "bad"} <= r.answers.keys()]
    sides = [(r, r.answers["good"], r.answers["bad"]) for r in both]
    pairs = [Pair(r.query, a.text, b.text, (a.finished, b.finished)) for r, a, b in sides]
    names = {"first": "the good one is better", "second": "the bad one is better"}
    for row, said in zip(both, judge.compare_all(pairs), strict=True):
        row.verdict = names.get(said.verdict, str(said.verdict))


def _means(rows: Sequence[Row]) -> list[str]:
    """Whether the good principle raises the score, where plain answers stand beside good ones."""
    said = [row.answers for row in rows if {"plain", "good"} <= row.answers.keys()]
    both = [(a["plain"].score, a["good"].score) for a in said]
    known = [(p, g) for p, g in both if p is not None and g is not None]
    if not known:
        return []
    plain, good = (sum(scores) / len(known) for scores in zip(*known, strict=True))
    return [
        f"Mean score of {len(known)} answers each: {plain:.2f} without a principle, {good:.2f} "
        "under the good one."
    ]


def _contrast(recipe: Aligning, rows: Iterable[Row]) -> None:
    """Which tokens of each answer the good principle makes likelier than the bad one."""
    every = [(row, a) for row in rows if row.principles for a in row.answers.values() if a.text]
    if not every:
        return
    clip = ContrastRanking().clip
    policy = PrincipleContrast(resolve_path(recipe.policy.model), recipe.policy.loading, clip=clip)
    asked = []
    for row, answer in every:
        assert row.principles
        extra = {**row.query.extra, "principles": row.principles.to_dict()}
        asked.append((Query(row.query.id, row.query.messages, extra), answer.text))
    encoded = policy.encoded(asked, [answer.finished for _, answer in every])
    for (_, answer), pair, gap in zip(every, encoded, policy.gaps(encoded), strict=True):
        if gap is not None:
            answer.contrast = policy.mean(gap)
            answer.pieces = pieces(policy.loaded.chat, pair[0].response_ids, gap.tolist())


def pieces(
    chat: "ChatFormat", ids: tuple[int, ...], values: list[float]
) -> list[tuple[str, float]]:
    """Tokens as the text that each adds, with its value; those that share a character are added up.

    What adds no text, as the token that ends the turn, is left out.
    """
    out: list[tuple[str, float]] = []
    held = ""
    total, start = 0.0, 0
    for i, value in enumerate(values):
        before = chat.tokenizer.decode(ids[max(start - 1, 0) : start], skip_special_tokens=True)
        text = chat.tokenizer.decode(ids[max(start - 1, 0) : i + 1], skip_special_tokens=True)
        held, total = text[len(before) :], total + value
        if "\ufffd" in held and i + 1 < len(values):
            continue
        if held:
            out.append((held, total))
        total, start = 0.0, i + 1
    return out
