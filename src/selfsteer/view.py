"""Everything that reads a run reads it here: one typed view of its folder.

    run = RunView.open("runs/mine")
    run.rounds[-1].quality.preferences.accuracy

Opening reads ``resolved.json`` and ``ledger.jsonl``; everything else is read when it is asked for.
The run may be unfinished, under way or killed in the middle of a line. Nothing is locked, nothing
is written and no model is asked.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, NotRequired, TypeVar, cast

from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from pydantic_core import to_jsonable_python
from typing_extensions import TypedDict  # pydantic asks for this one on Python 3.11

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import digest
from selfsteer.data.jsonl import Records, Stored, lines, read_jsonl
from selfsteer.data.records import Preference, Query, Triple
from selfsteer.engines.usage import Usage
from selfsteer.errors import ArtifactError, ConfigError, clip, short, some
from selfsteer.evaluation.benchmark_table import markdown
from selfsteer.judges.stats import Interval
from selfsteer.methods import METHODS, Aligning, AnyRecipe, Principled, Recipe
from selfsteer.principles.contexts import CONTEXTS
from selfsteer.recipe.read import choose, load_values, method_of, subsections, validate
from selfsteer.recipe.sections import Loading, Section, resolve_path
from selfsteer.recipe.texts import is_endless
from selfsteer.run.folder import (
    LEDGER,
    RunFolder,
    check_files,
    logged,
    read_ledger,
    recipe_file,
)
from selfsteer.run.progress import FILE, progress_of
from selfsteer.run.sources import check_sources
from selfsteer.run.sums import Sums, check_sums

T = TypeVar("T")

# -- figures that stages wrote ---------------------------------------------------------------------


def _needs(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Refuses a mapping that lacks one of these names."""

    def check(found: dict[str, Any]) -> dict[str, Any]:
        if lacking := [name for name in names if name not in found]:
            raise ValueError(f"lacks {lacking[0]}")
        return found

    return check


def _of(*names: str) -> AfterValidator:
    """`_needs` as pydantic asks for it."""
    return AfterValidator(_needs(*names))


def _drawable(found: dict[str, Any]) -> dict[str, Any]:
    """Refuses a report of benchmarks that no table can be made of."""
    try:
        markdown(found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise ValueError(f"is no report of benchmarks: {type(e).__name__} {e}") from None
    return found


#: What ``benchmarks.json`` holds.
_REPORT = cast("type[dict[str, Any]]", Annotated[dict[str, Any], AfterValidator(_drawable)])


def _inside(name: str) -> str:
    """Refuses what is no name of a file in a run folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("is no name of a file in the run folder")
    return name


#: A number of records or tokens, small enough for every program that draws it.
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
#: Seconds that something took: less than 30,000 years.
Seconds = Annotated[FiniteFloat, Field(ge=0, le=1e12)]
#: The name of a file or a stage in a run folder, from which nothing leads out.
Inside = Annotated[str, AfterValidator(_inside)]


def is_own(run: Path, path: Path) -> bool:
    """Whether a file is a run's own; no pipe, and nothing that a link brings in."""
    return path.resolve().is_relative_to(run.resolve()) and not is_endless(path)


@checked(frozen=True)
class SetFigures:
    """Quality of one set of pairs, under the policy at the start of the round.

    Mappings are by ``chosen``, ``rejected`` and, where it was sampled, ``plain``; on-policyness has
    ``both`` beside them, the steering gap is by ``good`` and ``bad``. ``of`` counts the records of
    the set, ``pairs`` those that were measured.
    """

    of: int
    pairs: int
    accuracy: float | None
    verdicts: dict[str, int] | None
    on_policyness: Annotated[dict[str, float], _of("both", "chosen", "rejected")]
    logps: Annotated[dict[str, float], _of("chosen", "rejected")]
    steering_gap: Annotated[dict[str, float], _of("good", "bad")] | None
    tokens: Annotated[dict[str, float], _of("chosen", "rejected")]


@checked(frozen=True)
class Quality:
    """``quality.json`` of a round: the pairs, and the policy's own triples where it has some."""

    judge: str | None
    preferences: SetFigures
    triples: SetFigures | None = None


@checked(frozen=True)
class Answers:
    """What one model answered to the evaluation queries."""

    tokens: float
    unfinished: int
    score: Interval | None = None
    win_rate: Interval | None = None
    verdicts: dict[str, int] | None = None


@checked(frozen=True)
class Difference:
    """Score of the first method minus that of the second, paired by query."""

    of: str
    score: Interval


@checked(frozen=True)
class Example:
    """The held-out query that gained most: answers and scores of ``base`` and the last policy."""

    id: str
    query: str
    answers: dict[str, str]
    scores: dict[str, float]


@checked(frozen=True)
class Rule:
    """A rule of judge ``checks``: by label, the share of answers that keep it.

    ``gained`` is that share minus the base's, paired by query.
    """

    queries: int
    kept: dict[str, float]
    gained: dict[str, Interval]


@checked(frozen=True)
class Evaluation:
    """``evaluation.json``: ``models`` is by label, ``finals`` names each method's last label."""

    queries: int
    judge: str | None
    score_scale: str | None
    finals: dict[str, str]
    models: dict[str, Answers]
    differences: tuple[Difference, ...] = ()
    example: Example | None = None
    rules: dict[str, Rule] = field(default_factory=dict)


@checked(frozen=True)
class Exhibit:
    """One query, answered by policy and generator in each context."""

    query: str
    principles: Annotated[dict[str, Any], _of("good", "bad")]
    responses: dict[str, Annotated[dict[str, str], _of(*CONTEXTS)]]


@checked(frozen=True)
class RewardPart:
    """Accuracy on a part of the held-out pairs."""

    pairs: int
    accuracy: Interval | None = None


def _of_pairs(found: dict[str, float]) -> dict[str, float]:
    """Refuses a range with pairs and without figures."""
    return _needs("stated", "right")(found) if found["pairs"] else found


@checked(frozen=True)
class Calibration:
    """How far stated probabilities are right, and in which ranges; see `reward_quality`."""

    ece: float
    bins: list[Annotated[dict[str, float], _of("from", "to", "pairs"), AfterValidator(_of_pairs)]]


@checked(frozen=True)
class HeldOut(RewardPart):
    """A reward model on the pairs that it was not trained on; without any, ``pairs`` is 0."""

    longer_is_chosen: Interval | None = None
    by_source: dict[str, RewardPart] = field(default_factory=dict)
    by_length: dict[str, RewardPart] = field(default_factory=dict)
    calibration: Calibration | None = None


@checked(frozen=True)
class RewardSource:
    """What became of a preference set."""

    read: Count
    weight: float
    trained: Count
    dropped: dict[str, Count]


@checked(frozen=True)
class Reward:
    """``reward.json``: ``sources`` is by preference set."""

    sources: dict[str, RewardSource]
    held_out: HeldOut


@checked(frozen=True)
class Candidate:
    """A step of a training that was measured, see docs/selection.md."""

    step: int
    wins_mean: Interval | None = None
    on_policyness: dict[str, float] | None = None
    excess: dict[str, float] | None = None


@checked(frozen=True)
class Selection:
    """``*.selection.json``: the candidates of a training, and the step that was kept."""

    chosen: int
    steps: int
    wins: str | None
    candidates: list[Candidate]


class Answer(NamedTuple):
    """One model's answer to an evaluation query."""

    query: Query
    text: str
    tokens: int
    #: Whether it ended by itself, not by the budget.
    finished: bool = True


class SelectionNote(TypedDict):
    """What a training notes of the step that it kept."""

    text: str
    warnings: NotRequired[list[str]]


class Notes(TypedDict, total=False):
    """What of a stage's notes in the ledger is shown; it may have others."""

    warnings: list[str]
    logged: str
    selection: SelectionNote
    diversity: dict[str, dict[str, float]]
    first_try: dict[str, Count]
    retry: dict[str, Count]
    sources: dict[str, Count]
    survivors: dict[str, Count]
    entries: float
    covered: float
    reward: float
    lengths: dict[
        str,
        Annotated[
            dict[str, float | None],
            _of("pairs", "chosen", "rejected", "longer_chosen", "longer_rejected"),
        ],
    ]
    sampled: Annotated[dict[str, float], _of("answers", "retokenised", "special_tokens")]


_NOTES = TypeAdapter(Notes)


def _legible(notes: dict[str, Any]) -> dict[str, Any]:
    """Refuses notes of a stage that cannot be shown; they stay as they are."""
    _NOTES.validate_python(notes)
    return _needs("covered", "reward")(notes) if "entries" in notes else notes


# -- reading -------------------------------------------------------------------------------------


def _read(kind: type[T], path: Path) -> T | None:
    """A JSON file as what it holds; None where it is not there.

    Raises:
        ArtifactError: it holds something else.
    """
    return read_json(kind, path) if path.exists() else None


def _file(kind: type[T], name: str) -> cached_property[T | None]:
    """A JSON file of a view's folder, read when it is first asked for; a link out of it is none."""

    def read(view: Any) -> T | None:
        run: RunView = getattr(view, "run", view)
        path = view.folder / name
        if not run.owns(path):
            return None
        run.check(path)
        return _read(kind, path)

    return cached_property(read)


def _asked(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved section is not the default: no other setting can have been in its way."""
    out = {}
    for name, value in values.items():
        known = section.model_fields.get(name)
        if known and not known.is_required() and to_jsonable_python(known.get_default()) == value:
            continue
        inner = subsections(known.annotation) if known else []
        out[name] = _asked(inner[0], value) if inner and isinstance(value, dict) else value
    return out


def _changed(run: Path, resolved: Mapping[str, Any], methods: Sequence[type[Recipe]]) -> list[str]:
    """Settings that a recipe leaves open, and that stand otherwise in what was made of it then."""
    try:
        path = recipe_file(run)
        given = load_values(str(path))
        now = validate(choose(methods, given, str(path)), given, str(path), methods)
    except (ConfigError, ArtifactError):
        return []
    if not resolved.keys() >= given.keys():
        return []  # it was not made of this recipe by any version
    asked, here = _dotted(given), _dotted(now.model_dump(mode="json"))
    return [
        f"{key} is {short(value)} there, "
        + (f"{short(here[key])} here" if key in here else "and unknown here")
        for key, value in _dotted(resolved).items()
        if key not in asked and (key not in here or here[key] != value)
    ]


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values by their dotted keys."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= _dotted(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


@lru_cache(maxsize=16)
def _metrics(
    path: Path, size: int, modified_ns: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The lines of each stage, and their digest."""
    found = logged(path)
    return found, {stage: digest(entries) for stage, entries in found.items()}


# -- the run ---------------------------------------------------------------------------------------


@checked(frozen=True)
class StageView:
    """A stage as the ledger knows it; counts and seconds are 0 until it is ``done``.

    ``method`` is None where it serves every method of the run, ``round`` where it belongs to none.
    ``title`` is its name without the round's folder: ``triples``, ``generator/plus``.
    """

    run: Path
    name: Inside
    kind: str
    method: str | None
    round: int | None
    title: str
    fingerprint: str
    done: bool
    began: FiniteFloat
    time: FiniteFloat
    outputs: Annotated[Sequence[Inside], Field(min_length=1)]
    versions: Mapping[str, str] = field(default_factory=dict)
    n_in: Count = 0
    n_out: Count = 0
    dropped: Mapping[str, Count] = field(default_factory=dict)
    seconds: Seconds = 0.0
    notes: Annotated[dict[str, Any], AfterValidator(_legible)] = field(default_factory=dict)
    sums: Sums = field(default_factory=dict)

    @cached_property
    def selection(self) -> Selection | None:
        """Of a training: what was measured while it went on."""
        path = self.run / f"{self.name}.selection.json"
        self.check(path)
        return _read(Selection, path) if is_own(self.run, path) else None

    def check(self, below: Path | None = None, *, most: int | None = None) -> None:
        """Fails where what it made is not as it wrote it; see `check_sums`.

        Where nothing of it is left, it was deleted to be made again.

        Raises:
            ArtifactError: names the file.
        """
        beside = (f"{self.name}.dropped.jsonl", f"{self.name}.selection.json")
        if self.done and any((self.run / o).exists() for o in self.outputs if o not in beside):
            check_sums(self.run, self.name, self.sums, below, most=most)

    @property
    def files(self) -> list[Path]:
        """The records that it wrote: a file, or shards; a link out of the run is left out."""
        path = self.run / self.outputs[0]
        found = sorted(path.glob("shard-*.jsonl")) if path.is_dir() else [path]
        return [p for p in found if is_own(self.run, p)]

    @property
    def dropped_file(self) -> Path | None:
        """The records that it dropped: ``id``, ``reason`` and, as it saw it, ``record``.

        None, or shorter than ``dropped`` counts, where the run kept no record of them.
        """
        path = self.run / f"{self.name}.dropped.jsonl"
        return path if path.exists() and is_own(self.run, path) else None


def answers_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The answers of a stored triple, or of candidates as ``answer 1`` and so on, by name."""
    found = dict(record.get("responses") or {})
    found |= {f"answer {i}": text for i, text in enumerate(record.get("answers") or (), 1)}
    return {name: text for name, text in found.items() if text is not None}


#: Kinds of stages whose answers can be browsed.
SAMPLING = ("Sample", "RankAnswers", "PickFurthest")


@dataclass(frozen=True)
class Sampled:
    """What a stage sampled, in finished shards, and the stages that it then goes through.

    They are triples; ``ranked``: candidates, several plain answers each, of which the stage itself
    makes a pair.
    """

    name: str
    shards: tuple[Path, ...]
    round: "RoundView"
    takers: tuple[StageView, ...]
    ranked: bool = False


@dataclass(frozen=True)
class RoundView:
    """One iteration of one method."""

    run: "RunView" = field(repr=False)
    method: str
    k: int
    folder: Path

    @property
    def label(self) -> str:
        """What the evaluation calls its policy."""
        return f"{self.method}/iteration-{self.k}"

    @property
    def is_baseline(self) -> bool:
        """Whether it is of a baseline of the recipe."""
        return self.method != self.run.recipe.method

    @cached_property
    def recipe(self) -> Aligning:
        """The recipe of its method: the run's own, or that of a baseline."""
        own = self.run.recipe
        assert isinstance(own, Aligning)  # others have no rounds
        baselines = own.baselines if isinstance(own, Principled) else ()
        return next((b for b in baselines if b.method == self.method), own)

    @property
    def home(self) -> str:
        """The folder of its method's rounds in the run folder."""
        return self.run.recipe.homes[self.method]

    @cached_property
    def stages(self) -> tuple[StageView, ...]:
        """Its stages, those that it shares with another method included."""
        mine = (self.method, None)
        return tuple(s for s in self.run.stages if s.round == self.k and s.method in mine)

    @cached_property
    def before(self) -> tuple[StageView, ...]:
        """The stages of its method that no round has, such as what a reward model was made of."""
        return tuple(s for s in self.run.stages if s.round is None and s.method == self.method)

    @property
    def start(self) -> str | None:
        """The stage that trained the policy that it starts from; None: that policy was given."""
        if self.k > 1:
            return str(Path(self.home, f"iteration-{self.k - 1}", "policy"))
        first = ("Train", self.method, None)
        found = (s.name for s in self.run.stages if (s.kind, s.method, s.round) == first)
        return next(found, None)

    @property
    def has_generator(self) -> bool:
        """Whether a generator writes its preferences."""
        return any(s.title.partition("/")[0] == "generator" for s in self.stages)

    @property
    def pairs_are_triples(self) -> bool:
        """Whether its preferences are its triples, so that they would count twice."""
        return not self.has_generator and any(s.kind == "FilterTriples" for s in self.stages)

    #: Figures of its pairs.
    quality = _file(Quality, "quality.json")

    @property
    def measured(self) -> dict[str, SetFigures]:
        """``triples`` and ``preferences`` with their figures, as far as they were measured."""
        found = self.quality
        both = {"triples": found.triples, "preferences": found.preferences} if found else {}
        return {kind: figures for kind, figures in both.items() if figures}

    @property
    def principles(self) -> Records[Triple]:
        """The queries of the round with their principles, or those that hold for all rounds."""
        written = [s for s in (*self.before, *self.stages) if s.kind == "WritePrinciples"]
        return self._stored(self.run.folder / written[-1].outputs[0], Triple) if written else ()

    @property
    def triples(self) -> Records[Triple]:
        """The policy's own triples that were worth training on."""
        return self._stored(self.folder / "filtered.jsonl", Triple)

    @property
    def samples(self) -> Records[Triple]:
        """What was sampled for the preferences, before any of it was dropped."""
        return self._stored(self.folder / "samples", Triple)

    @property
    def preferences(self) -> Records[Preference]:
        """The pairs that the policy was trained on."""
        return self._stored(self.folder / "preferences", Preference)

    def _stored(self, path: Path, kind: Any) -> Any:
        """Records that are there and the run's own."""
        # they are read all or none, so that one link out of the run is enough
        files = sorted(path.glob("shard-*.jsonl")) if path.is_dir() else [path]
        self.run.check(path)
        whole = files and all(p.exists() and self.run.owns(p) for p in files)
        return Stored(path, kind.from_dict) if whole else ()

    @property
    def sampled(self) -> list[Sampled]:
        """What its stages sampled, in their order; the first round has what came before it, too.

        Of sets that are picked from, the newest, and in the end what was picked.
        """
        out = []
        stages = (*self.before, *self.stages) if self.k == 1 else self.stages
        for i, stage in enumerate(stages):
            then = stages[i + 1].kind if i + 1 < len(stages) else None
            if stage.kind not in SAMPLING or then in SAMPLING:  # others join what it sampled
                continue
            ranked = stage.kind == "RankAnswers"
            made = self.run.folder / stage.outputs[0]
            shards = self.run.shards(made / "candidates" if ranked else made)
            takers = [stage] if ranked else []
            for later in stages[i + 1 :]:
                if later.kind in (*SAMPLING, "Train", "TrainReward", "MeasureQuality"):
                    break
                takers.append(later)
            if shards:
                out.append(Sampled(stage.name, tuple(shards), self, tuple(takers), ranked))
        return out

    @property
    def scores(self) -> Path | None:
        """The folder with log-probs under the policy that the round starts from, if any are kept.

        Each folder of log-probs says whose they are; a run that was moved keeps its own models.
        """
        base = Path(resolve_path(self.run.recipe.policy.model)).parts
        homes = self.run.recipe.homes.values()
        start = Path(self.start).parts[-2:] if self.start else base[-2:]
        others = []
        for about in sorted((self.run.folder / "scores").glob("*/model.json")):
            model = Path(str(next(lines(about), {}).get("model"))).parts
            if model == base:  # which may be another run's policy, and be called as one of ours
                if not self.start:
                    return about.parent
                continue
            above = model[-3] if len(model) > 2 else ""
            is_ours = self.k == 1 or (above if above in homes else "") == self.home
            if model[-2:] == start and is_ours:
                others.append(about.parent)
        return next(iter(others), None)


@dataclass(frozen=True)
class RunView:
    """A run folder: its recipe, its stages in the order in which they began, and what they made."""

    folder: Path
    recipe: AnyRecipe
    stages: tuple[StageView, ...]

    @classmethod
    def open(cls, folder: Path | str, methods: Sequence[type[Recipe]] = METHODS) -> "RunView":
        """Opens a run, finished or not.

        Args:
            folder: of the run.
            methods: the recipe classes that it can be of: give your own where it is of none of
                selfsteer's.

        Raises:
            ArtifactError: it is not a run folder, its recipe is not one that this version knows,
                or its ledger is damaged.
        """
        folder = Path(folder)
        resolved = folder / "resolved.json"
        if not resolved.exists():
            raise ArtifactError(
                f"{folder} is not a run folder: it has no resolved.json. Give the folder that "
                "'selfsteer run' wrote, for example runs/demo."
            )
        check_files(folder)
        for path in (resolved, folder / LEDGER):
            _refuse_foreign(folder, path)
        values = read_json(dict[str, Any], resolved)
        try:
            model = choose(methods, values, str(resolved))
            asked = {**_asked(model, values), "method": method_of(model)}
            recipe: Any = validate(model, asked, str(resolved), methods)
        except ConfigError as e:
            if changed := _changed(folder, values, methods):
                raise ArtifactError(
                    f"{resolved} was written by another version of selfsteer, whose defaults are "
                    f"not those of this one: {some(changed)}. Read the run with that version."
                ) from None
            raise ArtifactError(
                f"{e} The file is damaged, or another version of selfsteer wrote it: restore it "
                "from a copy, or read the run with that version."
            ) from None
        return cls(folder, recipe, tuple(_stages(folder)))

    # -- what it consists of ----------------------------------------------------------------------

    @property
    def methods(self) -> tuple[str, ...]:
        """The recipe's method, then its baselines."""
        return self.recipe.methods

    @cached_property
    def rounds(self) -> tuple[RoundView, ...]:
        """The iterations that have begun, the method's before the baselines'."""
        found = (
            RoundView(self, method, k, self.folder / home / f"iteration-{k}")
            for method, home in self.recipe.homes.items()
            for k in range(1, self.recipe.last_round + 1)
        )
        return tuple(r for r in found if r.folder.is_dir())

    def rounds_of(self, method: str) -> list[RoundView]:
        """One method's rounds."""
        return [r for r in self.rounds if r.method == method]

    def round(self, number: int | None = None, *, baseline: bool = False) -> RoundView:
        """One round, by default the last one that the recipe asks for.

        Args:
            number: which one.
            baseline: of the first baseline instead of the method.

        Raises:
            ConfigError: the run has no baseline.
            ArtifactError: the run has no such round, or none yet.
        """
        if baseline and len(self.methods) < 2:
            raise ConfigError(f"{self.folder} has no baseline.")
        found = {r.k: r for r in self.rounds_of(self.methods[baseline])}
        wanted = self.recipe.last_round if number is None else number
        if wanted not in found:
            begun = ", ".join(f"iteration-{k}" for k in found) or "there is none"
            raise ArtifactError(
                f"{self.folder}: iteration-{wanted} is not there: the run has no such iteration, "
                f"or has not come that far ({begun})."
            )
        return found[wanted]

    @property
    def sampled(self) -> list[Sampled]:
        """The triples that can be browsed, in the order in which they were made."""
        return [s for r in self.rounds for s in r.sampled]

    def stage(self, kind: str) -> StageView | None:
        """The newest stage of a kind."""
        return next((s for s in reversed(self.stages) if s.kind == kind), None)

    @property
    def measured(self) -> list[tuple[RoundView, str, SetFigures]]:
        """Every measured set of pairs with its round and its kind."""
        return [(r, kind, figures) for r in self.rounds for kind, figures in r.measured.items()]

    @property
    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Stage → the lines that its training logged, in their order.

        Raises:
            ArtifactError: a finished training logged others.
        """
        path = self.own(self.folder / "metrics.jsonl")
        if not path.exists():
            return {}
        found = path.stat()
        out, digests = _metrics(path, found.st_size, found.st_mtime_ns)
        # a log that was removed begins with a later training: those before have none
        begun = not out
        for stage in sorted(self.stages, key=lambda s: s.time):
            begun = begun or stage.name in digests
            mine = digests.get(stage.name, digest([]))
            if begun and stage.notes.get("logged", mine) != mine:
                raise ArtifactError(
                    f"{path} is damaged: {stage.name} logged other lines. Restore it from a copy, "
                    "or remove it, and the run is shown without curves."
                )
        return out

    #: Figures of the models on held-out queries, an example of steering, the reward model, and what
    #: `selfsteer.evaluation.benchmark_table` shows; each None where there is none.
    evaluation = _file(Evaluation, "evaluation.json")
    exhibit = _file(Exhibit, "evaluation/exhibit.json")
    reward = _file(Reward, "reward.json")
    benchmarks = _file(_REPORT, "benchmarks.json")

    def answers(self, label: str) -> dict[str, Answer]:
        """A model's answers to the evaluation queries by query id; failed requests are left out."""
        path = self.own(self.folder / "evaluation" / f"answers-{label.replace('/', '-')}.jsonl")
        self.check(path)
        return {
            v["id"]: Answer(
                Query.from_dict(v), v["response"], v["completion_tokens"], reason == "stop"
            )
            for _, v in read_jsonl(path)
            if (reason := v["finish_reason"]) in ("stop", "length")
        }

    def last(self, method: str) -> tuple[Answers | None, SetFigures | None]:
        """Of a method's last policy, or ``base``: its answers, and the pairs it was trained on."""
        found = self.evaluation
        answers = found.models.get(found.finals.get(method, method)) if found else None
        measured = [r.quality.preferences for r in self.rounds_of(method) if r.quality]
        return answers, measured[-1] if measured else None

    @property
    def usage(self) -> Counter[str]:
        """What servers were asked, over all tries."""
        return sum((u.counts for u in self._usages), Counter[str]())

    @property
    def cost(self) -> float | None:
        """What servers took, as far as their prices are known; None where none is."""
        costs = [u.cost for u in self._usages if u.cost is not None]
        return sum(costs) if costs else None

    @property
    def _usages(self) -> list[Usage]:
        places = ("usage/*.json", "judgements/*/usage/*.json")
        found = (path for place in places for path in sorted(self.folder.glob(place)))
        return [Usage(path) for path in found if self.owns(path)]

    @property
    def loading(self) -> Loading:
        """How the run's models are loaded; chat templates write the run's day."""
        policy = self.recipe.policy
        return policy.loading.model_copy(update={"date": policy.date or RunFolder(self.folder).day})

    @property
    def models(self) -> dict[str, str]:
        """By label: base; generator, policy and baselines of the last rounds; reward."""
        places: dict[str, Path] = {}
        own = ("generator", "generator/plus", "generator/minus", "policy")
        for r in self.rounds:
            titles = {"policy": r.home} if r.is_baseline else dict(zip(own, own, strict=True))
            places |= {label: r.folder / title for title, label in titles.items()}
        places["reward"] = self.folder / "reward"
        trained = {x: str(p) for x, p in places.items() if any(p.glob("*.safetensors"))}
        return {"base": self.recipe.policy.model, **trained}

    @property
    def checked_models(self) -> dict[str, str]:
        """The models, of which every file is as it was when the run read or wrote it; about 1 GB/s.

        Raises:
            ArtifactError: one that the run trained is not; names the file.
            DataError: the base model is another one.
        """
        check_sources(self.folder, self.recipe, "policy.model")
        for source in self.models.values():
            self.check(Path(source))
        return self.models

    def seconds_of(self, method: str) -> float | None:
        """Time that a method's policy took, what all methods share included; None: unfinished."""
        if not all(s.done for s in self.stages):
            return None
        after = ("Evaluate", "RunBenchmarks")
        mine = (s for s in self.stages if s.method in (method, None) and s.kind not in after)
        return sum(s.seconds for s in mine)

    # -- where it stands --------------------------------------------------------------------------

    @property
    def progress(self) -> dict[str, Any] | None:
        """What its last or present process says of itself (`selfsteer.run.progress`)."""
        return progress_of(self.folder) if self.owns(self.folder / FILE) else None

    @property
    def finished(self) -> bool:
        """Whether it has come to what its recipe wants last, and nothing is half done."""
        names = {s.name for s in self.stages}
        return all(s.done for s in self.stages) and names.issuperset(
            s.name for s in self.recipe.plan()
        )

    @property
    def state(self) -> str:
        """As `progress_of` says, but ``finished`` or ``stopped`` where no process works.

        A process that ended well has finished the run unless it was told to stop after a stage.
        """
        now = self.progress
        if now is not None and now["state"] != "ended":
            return str(now["state"])
        return "finished" if self.finished else "stopped"

    # -- files ------------------------------------------------------------------------------------

    def check(self, below: Path | None = None, *, most: int | None = None) -> None:
        """Fails where a file that a stage made is not as it wrote it; see `check_sums`.

        Args:
            below: the file or folder that counts; None: all.
            most: of larger files only the size counts.

        Raises:
            ArtifactError: names the file.
        """
        for stage in self.stages:
            stage.check(below, most=most)

    def owns(self, path: Path) -> bool:
        """See `is_own`."""
        return is_own(self.folder, path)

    def own(self, path: Path) -> Path:
        """A file or a folder of shards of this run that is to be read, if it is there.

        Raises:
            ArtifactError: it, or a shard in it, is a link that leads out of the run.
        """
        for read in (path, *path.glob("shard-*.jsonl")):
            _refuse_foreign(self.folder, read)
        return path

    def settled(self, path: Path) -> Path:
        """What a stage of this run wrote, as it wrote it, all of it.

        Raises:
            ArtifactError: the stage has not finished; or what it wrote is damaged, or is a link
                that leads out of the run.
        """
        for stage in self.stages:
            if not stage.done and path in [self.folder / o for o in stage.outputs]:
                raise ArtifactError(
                    f"{path} is not finished: the stage {stage.name} has written a part of it at "
                    "most. Run the recipe to its end first; it goes on where it was."
                )
        self.check(path)
        return self.own(path)

    def place(self, name: str) -> Path:
        """Where something new of this name may be written in the run folder.

        Raises:
            ArtifactError: it, or something in it, is a link that leads out of the run.
        """
        path, home = self.folder / name, self.folder.resolve()
        for place in (path, *filter(Path.is_symlink, path.rglob("*"))):
            if not place.resolve().is_relative_to(home):
                raise ArtifactError(
                    f"{place} is a link that leads out of the run folder, and nothing is written "
                    "there. Remove the link."
                )
        return path

    def shards(self, folder: Path) -> list[Path]:
        """Finished shards of a folder, in order; a link that leads out of the run is left out."""
        return [p for p in sorted(folder.glob("shard-*.jsonl")) if self.owns(p)]

    @property
    def foreign(self) -> list[str]:
        """What would be shown, did it not lead out of the run by a link."""
        shown = {"evaluation/exhibit.json": [self.folder / "evaluation" / "exhibit.json"]}
        for r in self.rounds:
            folder = r.folder / "preferences"
            shown[str(folder.relative_to(self.folder))] = list(folder.glob("shard-*.jsonl"))
        return [name for name, paths in shown.items() if not all(map(self.owns, paths))]

    @property
    def recipe_file(self) -> Path:
        """The recipe as it was given.

        Raises:
            ArtifactError: it is a link that leads out of the run.
        """
        return recipe_file(self.folder)

    def to_json(self) -> dict[str, Any]:
        """What ``show --json`` prints: the files of the run that are JSON, as they are."""

        def read(path: Path) -> Any:
            self.check(path)
            return _read(dict[str, Any], path) if self.owns(path) else None

        return {
            "run": str(self.folder),
            "recipe": read(self.folder / "resolved.json"),
            "stages": {
                name: {k: v for k, v in entry.items() if k != "sums"}
                for name, entry in _newest(self.folder)[1].items()
            },
            "quality": {
                method: [
                    read(r.folder / "quality.json") for r in self.rounds_of(method) if r.quality
                ]
                for method in self.methods
            },
            "evaluation": read(self.folder / "evaluation.json"),
            "benchmarks": read(self.folder / "benchmarks.json"),
            "exhibit": read(self.folder / "evaluation" / "exhibit.json"),
            "reward": read(self.folder / "reward.json"),
            "models": self.models,
        }


def _refuse_foreign(run: Path, path: Path) -> None:
    """Raises ArtifactError where a file of a run is a link out of it."""
    if not is_own(run, path):
        raise ArtifactError(
            f"{path} is a link that leads out of the run folder, and what it leads to may not be "
            "meant for others. Put the file itself there."
        )


def _newest(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Each stage's newest beginning and its newest entry in the ledger; none once superseded."""
    began, last = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for entry in read_ledger(folder / LEDGER):
        name = entry["stage"]
        if entry["event"] == "begin":
            began[name] = entry
        if entry["event"] == "superseded":
            last.pop(name, None)
        else:
            last[name] = entry
    return began, last


def _stages(folder: Path) -> Iterator[StageView]:
    began, last = _newest(folder)
    for name, entry in last.items():
        first = began.get(name, entry)
        given = {f.name: entry[f.name] for f in fields(StageView) if f.name in entry}
        try:
            yield StageView(
                run=folder,
                name=name,
                done=entry["event"] == "finish",
                began=first["time"],
                **{**given, "versions": first.get("versions", {})},
            )
        except (KeyError, TypeError, ValidationError) as e:
            why = ""
            if isinstance(e, ValidationError):
                fault = e.errors()[0]
                why = clip(f" ({'.'.join(map(str, fault['loc']))}: {fault['msg']})", 200)
            raise ArtifactError(
                f"{folder / LEDGER} does not say what {short(name)} is{why}: another version of "
                "selfsteer wrote it, or it was changed. Read this run with that version, or "
                "restore the file from a copy."
            ) from None
