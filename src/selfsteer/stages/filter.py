"""Triples to the triples worth training on: hygiene always, v1's log-prob filter if asked for.

Hygiene looks at texts and at their lengths in tokens, on triples and on preferences alike; v1's
filter looks at log-probs and needs plain responses, so only triples pass it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, batched, dump_line, dump_lines, write_atomic
from selfsteer.data.records import Preference, Triple
from selfsteer.errors import ArtifactError
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import load_chat, load_model
from selfsteer.models.store import CHUNK, open_scores
from selfsteer.principles.catalogue import BUILT_IN, Catalogue, load_catalogue
from selfsteer.recipe.sections import Bound, Filter, Hygiene, Recipe, resolve_path
from selfsteer.run.folder import StageResult
from selfsteer.terminal import progress_bar

#: v1's filter with the bounds of the authors' release.
AS_RELEASED = Filter()

#: Triples whose responses are tokenised together.
TOGETHER = 256

FILTER_SEQUENCES = ("good/good", "plain/good", "bad/good", "bad/bad", "plain/bad", "good/bad")


@cache
def _lead_in(words: tuple[str, ...]) -> re.Pattern[str]:
    word = rf"(?:{'|'.join(map(re.escape, (*words, 'good', 'bad')))})"
    return re.compile(
        rf"^[\s*#\"'>\[(]*(?:here is (?:an?|my|the) )?(?:an? )?{word}(?:(?:,| and|, and) {word})*"
        r" (?:response|answer|reply)[\s*\])]*:[\s*\"']*",
        re.IGNORECASE,
    )


def strip_lead_in(text: str, catalogue: Catalogue = BUILT_IN) -> str:
    """Cuts a lead-in that names the principle off the front.

    >>> strip_lead_in("Helpful and accurate response: The sky is blue.")
    'The sky is blue.'
    >>> strip_lead_in("A helpful person answers.")
    'A helpful person answers.'
    """
    return _lead_in(catalogue.words).sub("", text)


def clean(
    triples: Sequence[Triple], hygiene: Hygiene, catalogue: Catalogue = BUILT_IN
) -> tuple[list[Triple], Counter[str], int]:
    """Hygiene on the good and bad response of each triple.

    Returns:
        What is kept, drops by reason (the first that applies), and how many responses had a
        lead-in cut off.
    """
    left, dropped, stripped = sift(triples, hygiene, catalogue)
    return list(left), dropped, stripped


class Left:
    """The triples of a set that are left so far, read anew at each pass: a byte of memory each."""

    def __init__(self, triples: Records[Triple], tidied: Callable[[Triple], Triple]) -> None:
        """All of the set; ``tidied`` makes of each what is trained on."""
        self._triples = triples
        self._tidied = tidied
        self._mask = np.ones(len(triples), dtype=bool)

    def keep(self, mask: np.ndarray) -> None:
        """Leaves those for which a mask over what was left, (len(self),), is true."""
        self._mask[self._mask] = mask

    def __len__(self) -> int:
        return int(self._mask.sum())

    def __iter__(self) -> Iterator[Triple]:
        return map(self._tidied, compress(self._triples, self._mask))


def sift(
    triples: Records[Triple], hygiene: Hygiene, catalogue: Catalogue
) -> tuple[Left, Counter[str], int]:
    """See `clean`, of which this is the form for sets that are not in memory."""

    def tidied(triple: Triple) -> Triple:
        if not hygiene.strip_lead_ins:
            return triple
        stripped = {n: strip_lead_in(text, catalogue) for n, text in triple.responses.items()}
        return triple if stripped == triple.responses else replace(triple, responses=stripped)

    left, dropped, stripped = Left(triples, tidied), Counter[str](), 0
    keep = np.ones(len(triples), dtype=bool)
    for i, triple in enumerate(triples):
        responses = tidied(triple).responses
        stripped += sum(text != triple.responses[name] for name, text in responses.items())
        good, bad, plain = responses["good"], responses["bad"], responses.get("plain")
        reason = None
        if not all(text.strip() for text in responses.values()):
            reason = "empty"
        elif min(map(len, responses.values())) < hygiene.min_chars:
            reason = "too_short"
        elif good == bad:
            reason = "good_equals_bad"
        elif plain in (good, bad):
            reason = "equals_plain"
        if reason is not None:
            dropped[reason] += 1
            keep[i] = False
    left.keep(keep)
    return left, dropped, stripped


def steering_filter(
    means: Mapping[str, np.ndarray], settings: Filter = AS_RELEASED
) -> tuple[np.ndarray, dict[str, int]]:
    """v1's filter on mean log-probs per token m(response|context).

    Args:
        means: the six `FILTER_SEQUENCES` → (N,) float64, nats per token.
        settings: which steps there are, and their bounds; by default the release's.

    Returns:
        A (N,) mask of what is kept, and how many each step dropped: ``steering_order`` (the good
        response must be likelier the better its context, the bad one the worse), ``off_policy``
        (both at or above their bound under the plain context), ``small_gap`` (both steering gaps
        above their mean, or at or above another bound). Means and quantiles are over what the
        step before kept, and each of the two figures has its own.
    """
    m = means
    keep = np.ones(len(m["good/good"]), dtype=bool)
    if settings.steering_order:
        keep = (
            (m["good/good"] > m["plain/good"])
            & (m["plain/good"] > m["bad/good"])
            & (m["bad/bad"] > m["plain/bad"])
            & (m["plain/bad"] > m["good/bad"])
        )
    counts = {"steering_order": int((~keep).sum())}
    gaps = (m["good/good"] - m["bad/good"], m["bad/bad"] - m["good/bad"])
    for reason, values, bound, strict in (
        ("off_policy", (m["plain/good"], m["plain/bad"]), settings.near_on_policy, False),
        ("small_gap", gaps, settings.gap, settings.gap.rule == "mean"),
    ):
        before = keep
        if before.any() and bound.rule != "off":
            for v in values:
                least = _least(v[before], bound)
                keep = keep & ((v > least) if strict else (v >= least))
        counts[reason] = int(before.sum() - keep.sum())
    return keep, counts


def _least(values: np.ndarray, bound: Bound) -> float:
    if bound.at_least is not None:
        return bound.at_least
    if bound.quantile is not None:
        return float(np.quantile(values, bound.quantile))
    return float(values.mean())


# -- lengths -------------------------------------------------------------------------------------


def response_lengths(chat: ChatFormat, triples: Records[Triple]) -> np.ndarray:
    """(N, 2) tokens of the good and the bad response, the end-of-turn token included."""
    out = np.zeros((len(triples), 2), dtype=np.int64)
    with progress_bar("lengths", len(triples)) as bar:
        for part in batched(triples, TOGETHER):
            pairs = [(t.responses[n], t.finished(n)) for t in part for n in ("good", "bad")]
            found = np.array(chat.response_lengths(pairs)).reshape(-1, 2)
            out[bar.done : bar.done + len(part)] = found
            bar.advance(len(part))
    return out


def length_figures(lengths: np.ndarray) -> dict[str, Any]:
    """Of (N, 2) lengths: mean tokens of chosen and rejected, share of pairs with the longer chosen.

    A share above ½ tells a model that longer is better, whatever the texts say. None of no pairs.
    """
    if not len(lengths):
        return dict.fromkeys(("chosen", "rejected", "longer_chosen", "longer_rejected")) | {
            "pairs": 0
        }
    chosen, rejected = lengths.T
    return {
        "pairs": len(lengths),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "longer_chosen": float((chosen > rejected).mean()),
        "longer_rejected": float((rejected > chosen).mean()),
    }


def within_caps(lengths: np.ndarray, hygiene: Hygiene) -> np.ndarray:
    """(N,) mask: the two lengths of a pair differ by no more than hygiene allows."""
    longer, shorter = lengths.max(axis=1), lengths.min(axis=1)
    keep = np.ones(len(lengths), dtype=bool)
    if hygiene.max_length_ratio is not None:
        keep &= longer <= hygiene.max_length_ratio * shorter
    if hygiene.max_length_difference is not None:
        keep &= longer - shorter <= hygiene.max_length_difference
    return keep


def matched_lengths(lengths: np.ndarray, ids: Sequence[str], seed: int) -> np.ndarray:
    """(N,) mask of a subset in which length does not tell chosen from rejected.

    Pairs fall into cells by the longer and the shorter length, each to within a factor of √2. Of
    every cell as many pairs are kept whose chosen response is the longer as whose rejected one is:
    the smaller of the two numbers, picked by a hash of seed and id. Pairs of equal lengths stay.

    Args:
        lengths: (N, 2) tokens of chosen and rejected.
        ids: of the pairs; what is picked does not depend on their order.
        seed: of the picking.
    """
    keep = lengths[:, 0] == lengths[:, 1]
    bins = np.floor(2 * np.log2(np.maximum(lengths, 1))).astype(int)
    cells: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for i in np.flatnonzero(~keep):
        cell = (int(bins[i].min()), int(bins[i].max()))
        longer_rejected = int(lengths[i, 0] < lengths[i, 1])
        cells.setdefault(cell, ([], []))[longer_rejected].append(int(i))
    for sides in cells.values():
        size = min(map(len, sides))
        for side in sides:
            by_hash = sorted(side, key=lambda i: derive_seed(seed, "match_lengths", ids[i]))
            keep[by_hash[:size]] = True
    return keep


def even_lengths(
    triples: Records[Triple],
    hygiene: Hygiene,
    chat: ChatFormat,
    seed: int,
    result: StageResult,
    *,
    match: bool,
) -> np.ndarray:
    """Applies hygiene's length settings to pairs; drops and figures go into ``result``.

    Memory holds 16 bytes a pair, and the ids where lengths are matched.

    Args:
        triples: N pairs; the good response is the chosen one.
        hygiene: caps, and whether lengths are matched.
        chat: whose tokens count.
        seed: of the matching.
        result: gets ``length_gap`` and ``length_unmatched``, and the note ``lengths``.
        match: whether these are the pairs that the policy is trained on; only they are matched.

    Returns:
        A (N,) mask of the pairs to keep.
    """
    lengths = response_lengths(chat, triples)
    keep = within_caps(lengths, hygiene)
    result.dropped.update({"length_gap": int((~keep).sum())} if not keep.all() else {})
    if hygiene.match_lengths and match:
        left = np.flatnonzero(keep)
        ids = [t.id for t in compress(triples, keep)]
        matched = matched_lengths(lengths[left], ids, seed)
        if not matched.all():
            result.dropped["length_unmatched"] += int((~matched).sum())
        keep[left[~matched]] = False
    figures = {"before": length_figures(lengths), "after": length_figures(lengths[keep])}
    result.notes["lengths"] = figures
    return keep


# -- the stages ----------------------------------------------------------------------------------


def filter_triples(
    triples: Records[Triple],
    recipe: Recipe,
    policy: str,
    folder: Path,
    scores: Path,
    *,
    trained_on: bool = False,
) -> StageResult:
    """Writes ``filtered.jsonl`` in ``folder``; scores are under ``policy``.

    ``trained_on`` says that the policy itself is trained on these triples, not only a generator:
    then their lengths are matched where the recipe asks for it. The note ``survivors`` says how
    many were left after each step.
    """
    result = StageResult(len(triples), 0)
    left, result.dropped, stripped = sift(
        triples, recipe.hygiene, load_catalogue(recipe.principles.catalogue)
    )
    result.notes["lead_ins_stripped"] = stripped
    survivors = {"in": len(triples), "hygiene": len(left)}
    settings = recipe.active_filter
    if settings and len(left):
        mask, counts = steering_filter(mean_logps(left, policy, recipe, scores), settings)
        result.dropped.update({k: n for k, n in counts.items() if n})
        count = len(left)
        for step, n in counts.items():
            survivors[step] = count = count - n
        left.keep(mask)
    if len(left):
        chat = load_chat(policy, recipe.policy)
        left.keep(even_lengths(left, recipe.hygiene, chat, recipe.seed, result, match=trained_on))
        survivors["lengths"] = len(left)
    result.notes["survivors"] = survivors
    result.n_out = len(left)
    write_atomic(folder / "filtered.jsonl", map(dump_line, left))
    return result


def mean_logps(
    triples: Records[Triple], policy: str, recipe: Recipe, scores: Path
) -> dict[str, np.ndarray]:
    """`FILTER_SEQUENCES` → (N,) mean log-probs per token under ``policy``, in nats.

    Scores are kept in the folder ``scores``; memory holds 48 bytes a triple, and of each sequence
    that was ever scored where its log-probs lie (`ScoreStore`).
    """
    loaded = load_model(policy, recipe.policy)
    size = CHUNK // len(FILTER_SEQUENCES)
    means = np.empty((len(FILTER_SEQUENCES), len(triples)))
    store = None
    with progress_bar("filter: scoring", means.size) as bar:
        for number, part in enumerate(batched(triples, size)):
            flat = [loaded.chat.sequence(t, n) for n in FILTER_SEQUENCES for t in part]
            store = store or open_scores(scores, loaded, flat)
            values = store.score(loaded, flat, advance=bar.advance)
            found = np.array([float(v.double().mean()) for v in values])
            first = number * size
            means[:, first : first + len(part)] = found.reshape(len(means), -1)
            bar.advance((first + len(part)) * len(means) - bar.done)  # those scored before
    return dict(zip(FILTER_SEQUENCES, means, strict=True))


def to_preferences(
    triples: Records[Triple], recipe: Recipe, folder: Path, *, cleaned: bool
) -> StageResult:
    """Writes the plain preferences (x; y+ ≻ y-) as shards, principles removed.

    Args:
        triples: good and bad response of each query.
        recipe: hygiene, seed, size of the shards.
        folder: gets the shards.
        cleaned: the triples are those of `filter_triples`, with nothing left to drop.
    """
    result = StageResult(len(triples), 0)
    kept = triples
    if not cleaned:
        catalogue = load_catalogue(recipe.principles.catalogue)
        left, result.dropped, stripped = sift(triples, recipe.hygiene, catalogue)
        result.notes["lead_ins_stripped"] = stripped
        chat = load_chat(resolve_path(recipe.policy.model), recipe.policy)
        left.keep(even_lengths(left, recipe.hygiene, chat, recipe.seed, result, match=True))
        kept = left
    result.n_out = len(kept)
    about_safety = 0
    for number, part in enumerate(batched(kept, recipe.sampling.shard_size)):
        about_safety += sum(map(names_safety, part))
        shard = [to_preference(t) for t in part]
        refuse_bad_as_chosen(part, shard)
        write_atomic(folder / f"shard-{number:05d}.jsonl", dump_lines(shard))
    result.notes["about_safety"] = about_safety
    return result


def to_preference(triple: Triple) -> Preference:
    """The plain pair of a triple; the names of its features stay beside it."""
    names = {"good": "chosen", "bad": "rejected"}
    features = list(named_features(triple))
    return Preference(
        triple.id,
        triple.messages,
        triple.responses["good"],
        triple.responses["bad"],
        {names[k]: v for k, v in triple.finish_reasons.items() if k in names},
        {"features": features} if features else {},
    )


def refuse_bad_as_chosen(triples: Sequence[Triple], preferences: Sequence[Preference]) -> None:
    """What was written under a bad principle may be learnt from as rejected only.

    Raises:
        ArtifactError: a chosen response is its triple's bad one.
    """
    bad = {t.id: t.responses["bad"] for t in triples}
    for p in preferences:
        if p.chosen == bad[p.id]:
            raise ArtifactError(
                f"The chosen response to {p.id} is the one written under the bad principle. "
                "Nothing was written; this is a bug, please report it."
            )


def named_features(record: Triple | Preference) -> Sequence[str]:
    """The features that a record's principles named; none where they were written without."""
    if isinstance(record, Triple):
        return record.principles.features if record.principles else ()
    return tuple(record.extra.get("features", ()))


def names_safety(record: Triple | Preference) -> bool:
    """Whether Safety is among the features that a record's principles named."""
    return "Safety" in named_features(record)
