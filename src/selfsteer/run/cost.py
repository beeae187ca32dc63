"""What stages ask for: answers, scored and trained sequences, models on disk.

Every stage says its own `Cost`; sums of them are all that `selfsteer plan` and `selfsteer check`
know of a recipe.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from selfsteer.objectives import Objective, TokenObjective
from selfsteer.recipe.sections import Schedule

#: Seconds of a training step over those of a forward: the backward costs two (arXiv 2001.08361,
#: table 1), recomputed activations one more.
FORWARD_BACKWARD, RECOMPUTED = 3, 1

#: Bytes of text per token, of a score, and per parameter of a resumable checkpoint (weights and
#: AdamW's two moments in float32).
TEXT, SCORE, CHECKPOINT = 5, 4, 12


@dataclass(frozen=True)
class Scale:
    """What the counts start from: queries in the query set, and evaluation queries."""

    queries: int
    held_out: int = 0


@dataclass(frozen=True)
class Training:
    """One training: its sequences per record, its records, and forwards over each sequence."""

    sequences: tuple[str, ...]
    records: int
    passes: float


@dataclass
class Cost:
    """Counts, as if nothing were dropped; costs are added with `total`."""

    #: what comes out, trained models aside
    records: int = 0
    #: queries that principles are written for
    principles: int = 0
    #: plain, good, bad, features, principles → answers asked for; contrast → answers that a second
    #: context is decoded for
    answers: Counter[str] = field(default_factory=Counter)
    #: (whose texts, context/response) → sequences scored; each is scored once, whoever asks
    scores: dict[tuple[str, str], int] = field(default_factory=dict)
    #: pairs of responses that a judge compares
    judged: int = 0
    trainings: tuple[Training, ...] = ()
    #: stages whose work is not counted
    unknown: tuple[str, ...] = ()

    @property
    def forwards(self) -> int:
        """Forward passes over one sequence for filters, quality and references."""
        return sum(self.scores.values())

    @property
    def trained(self) -> float:
        """Trained sequences, as so many forward passes."""
        return sum(t.passes * len(t.sequences) for t in self.trainings)


def total(costs: Iterable[Cost]) -> Cost:
    """Adds costs up; a sequence that several of them score is scored by the first."""
    out = Cost()
    for cost in costs:
        for name in ("records", "principles", "answers", "judged", "trainings", "unknown"):
            setattr(out, name, getattr(out, name) + getattr(cost, name))
        for key, n in cost.scores.items():
            out.scores[key] = max(out.scores.get(key, 0), n)
    return out


def scoring(texts: str, sequences: Sequence[str], records: int) -> dict[tuple[str, str], int]:
    """`Cost.scores` of so many records' sequences."""
    return {(texts, name): records for name in sequences}


def training(
    texts: str, objective: Objective | TokenObjective, settings: Schedule, records: int
) -> Cost:
    """What training on an objective asks for, its reference included."""
    passes = FORWARD_BACKWARD + RECOMPUTED * settings.gradient_checkpointing
    names = objective.sequences
    return Cost(
        records=records,
        scores=scoring(texts, names, records) if objective.needs_reference else {},
        trainings=(Training(names, records, passes * settings.epochs * records),),
    )


@dataclass(frozen=True)
class Rates:
    """Measured seconds: of one query's principles, of an answer by response name, of a forward.

    ``per_judged`` is that of one pair; None where there is no judge, or none that works.
    """

    per_principles: float
    per_answer: Mapping[str, float]
    per_forward: float
    per_judged: float | None = None


def seconds(cost: Cost, rates: Rates) -> dict[str, float]:
    """Kind of work → seconds, at the measured rates."""
    return {
        "principles": cost.principles * rates.per_principles,
        "sampling": sum(n * rates.per_answer.get(r, 0.0) for r, n in cost.answers.items()),
        "scoring": cost.forwards * rates.per_forward,
        "training": cost.trained * rates.per_forward,
        "judging": cost.judged * (rates.per_judged or 0.0),
    }


def disk_bytes(
    cost: Cost,
    *,
    tokens: int,
    parameters: int,
    bytes_per_weight: int,
    checkpoints: int,
) -> dict[str, int]:
    """Kind of file → bytes.

    Args:
        cost: what is to do.
        tokens: of an answer; with its whole budget the bytes are an upper bound.
        parameters: of the policy.
        bytes_per_weight: of a saved model.
        checkpoints: resumable ones kept while training; 0 where adapters are trained, which are
            small beside the model.
    """
    models = len(cost.trainings)
    # an old checkpoint goes after the new one
    kept = checkpoints + 1 if models and checkpoints else 0
    sampled = sum(n for r, n in cost.answers.items() if r in ("plain", "good", "bad"))
    return {
        "models": models * parameters * bytes_per_weight,
        "checkpoints": kept * parameters * CHECKPOINT,
        # pairs are written once more as preferences
        "samples": 2 * sampled * tokens * TEXT,
        "scores": cost.forwards * tokens * SCORE,
    }
