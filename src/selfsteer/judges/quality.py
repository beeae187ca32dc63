"""Quality of a preference set, and whether the policy follows its principles at all.

Is a pair right, could the policy have written it, was it steered? All log-probs are under the
policy at the start of the iteration, whichever model sampled. Mean token probability is confounded
with length, so summed log-probs are reported beside it.

A steering gap alone does not show that a policy follows its principles: responses are always
likelier in the context that they were sampled from, so that even random weights have a gap well
above 0. The *net gap* therefore asks more: is the response also likelier under **another** query's
principle of the same kind than under the opposite principle of its own query? That other text
differs at least as much in its wording and agrees only in what it wants. On the tiny world both are
about 0.1 nats per token; the same architecture with random weights has a gap of 0.08 and a net gap
of 0. The net gap is ours, not the papers'.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfsteer.data.records import Principles, Triple, Verdict
from selfsteer.judges.base import Judge, Pair
from selfsteer.judges.stats import (
    FEW,
    Interval,
    above,
    accuracy,
    known_interval,
    mean_interval,
    resampled,
    verdict_counts,
    worth,
)

PLAIN_SEQUENCES = ("plain/good", "plain/bad")
GAP_SEQUENCES = ("good/good", "bad/good", "bad/bad", "good/bad")


def on_policyness(means: np.ndarray) -> float:
    """exp(mean log-prob per token), averaged over responses: SSO v2, figure 3's x axis."""
    return float(np.exp(means).mean())


def steering_gaps(means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Good: m(y+|x+) − m(y+|x-); bad: m(y-|x-) − m(y-|x+); (N,) each, nats per token."""
    return {
        "good": means["good/good"] - means["bad/good"],
        "bad": means["bad/bad"] - means["good/bad"],
    }


def steering_gap(means: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The means of `steering_gaps`."""
    return {kind: float(gaps.mean()) for kind, gaps in steering_gaps(means).items()}


def quality(
    triples: Sequence[Triple],
    sums: Mapping[str, np.ndarray],
    lengths: Mapping[str, np.ndarray],
    judge: Judge | None,
) -> dict[str, Any]:
    """The figures of one preference set.

    Args:
        triples: N records; good is the chosen response, bad the rejected one.
        sums: ``context/response`` → (N,) summed log-probs, nats. ``plain/plain`` is optional.
        lengths: the same → (N,) tokens.
        judge: None gives accuracy null.
    """
    means = {name: sums[name] / lengths[name] for name in sums}
    shown = {"good": "chosen", "bad": "rejected", "plain": "plain"}
    responses = [r for r in shown if f"plain/{r}" in sums]
    verdicts = []
    if judge is not None:
        pairs = list(map(Pair.of, triples))
        verdicts = [j.verdict for j in judge.compare_all(pairs)]
    both = np.concatenate([means["plain/good"], means["plain/bad"]])
    return {
        "pairs": len(triples),
        "accuracy": accuracy(verdicts),
        "verdicts": verdict_counts(verdicts) if judge is not None else None,
        "on_policyness": {
            "both": on_policyness(both),
            **{shown[r]: on_policyness(means[f"plain/{r}"]) for r in responses},
        },
        "logps": {shown[r]: float(sums[f"plain/{r}"].mean()) for r in responses},
        "steering_gap": steering_gap(means) if "good/good" in means else None,
        "longer_chosen": float((lengths["plain/good"] > lengths["plain/bad"]).mean()),
        "tokens": {shown[r]: float(lengths[f"plain/{r}"].mean()) for r in responses},
        "characters": {
            shown[r]: float(np.mean([len(t.responses[r]) for t in triples])) for r in responses
        },
    }


def strangers(principles: Sequence[Principles]) -> list[Principles]:
    """For each record, another one's principles with other texts; its own if all are the same.

    The other one is looked for from half the list away, so that every record lends its own about
    as often as any.
    """
    n = len(principles)
    found = []
    for i, own in enumerate(principles):
        others = (principles[(i + n // 2 + k) % n] for k in range(n))
        found.append(next((p for p in others if p.good != own.good and p.bad != own.bad), own))
    return found


def steering(
    triples: Sequence[Triple],
    means: Mapping[str, np.ndarray],
    verdicts: Sequence[Verdict] | None,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Gaps, net gaps and accuracy of the whole and per feature, each (mean, low, high).

    Args:
        triples: N records with principles and the good and bad response.
        means: (N,) mean log-probs, nats per token, of ``good/good``, ``bad/good``, ``bad/bad``,
            ``good/bad`` and, under the principles of `strangers`, ``stranger-good/good`` and
            ``stranger-bad/bad``.
        verdicts: is the good response better than the bad one? None without a judge.
        rng: the only source of chance, for the bootstrap.

    Returns:
        ``steers`` is true if both net gaps are above 0 beyond chance and so is the accuracy above
        ½, where there is one. A feature counts in each triple that names it; as triples name
        several, ``adds`` is what the feature itself contributes to the net gap (least squares on
        which features a triple names), and ``steers`` judges that. It is None on too few triples.
    """
    gaps = steering_gaps(means)
    net = {
        "good": means["stranger-good/good"] - means["bad/good"],
        "bad": means["stranger-bad/bad"] - means["good/bad"],
    }
    out: dict[str, Any] = {
        "triples": len(triples),
        "gap": {k: mean_interval(v.tolist(), rng) for k, v in gaps.items()},
        "net_gap": {k: mean_interval(v.tolist(), rng) for k, v in net.items()},
        "accuracy": known_interval(map(worth, verdicts or ()), rng),
    }
    bounds = [above(interval, 0) for interval in out["net_gap"].values()]
    bounds += [above(out["accuracy"], 0.5)] if out["accuracy"] else []
    out["steers"] = all(bounds)

    named = [t.principles.features if t.principles else () for t in triples]
    features = sorted({f for names in named for f in names})
    member_NF = np.array([[f in names for f in features] for names in named], dtype=np.float64)
    adds = _contributions(member_NF, (net["good"] + net["bad"]) / 2, rng)
    out["features"] = {}
    for j, feature in enumerate(features):
        mine = np.flatnonzero(member_NF[:, j]).tolist()
        enough = len(mine) >= FEW
        out["features"][feature] = {
            "triples": len(mine),
            "gap": {k: float(v[mine].mean()) for k, v in gaps.items()},
            "adds": adds[j] if enough else None,
            "accuracy": None if verdicts is None else accuracy([verdicts[i] for i in mine]),
            "steers": above(adds[j], 0) if enough else None,
        }
    return out


def _contributions(
    member_NF: np.ndarray, values: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> list[Interval]:
    """What each feature adds to the value of a record that names it.

    Least squares, of least norm where features always come together; 95 % percentile bootstrap.
    """

    def fit(rows: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.lstsq(member_NF[rows], values[rows], rcond=None)[0])

    means = fit(np.arange(len(values)))
    low, high = np.quantile(resampled(fit, len(values), rng, resamples), [0.025, 0.975], axis=0)
    return [(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True)]
