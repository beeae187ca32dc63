"""What the stages of a plan will ask for: answers, scored and trained sequences, models on disk.

Counts come from the stages themselves, so that a recipe's loop is written down only once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from selfsteer.judges.quality import GAP_SEQUENCES, PLAIN_SEQUENCES
from selfsteer.recipe.sections import PLAIN_METHODS, Optimisation, Recipe
from selfsteer.run.folder import Stage
from selfsteer.stages.filter import FILTER_SEQUENCES
from selfsteer.stages.measure import QUALITY_PAIRS
from selfsteer.stages.train import objective_from

#: Seconds of a training step over those of a forward: the backward costs two (arXiv 2001.08361,
#: table 1), recomputed activations one more.
FORWARD_BACKWARD, RECOMPUTED = 3, 1

#: Bytes of text per token, of a score, and per parameter of a resumable checkpoint (weights and
#: AdamW's two moments in float32).
TEXT, SCORE, CHECKPOINT = 5, 4, 12


@dataclass
class Workload:
    """Counts over stages, as if nothing were dropped."""

    #: what comes out of the stages, trained models aside
    records: int = 0
    principles: int = 0
    #: response name → answers
    answers: Counter[str] = field(default_factory=Counter)
    #: (folder, data, context/response) → sequences scored; each is scored once, whoever asks
    scores: dict[tuple[str, str, str], int] = field(default_factory=dict)
    #: pairs of responses that the judge compares
    judged: int = 0
    #: trained sequences, as so many forward passes
    training: float = 0
    #: of each training its sequences, its records, and the forward passes over each sequence
    trained: list[tuple[tuple[str, ...], int, float]] = field(default_factory=list)
    models: int = 0
    #: stages that are not counted here
    unknown: list[str] = field(default_factory=list)

    @property
    def forwards(self) -> int:
        """Forward passes over one sequence for the filter, the quality report and references."""
        return sum(self.scores.values())

    def score(self, where: str, data: str, sequences: Sequence[str], n: int) -> None:
        """Asks for ``n`` records' sequences of a set."""
        for name in sequences:
            key = (where, data, name)
            self.scores[key] = max(self.scores.get(key, 0), n)


@dataclass(frozen=True)
class Rates:
    """Measured seconds."""

    per_principles: float
    #: response name → of one answer
    per_answer: dict[str, float]
    per_forward: float
    #: of one pair; None where there is no judge, or none that works
    per_judged: float | None = None


def workload(recipe: Recipe, stages: Sequence[Stage], queries: int, held_out: int) -> Workload:
    """Adds up stages.

    Args:
        recipe: what the stages were planned from.
        stages: those that are not done.
        queries: in the query set, as it is now.
        held_out: evaluation queries.
    """
    if recipe.queries.augment is not None:
        queries = max(queries, recipe.queries.augment.to)
    share = queries
    if recipe.method == "sso-online":
        size = recipe.queries.per_iteration or -(-queries // recipe.iterations)
        share = min(size, queries)
    steering = min(recipe.generator.queries, share) if recipe.method == "sso" else share
    total = Workload()
    for stage in stages:
        where, _, kind = stage.name.removesuffix("/plus").removesuffix("/minus").rpartition("/")
        online = recipe.method == "sso-online" and not where.startswith("baseline")
        data = "triples" if online else "samples"
        if kind in ("queries", "preferences", "opponents"):
            total.records += queries if kind == "queries" else share
        elif kind == "principles":
            total.records += share
            total.principles += share
        elif kind == "improved":
            total.records += share
            total.answers["plain"] += share
        elif kind in ("triples", "samples"):
            n = steering if kind == "triples" else share
            total.records += n
            total.answers.update(dict.fromkeys(stage.inputs["models"], n))
        elif kind == "ranked":
            total.records += share
            total.answers["plain"] += recipe.ranking.samples * share
            judge, n = recipe.ranker, recipe.ranking.samples
            # who only compares holds a tournament
            if recipe.method == "self-rewarding" or (judge and judge.kind == "chat"):
                n = n * (n - 1) // 2
            total.judged += n * share
        elif kind == "filter":
            total.records += steering
            total.score(
                where, "triples", FILTER_SEQUENCES, steering * (recipe.active_filter is not None)
            )
        elif kind == "quality":
            # without principles there is no steering gap
            pairs: tuple[str, ...] = PLAIN_SEQUENCES
            if recipe.method not in PLAIN_METHODS:
                pairs = (*PLAIN_SEQUENCES, *GAP_SEQUENCES)
            judged = min(share, QUALITY_PAIRS)
            total.records += share
            total.score(where, data, pairs, judged)
            if stage.inputs["triples"]:
                n = min(steering, QUALITY_PAIRS)
                total.score(where, "triples", (*pairs, "plain/plain"), n)
                judged += n
            total.judged += judged * (recipe.judge is not None)
        elif kind == "generator":
            half = stage.name.rpartition("/")[2]
            name = recipe.generator.objective if half == kind else f"sso-{half}-only"
            _train(total, where, "triples", name, recipe.generator, steering)
        elif kind == "policy":
            _train(total, where, data, stage.inputs["method"], recipe.training, share)
        elif kind == "evaluation":
            models = len(stage.inputs["models"])
            total.records += held_out
            total.answers["plain"] += models * held_out
            total.judged += (models - 1) * held_out * (recipe.judge is not None)
        else:
            total.unknown.append(stage.name)
    return total


def _train(
    total: Workload, where: str, data: str, name: str, settings: Optimisation, queries: int
) -> None:
    objective = objective_from(name, settings)
    if objective.base.needs_reference:
        total.score(where, data, objective.sequences, queries)
    cost = FORWARD_BACKWARD + RECOMPUTED * settings.gradient_checkpointing
    passes = cost * settings.epochs * queries
    total.training += passes * len(objective.sequences)
    total.trained.append((objective.sequences, queries, passes))
    total.records += queries
    total.models += 1


def seconds(work: Workload, rates: Rates) -> dict[str, float]:
    """Kind of work → seconds, at the measured rates."""
    return {
        "principles": work.principles * rates.per_principles,
        "sampling": sum(n * rates.per_answer[r] for r, n in work.answers.items()),
        "scoring": work.forwards * rates.per_forward,
        "training": work.training * rates.per_forward,
        "judging": work.judged * (rates.per_judged or 0.0),
    }


def disk_bytes(
    work: Workload,
    recipe: Recipe,
    parameters: int,
    bytes_per_weight: int,
    tokens: int | None = None,
) -> dict[str, int]:
    """Kind of file → bytes.

    Args:
        work: what is to do.
        recipe: budgets, checkpoints kept.
        parameters: of the policy.
        bytes_per_weight: of a saved model.
        tokens: of an answer; None: all of its budget, so that the bytes are an upper bound.
    """
    tokens = recipe.sampling.max_new_tokens if tokens is None else tokens
    kept = recipe.keep.checkpoints + 1 if work.models else 0  # an old one goes after the new one
    return {
        "models": work.models * parameters * bytes_per_weight,
        # adapters are small beside the model
        "checkpoints": 0 if recipe.policy.lora else kept * parameters * CHECKPOINT,
        # pairs are written once more as preferences
        "samples": 2 * sum(work.answers.values()) * tokens * TEXT,
        "scores": work.forwards * tokens * SCORE,
    }
