"""`selfsteer compare`: runs side by side, what differs and whether it is more than chance.

Everything is read from the run folders; only a judge that has not seen an answer yet is asked.
Scores are compared on the evaluation queries that all runs answered, paired by query.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.records import Query
from selfsteer.errors import ArtifactError, DataError, short
from selfsteer.judges.base import Judge, Pair, ScoringJudge
from selfsteer.judges.load import load_judge
from selfsteer.judges.stats import by_group, known_interval, verdict_counts, worth, worths
from selfsteer.methods import Aligning
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.stages.filter import named_features
from selfsteer.verbs.common import aligning
from selfsteer.view import Answer, RoundView, RunView

#: Kinds of judges that a run folder of somebody else may name: they start and ask nothing.
HARMLESS = ("oracle", "checks", "human")

#: Keys beside a query that name its class, in the order in which they are looked for.
CLASS_KEYS = ("class", "category", "subset", "kind", "source")

#: Pairs of a run that are judged for the figures by feature; a seeded subset of more.
PAIRS = 1000

#: Curves of a training that are shown, by quarter of its steps.
CURVES = ("loss", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class Entrant:
    """One final policy of one run, or its base model, with its answers to the evaluation queries.

    ``last`` is the round that trained it, None for a base model.
    """

    label: str
    run: RunView
    method: str
    last: RoundView | None
    answers: Mapping[str, Answer]


def entrants(runs: Sequence[Path], *, baselines: bool) -> list[Entrant]:
    """The final policy of each run; of a single run, or with ``baselines``, its other models too.

    Raises:
        ArtifactError: not a run folder, or one without an evaluation.
        DataError: a run is named twice, or there is only one model.
    """
    out: list[Entrant] = []
    places = [run.resolve() for run in runs]
    names = [place.name for place in places]
    twice = next((str(r) for i, r in enumerate(runs) if places[i] in places[:i]), None)
    if twice is not None:
        raise DataError(f"{twice} is named twice; a run cannot be compared with itself.")
    for folder, name in zip(runs, names, strict=True):
        run = RunView.open(folder)
        if run.evaluation is None:
            raise ArtifactError(
                f"{folder} has no evaluation: its recipe asks for none, or it is not finished. "
                "Give the recipe an evaluation section and run it again."
            )
        finals = run.evaluation.finals
        methods: list[str] = [run.recipe.method]
        if len(runs) == 1 or baselines:
            # differences are against the first one: the first baseline where there is one
            own, *others = finals
            methods = [*others, own, "base"] if others else ["base", own]
        label = str(folder) if names.count(name) > 1 else name
        for method in methods:
            whole = f"{label}:{method}" if len(methods) > 1 else label
            rounds = run.rounds_of(method)
            answers = run.answers(finals.get(method, method))
            whole = method if len(runs) == 1 else whole
            out.append(Entrant(whole, run, method, rounds[-1] if rounds else None, answers))
    if len(out) < 2:
        raise DataError(f"One model alone has nothing to be compared with: {out[0].label}.")
    return out


@dataclass(frozen=True)
class Answered:
    """An entrant's answers to the N queries that all answered: texts, tokens and scores, (N,).

    ``finished`` says which of them ended by themselves.
    """

    label: str
    texts: list[str]
    tokens: np.ndarray
    scores: np.ndarray | None
    finished: Sequence[bool]


def compare(
    found: Sequence[Entrant],
    judge_settings: JudgeConfig | None,
    *,
    by: str | None = None,
    examples: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures; differences are of each entrant less the first one.

    Args:
        found: two or more.
        judge_settings: who compares answers; None compares only what needs no judge.
        by: key beside a query that names its class; None: the first known one, or else the length
            of the prompt in thirds.
        examples: queries shown per entrant where it differs most from the first, each way.
        seed: of the intervals.

    Raises:
        DataError: the entrants answered no query in common.
    """
    ids = shared_queries(found)
    queries = [found[0].answers[i].query for i in ids]
    key, classes = query_classes(queries, by)
    judge = load_judge(judge_settings, found[0].run.place("judgements"))
    answered = []
    for e in found:
        texts, scores = [e.answers[i].text for i in ids], None
        finished = [e.answers[i].finished for i in ids]
        if isinstance(judge, ScoringJudge):
            given = judge.score_all(list(zip(queries, texts, strict=True)), finished)
            scores = np.array(given, dtype=np.float64)
        tokens = np.array([e.answers[i].tokens for i in ids], dtype=np.float64)
        answered.append(Answered(e.label, texts, tokens, scores, finished))
    first, *others = answered
    made = [answering(aligning(e.run.recipe)) for e in found]
    judged = {e.label: _judged_pairs(e, judge_settings, seed) for e in found}
    return {
        "queries": len(ids),
        "not_shared": {e.label: len(e.answers) - len(ids) for e in found},
        "judge": judge.name if judge else None,
        "rejudged": _rejudged(found, answered, judge),
        "class": key,
        "first": first.label,
        "entrants": {
            e.label: _own(e, a, judged[e.label], seed) for e, a in zip(found, answered, strict=True)
        },
        "differences": {
            other.label: {
                # first's value, and other's
                "made_differently": {k: [v, own[k]] for k, v in made[0].items() if v != own[k]},
                **_difference(queries, first, other, judge, classes, examples, seed),
            }
            for other, own in zip(others, made[1:], strict=True)
        },
        "features": {
            e.label: {
                name: {"pairs": n, "accuracy": figure}
                for name, (n, figure) in by_group(
                    *judged[e.label], np.random.default_rng(seed)
                ).items()
            }
            for e in found
        },
    }


def answering(recipe: Aligning) -> dict[str, Any]:
    """The settings by which an evaluation has its queries answered, whatever the model.

    Sizes of batches, device, dtype and layout are left out: they only round otherwise. So is the
    port of a server.
    """
    sampling, policy = recipe.sampling, recipe.policy
    own = recipe.evaluation and recipe.evaluation.temperature
    return {
        "evaluation.temperature": sampling.temperature if own is None else own,
        "sampling.top_p": sampling.top_p,
        "sampling.max_new_tokens": sampling.max_new_tokens,
        **{f"sampling.engine.{k}": v for k, v in sampling.engine.identity.items()},
        "sampling.engine.base_url": re.sub(r":\d+(?=/|$)", "", sampling.engine.base_url or ""),
        "policy.chat_template_kwargs": policy.chat_template_kwargs,
        "policy.date": policy.date,
    }


def shared_queries(found: Sequence[Entrant]) -> list[str]:
    """Ids that all answered, with the same messages.

    Raises:
        DataError: none.
    """
    first, *others = (e.answers for e in found)
    ids = [
        i
        for i, mine in sorted(first.items())
        if all(i in o and o[i].query.messages == mine.query.messages for o in others)
    ]
    if not ids:
        raise DataError(
            "These runs answered no evaluation query in common, so nothing can be paired. Give "
            "them the same evaluation.queries."
        )
    return ids


def query_classes(queries: Sequence[Query], by: str | None) -> tuple[str, list[str]]:
    """What the classes are of, and each query's.

    Raises:
        DataError: no query has the key ``by``.
    """
    for key in [by] if by else CLASS_KEYS:
        if any(key in q.extra for q in queries):
            return key, [str(q.extra.get(key, "none")) for q in queries]
    if by:
        raise DataError(f"No evaluation query has a field {short(by)} beside its messages.")
    lengths = np.array([len(q.text) for q in queries])
    low, high = np.quantile(lengths, [1 / 3, 2 / 3])
    names = np.where(lengths <= low, "short", np.where(lengths <= high, "medium", "long"))
    return "prompt length, in thirds", names.tolist()


def _own(
    e: Entrant, answered: Answered, judged: tuple[Sequence[float | None], Any], seed: int
) -> dict[str, Any]:
    """What the run itself measured of this policy's data and training, and what the judge says.

    Accuracy is the judge's as well: that of the run's own files may be another's.
    """
    right = [w for w in judged[0] if w is not None]
    quality = e.last.quality.preferences if e.last and e.last.quality else None
    out = {
        "run": str(e.run.folder),
        "method": e.method,
        "tokens": float(answered.tokens.mean()),
        "quality": quality
        and {
            "accuracy": float(np.mean(right)) if right else None,
            "on_policyness": quality.on_policyness,
            "tokens": quality.tokens,
        },
        "steering_gap": quality and quality.steering_gap,
        "seconds": e.run.seconds_of(e.method) if e.last else None,
        "curves": curves(e.last) if e.last else {},
    }
    if answered.scores is not None:
        out["score"] = known_interval(answered.scores, np.random.default_rng(seed))
    return out


def curves(of: RoundView) -> dict[str, list[float]]:
    """Each shown figure of the policy's training at 0, ¼, ½, ¾ and the end of its logged steps.

    Of a training with several terms, margins and accuracies are the plain term's.
    """
    training = next((s.name for s in reversed(of.stages) if s.kind == "Train"), "")
    lines = [v for v in of.run.curves.get(training, ()) if "loss" in v]
    out = {}
    for name in CURVES:
        values = [v.get(name, v.get(f"{name}/plain")) for v in lines]
        values = [v for v in values if v is not None]
        if values:
            at = np.linspace(0, len(values) - 1, 5).round().astype(int)
            out[name] = [float(values[i]) for i in at]
    return out


def _difference(
    queries: Sequence[Query],
    first: Answered,
    other: Answered,
    judge: Judge | None,
    classes: Sequence[str],
    examples: int,
    seed: int,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {"tokens": known_interval(other.tokens - first.tokens, rng)}
    if judge is None:
        return out
    ends = zip(other.finished, first.finished, strict=True)
    pairs = [
        Pair(q, a, b, both)
        for q, a, b, both in zip(queries, other.texts, first.texts, ends, strict=True)
    ]
    verdicts = [j.verdict for j in judge.compare_all(pairs)]
    wins = np.array([worth(v) for v in verdicts], dtype=np.float64)
    out["verdicts"] = verdict_counts(verdicts)
    out["win_rate"] = known_interval(wins, rng)
    gaps = wins - 0.5
    if first.scores is not None and other.scores is not None:
        gaps = other.scores - first.scores
        out["score"] = known_interval(gaps, rng)
    out["by_class"] = {
        name: {"queries": count, "difference": figure}
        for name, (count, figure) in by_group(gaps, [(c,) for c in classes], rng).items()
    }
    order = np.argsort(np.nan_to_num(gaps), kind="stable").tolist()
    best = [i for i in order[::-1][:examples] if gaps[i] > 0]
    worst = [i for i in order[:examples] if gaps[i] < 0]
    out["examples"] = [
        {
            "query": queries[i].text,
            "difference": float(gaps[i]),
            # apart: a run may be called query
            "answers": {first.label: first.texts[i], other.label: other.texts[i]},
        }
        for i in [*best, *worst]
    ]
    return out


def _rejudged(
    found: Sequence[Entrant], answered: Sequence[Answered], judge: Judge | None
) -> dict[str, tuple[float, float]]:
    """Entrants whose run holds another score by the same judge: (then, now).

    Its rules, or its model, have changed since. Only where all answers of the run are compared.
    """
    out = {}
    for e, a in zip(found, answered, strict=True):
        own = e.run.evaluation
        model = own and own.models.get(own.finals.get(e.method, e.method))
        if judge is None or not own or not model or own.judge != judge.name:
            continue
        if a.scores is None or model.score is None or len(a.texts) < len(e.answers):
            continue
        now = known_interval(a.scores, np.random.default_rng(0))
        if now and abs(now[0] - model.score[0]) > 1e-6:
            out[e.label] = (model.score[0], now[0])
    return out


def _judged_pairs(
    e: Entrant, settings: JudgeConfig | None, seed: int
) -> tuple[list[float | None], list[Sequence[str]]]:
    """Of some pairs that a policy was trained on: the judge's `worth`, and the features named."""
    judge = load_judge(settings, e.run.place("judgements"))
    if e.last is None or judge is None:
        return [], []
    found = sorted(e.last.preferences, key=lambda p: derive_seed(seed, "compare", p.id))[:PAIRS]
    pairs = [
        Pair(p.query, p.chosen, p.rejected, (p.finished("chosen"), p.finished("rejected")))
        for p in found
    ]
    return worths(judge, pairs), list(map(named_features, found))
