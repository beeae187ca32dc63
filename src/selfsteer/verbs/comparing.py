"""`selfsteer compare`: runs side by side, what differs and whether it is more than chance.

Everything is read from the run folders; only a judge that has not seen an answer yet is asked.
Scores are compared on the evaluation queries that all runs answered, paired by query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import read_jsonl, read_shards
from selfsteer.data.records import Preference, Query
from selfsteer.errors import ArtifactError, DataError
from selfsteer.judges.base import Judge, Pair, ScoringJudge, load_judge
from selfsteer.judges.stats import known_interval, verdict_counts, worth
from selfsteer.recipe.sections import JudgeConfig
from selfsteer.report import summary

#: Keys beside a query that name its class, in the order in which they are looked for.
CLASS_KEYS = ("class", "category", "subset", "kind", "source")

#: A class or feature with fewer queries says nothing.
FEW = 8

#: Pairs of a run that are judged for the figures by feature; a seeded subset of more.
PAIRS = 1000

#: Curves of a training that are shown, by quarter of its steps.
CURVES = ("loss", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class Entrant:
    """One final policy of one run, with its answers to the run's evaluation queries."""

    label: str
    run: Path
    method: str
    found: dict[str, Any]
    answers: dict[str, tuple[Query, str, int]]


def entrants(runs: Sequence[Path], *, baselines: bool) -> list[Entrant]:
    """The final policy of each run; of a single run, or with ``baselines``, its other models too.

    Raises:
        ArtifactError: not a run folder, or one without an evaluation.
        DataError: a run is named twice, or there is only one model.
    """
    out: list[Entrant] = []
    names = [run.resolve().name for run in runs]
    places = [run.resolve() for run in runs]
    twice = next((str(r) for i, r in enumerate(runs) if places[i] in places[:i]), None)
    if twice is not None:
        raise DataError(f"{twice} is named twice; a run differs from itself in nothing.")
    for run, name in zip(runs, names, strict=True):
        found = summary.load(run)
        if found["evaluation"] is None:
            raise ArtifactError(
                f"{run} has no evaluation: its recipe asks for none, or it is not finished. Give "
                "the recipe an evaluation section and run it again."
            )
        label = str(run) if names.count(name) > 1 else name
        methods = dict(found["evaluation"]["finals"])
        if len(runs) == 1 or baselines:
            # differences are against the first one: the baseline where there is one
            methods = {**dict(reversed(methods.items())), "base": "base"}
            if len(methods) == 2:
                methods = dict(reversed(methods.items()))
        else:
            methods = {m: v for m, v in methods.items() if m == found["recipe"]["method"]}
        for method, model in methods.items():
            path = run / "evaluation" / f"answers-{model.replace('/', '-')}.jsonl"
            answers = {
                v["id"]: (Query.from_dict(v), v["response"], v["completion_tokens"])
                for _, v in read_jsonl(path)
                if v["finish_reason"] in ("stop", "length")
            }
            whole = (
                method if len(runs) == 1 else label if len(methods) == 1 else f"{label}:{method}"
            )
            out.append(Entrant(whole, run, method, found, answers))
    if len(out) < 2:
        raise DataError(f"One model alone has nothing to be compared with: {out[0].label}.")
    return out


def shared_queries(found: Sequence[Entrant]) -> list[str]:
    """Ids that all answered, with the same messages.

    Raises:
        DataError: none.
    """
    first = found[0].answers
    ids = [
        i
        for i, (query, *_) in sorted(first.items())
        if all(i in e.answers and e.answers[i][0].messages == query.messages for e in found[1:])
    ]
    if not ids:
        raise DataError(
            "These runs answered no evaluation query in common, so nothing can be paired. Give "
            "them the same evaluation.queries."
        )
    return ids


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
    """
    ids = shared_queries(found)
    queries = [found[0].answers[i][0] for i in ids]
    texts = {e.label: [e.answers[i][1] for i in ids] for e in found}
    tokens = {e.label: np.array([e.answers[i][2] for i in ids], dtype=float) for e in found}
    key, classes = query_classes(queries, by)
    judge = load_judge(judge_settings, found[0].run / "judgements")
    report: dict[str, Any] = {
        "queries": len(ids),
        "not_shared": {e.label: len(e.answers) - len(ids) for e in found},
        "judge": judge.name if judge else None,
        "class": key,
        "first": found[0].label,
        "entrants": {e.label: _own(e, tokens[e.label]) for e in found},
        "differences": {},
    }
    scores = None
    if isinstance(judge, ScoringJudge):
        scores = {k: _scores(judge, queries, v) for k, v in texts.items()}
        for label, values in scores.items():
            rng = np.random.default_rng(seed)
            report["entrants"][label]["score"] = known_interval(values, rng)
    for other in found[1:]:
        report["differences"][other.label] = _difference(
            queries,
            texts,
            tokens,
            scores,
            judge,
            classes,
            found[0].label,
            other.label,
            examples,
            seed,
        )
    report["features"] = {e.label: _features(e, judge_settings, seed) for e in found}
    return report


def query_classes(queries: Sequence[Query], by: str | None) -> tuple[str, list[str]]:
    """What the classes are of, and each query's.

    Raises:
        DataError: no query has the key ``by``.
    """
    for key in [by] if by else CLASS_KEYS:
        if any(key in q.extra for q in queries):
            return key, [str(q.extra.get(key, "none")) for q in queries]
    if by:
        raise DataError(f"No evaluation query has a field {by!r} beside its messages.")
    lengths = np.array([len(q.text) for q in queries])
    low, high = np.quantile(lengths, [1 / 3, 2 / 3])
    names = np.where(lengths <= low, "short", np.where(lengths <= high, "medium", "long"))
    return "prompt length, in thirds", names.tolist()


def _scores(judge: ScoringJudge, queries: Sequence[Query], texts: Sequence[str]) -> np.ndarray:
    given = judge.score_all(list(zip(queries, texts, strict=True)))
    return np.array([float("nan") if v is None else v for v in given])


def _own(e: Entrant, tokens: np.ndarray) -> dict[str, Any]:
    """What the run itself measured of this policy's data and training."""
    iterations = e.found["quality"].get(e.method) or []
    quality = iterations[-1].get("preferences") if iterations else None
    recipe = e.found["recipe"]
    where = f"iteration-{recipe['iterations']}/policy"
    stage = where if e.method == recipe["method"] else f"baseline/{where}"
    return {
        "run": str(e.run),
        "method": e.method,
        "tokens": float(tokens.mean()),
        "quality": quality and {k: quality[k] for k in ("accuracy", "on_policyness", "tokens")},
        "steering_gap": quality and quality["steering_gap"],
        "seconds": summary.seconds_of(e.found, e.method) if e.method != "base" else None,
        "curves": curves(e.run / "metrics.jsonl", stage) if e.method != "base" else {},
    }


def curves(path: Path, stage: str) -> dict[str, list[float]]:
    """Each shown figure of a training at 0, ¼, ½, ¾ and the end of its logged steps.

    Of a training with several terms, margins and accuracies are the plain term's.
    """
    if not path.exists():
        return {}
    lines = [v for _, v in read_jsonl(path) if v.get("stage") == stage and "loss" in v]
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
    texts: Mapping[str, list[str]],
    tokens: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray] | None,
    judge: Judge | None,
    classes: Sequence[str],
    first: str,
    other: str,
    examples: int,
    seed: int,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {"tokens": known_interval(tokens[other] - tokens[first], rng)}
    if judge is None:
        return out
    pairs = [Pair(q, a, b) for q, a, b in zip(queries, texts[other], texts[first], strict=True)]
    verdicts = [j.verdict for j in judge.compare_all(pairs)]
    wins = np.array([worth(v) for v in verdicts], dtype=np.float64)
    out["verdicts"] = verdict_counts(verdicts)
    out["win_rate"] = known_interval(wins, rng)
    gaps = wins - 0.5 if scores is None else scores[other] - scores[first]
    if scores is not None:
        out["score"] = known_interval(gaps, rng)
    out["by_class"] = {}
    for name in sorted(set(classes)):
        rows = np.array([c == name for c in classes])
        enough = int(rows.sum()) >= FEW
        out["by_class"][name] = {
            "queries": int(rows.sum()),
            "difference": known_interval(gaps[rows], rng) if enough else None,
        }
    order = [int(i) for i in np.argsort(np.nan_to_num(gaps), kind="stable")]
    worst, best = order[:examples], order[::-1][:examples]
    out["examples"] = [
        {
            "query": queries[i].text,
            "difference": float(gaps[i]),
            first: texts[first][i],
            other: texts[other][i],
        }
        for i in [*[i for i in best if gaps[i] > 0], *[i for i in worst if gaps[i] < 0]]
    ]
    return out


def _features(e: Entrant, settings: JudgeConfig | None, seed: int) -> dict[str, Any]:
    """Accuracy of the run's preferences by the feature that their principles name."""
    recipe = e.found["recipe"]
    home = e.run if e.method == recipe["method"] else e.run / "baseline"
    folder = home / f"iteration-{recipe['iterations']}" / "preferences"
    if e.method == "base" or settings is None or not folder.is_dir():
        return {}
    found = sorted(
        (Preference.from_dict(v) for v in read_shards(folder)),
        key=lambda p: derive_seed(seed, "compare", p.id),
    )[:PAIRS]
    judge = load_judge(settings, e.run / "judgements")
    assert judge is not None
    judged = judge.compare_all([Pair(Query(p.id, p.prompt), p.chosen, p.rejected) for p in found])
    named = [tuple(p.extra.get("features", ())) for p in found]
    out = {}
    for feature in sorted({f for names in named for f in names}):
        values = [
            worth(j.verdict) for j, names in zip(judged, named, strict=True) if feature in names
        ]
        enough = sum(v is not None for v in values) >= FEW
        out[feature] = {
            "pairs": len(values),
            "accuracy": known_interval(values, np.random.default_rng(seed)) if enough else None,
        }
    return out
