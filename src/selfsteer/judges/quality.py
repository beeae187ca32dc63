"""Quality of a preference set: is the pair right, could the policy have written it, was it steered.

All log-probs are under the policy at the start of the iteration, whoever sampled. Mean token
probability is confounded with length, so summed log-probs stand beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfsteer.data.records import Query, Triple
from selfsteer.judges.base import Judge, Pair
from selfsteer.judges.stats import accuracy, verdict_counts

PLAIN_SEQUENCES = ("plain/good", "plain/bad")
GAP_SEQUENCES = ("good/good", "bad/good", "bad/bad", "good/bad")


def on_policyness(means: np.ndarray) -> float:
    """exp(mean log-prob per token), averaged over responses: SSO v2, figure 3's x axis."""
    return float(np.exp(means).mean())


def steering_gap(means: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Good: m(y+|x+) − m(y+|x-); bad: m(y-|x-) − m(y-|x+); nats per token, averaged."""
    return {
        "good": float((means["good/good"] - means["bad/good"]).mean()),
        "bad": float((means["bad/bad"] - means["good/bad"]).mean()),
    }


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
        pairs = [
            Pair(Query(t.id, t.messages), t.responses["good"], t.responses["bad"]) for t in triples
        ]
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
