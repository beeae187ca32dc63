"""Triples to the triples worth training on, and those to preferences.

Hygiene looks at texts and at their lengths in tokens, on triples and on pairs alike; v1's filter
looks at log-probs and needs plain responses, so only triples pass it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Records, batched, dump_line, dump_lines, write_atomic
from selfsteer.data.records import Dropped, Preference, Triple, feature_names, rules
from selfsteer.errors import ArtifactError, DataError
from selfsteer.judges.quality import steering_gaps
from selfsteer.principles.catalogue import BUILT_IN, Catalogue, load_catalogue
from selfsteer.recipe.sections import Bound, Filter, Hygiene, Loading
from selfsteer.run.cost import Cost, Scale, scoring
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.inputs import renamed, stored_pairs, stored_triples
from selfsteer.terminal import progress_bar

#: v1's filter with the bounds of the authors' release.
AS_RELEASED = Filter()

#: Triples whose responses are tokenised together.
TOGETHER = 256

#: Of either response: the better the context suits it, the likelier it must be.
ORDER = (("good/good", "plain/good", "bad/good"), ("bad/bad", "plain/bad", "good/bad"))
FILTER_SEQUENCES = (*ORDER[0], *ORDER[1])


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


class Left:
    """The triples of a set that are left so far, read anew at each pass: 8 bytes of memory each.

    Args:
        triples: the whole set.
        hygiene: lead-ins are cut off where it asks for that.
        catalogue: knows the words that lead-ins are made of.
    """

    def __init__(
        self, triples: Records[Triple], hygiene: Hygiene, catalogue: Catalogue = BUILT_IN
    ) -> None:
        self._triples, self._hygiene, self._catalogue = triples, hygiene, catalogue
        #: Why each was left out; nothing for what is left.
        self._why = np.full(len(triples), "", dtype=object)
        #: Responses that had a lead-in cut off.
        self.stripped = 0

    def tidied(self, triple: Triple) -> Triple:
        """What is trained on of a triple."""
        if not self._hygiene.strip_lead_ins:
            return triple
        texts = {n: strip_lead_in(x, self._catalogue) for n, x in triple.responses.items()}
        return triple if texts == triple.responses else replace(triple, responses=texts)

    def sift(self) -> "Left":
        """Leaves out what hygiene does not let pass; the first reason counts."""
        for i, triple in enumerate(self._triples):
            tidied = self.tidied(triple)
            self.stripped += sum(x != triple.responses[n] for n, x in tidied.responses.items())
            self._why[i] = unfit(tidied, self._hygiene) or ""
        return self

    def drop(self, mask: np.ndarray, reason: str) -> None:
        """Leaves out those for which a mask over what was left, (len(self),), is true."""
        self._why[np.flatnonzero(self._why == "")[mask]] = reason

    @property
    def reasons(self) -> Counter[str]:
        """How many were left out for each reason."""
        return Counter(filter(None, self._why))

    def __len__(self) -> int:
        return int((self._why == "").sum())

    def __iter__(self) -> Iterator[Triple]:
        return map(self.tidied, compress(self._triples, self._why == ""))

    def dropped(self) -> Iterator[Dropped]:
        """What was left out, and why."""
        if len(self) < len(self._why):
            for triple, why in zip(self._triples, self._why, strict=True):
                if why:
                    yield Dropped(triple.id, why, self.tidied(triple))


def unfit(triple: Triple, hygiene: Hygiene) -> str | None:
    """Why a triple, or a pair, teaches nothing; None where it may teach something.

    Raises:
        DataError: it has no good or no bad response.
    """
    texts = triple.responses
    if missing := {"good", "bad"} - texts.keys():
        raise DataError(
            f"triple {triple.id} has no {' and no '.join(sorted(missing))} response, found "
            f"{', '.join(texts)}; a pair is the good one over the bad one. A method whose rejected "
            "answers are plain calls pairs(…, plain=1.0)"
        )
    good, bad, plain = texts["good"], texts["bad"], texts.get("plain")
    faults = {
        "empty": not all(text.strip() for text in texts.values()),
        "too_short": min(map(len, texts.values())) < hygiene.min_chars,
        "good_equals_bad": good == bad,
        "equals_plain": plain in (good, bad),
    }
    return next((reason for reason, applies in faults.items() if applies), None)


def steering_filter(
    means: Mapping[str, np.ndarray], settings: Filter = AS_RELEASED
) -> Iterator[tuple[str, np.ndarray]]:
    """v1's filter on mean log-probs per token m(response|context), step by step.

    Args:
        means: the six `FILTER_SEQUENCES` → (N,) float64, nats per token.
        settings: which steps there are, and their bounds; by default the release's.

    Yields:
        Reason and mask of what the step drops, over what the steps before it left:
        ``steering_order`` (the good response must be likelier the better its context, the bad one
        the worse), ``off_policy`` (both at or above their bound under the plain context),
        ``small_gap`` (both steering gaps above their mean, or at or above another bound). Means and
        quantiles are over what the step before left, and each of the two figures has its own.
    """
    m = {name: np.asarray(values) for name, values in means.items()}
    falls = [(a, b) for order in ORDER for a, b in pairwise(order)]

    def steps() -> Iterator[tuple[str, np.ndarray]]:
        if settings.steering_order:
            yield (
                "steering_order",
                np.all([m[better] > m[worse] for better, worse in falls], axis=0),
            )
        if settings.near_on_policy.rule != "off":
            plain = (m["plain/good"], m["plain/bad"])
            yield "off_policy", _above(plain, settings.near_on_policy)
        if settings.gap.rule != "off":
            gaps = tuple(steering_gaps(m).values())
            yield "small_gap", _above(gaps, settings.gap, strict=settings.gap.rule == "mean")

    for reason, keep in steps():
        yield reason, ~keep
        m = {name: values[keep] for name, values in m.items()}


def _above(figures: Sequence[np.ndarray], bound: Bound, *, strict: bool = False) -> np.ndarray:
    """Mask of where each of the figures is at or above its own bound; where strict, above it."""
    return np.all(
        [v > _least(v, bound) if strict else v >= _least(v, bound) for v in figures], axis=0
    )


def _least(values: np.ndarray, bound: Bound) -> float:
    if bound.at_least is not None or not len(values):
        return bound.at_least or 0.0
    return float(values.mean() if bound.quantile is None else np.quantile(values, bound.quantile))


# -- lengths -------------------------------------------------------------------------------------


def response_lengths(chat: Any, triples: Records[Triple]) -> np.ndarray:
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
    chosen, rejected = lengths.T
    columns = {
        "chosen": chosen,
        "rejected": rejected,
        "longer_chosen": chosen > rejected,
        "longer_rejected": rejected > chosen,
    }
    n = len(lengths)
    return {"pairs": n, **{k: float(v.mean()) if n else None for k, v in columns.items()}}


def within_caps(lengths: np.ndarray, hygiene: Hygiene) -> np.ndarray:
    """(N,) mask: the two lengths of a pair differ by no more than hygiene allows."""
    longer, shorter = lengths.max(axis=1), lengths.min(axis=1)
    ratio, difference = hygiene.max_length_ratio, hygiene.max_length_difference
    bounds = (
        np.inf if ratio is None else ratio * shorter,
        np.inf if difference is None else shorter + difference,
    )
    return (longer <= bounds[0]) & (longer <= bounds[1])


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
    cells: defaultdict[tuple[int, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    by_hash = sorted(
        np.flatnonzero(~keep).tolist(), key=lambda i: derive_seed(seed, "match_lengths", ids[i])
    )
    for i in by_hash:
        longer_rejected = int(lengths[i, 0] < lengths[i, 1])
        cells[tuple(sorted(bins[i].tolist()))][longer_rejected].append(i)
    for chosen, rejected in cells.values():
        size = min(len(chosen), len(rejected))
        keep[chosen[:size] + rejected[:size]] = True
    return keep


def even_lengths(
    left: Left, hygiene: Hygiene, chat: Callable[[], Any], seed: int, *, match: bool
) -> dict[str, Any]:
    """Leaves out pairs that hygiene's length settings do not let pass.

    Memory holds 16 bytes a pair, and the ids where lengths are matched.

    Args:
        left: N pairs; the good response is the chosen one.
        hygiene: caps, and whether lengths are matched.
        chat: loads the chat format whose tokens count.
        seed: of the matching.
        match: whether these are the pairs that the policy is trained on; only they are matched.

    Returns:
        Figures of the lengths before and after.
    """
    lengths = response_lengths(chat(), left)
    figures = {"before": length_figures(lengths)}
    keep = within_caps(lengths, hygiene)
    left.drop(~keep, "length_gap")
    lengths = lengths[keep]
    if hygiene.match_lengths and match:
        keep = matched_lengths(lengths, [t.id for t in left], seed)
        left.drop(~keep, "length_unmatched")
        lengths = lengths[keep]
    return figures | {"after": length_figures(lengths)}


# -- the stages ----------------------------------------------------------------------------------

#: A catalogue counts by the words that lead-ins are made of, whatever its file is called.
BY_WORDS = {"identity": lambda path: load_catalogue(path).words}


@dataclass(frozen=True)
class FilterTriples(Stage):
    """Hygiene, and v1's filter where there are settings for it; scores are under the policy.

    Args:
        triples: with all three responses.
        policy: at the start of the iteration.
        hygiene: of texts and lengths.
        filter: v1's; None: off.
        catalogue: YAML file of features, whose words lead-ins are made of; None: the built-in one.
        trained_on: the policy itself is trained on these triples, not only a generator: then their
            lengths are matched where hygiene asks for it.
    """

    triples: Artifact
    policy: Artifact
    hygiene: Hygiene
    filter: Filter | None = None
    catalogue: str | None = field(default=None, metadata=BY_WORDS)
    trained_on: bool = False

    title = "filter"
    makes = ("{folder}/filtered.jsonl",)
    passes_on = True

    @override
    def cost(self, scale: Scale) -> Cost:
        n = self.records(scale)
        return Cost(n, scores=scoring(self.texts, FILTER_SEQUENCES if self.filter else (), n))

    @override
    def run(self, run: RunFolder) -> StageResult:
        """The note ``survivors`` says how many were left after each step."""
        from selfsteer.models.load import load_chat

        triples, policy = stored_triples(self.triples.path), str(self.policy.path)
        left = Left(triples, self.hygiene, load_catalogue(self.catalogue)).sift()
        survivors = {"in": len(triples), "hygiene": len(left)}
        notes: dict[str, Any] = {"lead_ins_stripped": left.stripped, "survivors": survivors}
        if self.filter and len(left):
            means = mean_logps(left, policy, self.loading, run / "scores")
            for reason, lost in steering_filter(means, self.filter):
                left.drop(lost, reason)
                survivors[reason] = len(left)
        if len(left):
            notes["lengths"] = even_lengths(
                left,
                self.hygiene,
                lambda: load_chat(policy, self.loading),
                self.seed,
                match=self.trained_on,
            )
            survivors["lengths"] = len(left)
        write_atomic(run / self.outputs[0], map(dump_line, left))
        dropped = run.drop(self.name, left.dropped())
        return StageResult(len(triples), len(left), dropped, notes=notes)


def mean_logps(
    triples: Records[Triple], policy: str, loading: Loading, scores: Path
) -> dict[str, np.ndarray]:
    """`FILTER_SEQUENCES` → (N,) mean log-probs per token under ``policy``, in nats.

    Scores are kept in the folder ``scores``; memory holds 48 bytes a triple, and of each sequence
    that was ever scored where its log-probs lie (`ScoreStore`).
    """
    from selfsteer.models.load import load_model
    from selfsteer.models.store import CHUNK, open_scores

    loaded = load_model(policy, loading)
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


def rejected_by(seed: int, plain: float) -> Callable[[str], str]:
    """Which response of a query is rejected: the plain one for a share of them, else the bad one.

    Picked by a hash of seed and id, so that a larger share holds a smaller one.
    """

    def rejected(query: str) -> str:
        picked = derive_seed(seed, "rejected", query) < plain * 2**63
        return "plain" if picked else "bad"

    return rejected


@dataclass(frozen=True)
class WritePairs(Stage):
    """The plain preferences (x; y+ ≻ y-), principles removed, as shards.

    Args:
        samples: good and bad response of each query.
        policy: the recipe's; its tokens count where lengths are bounded.
        hygiene: of texts and lengths.
        shard_size: pairs per shard.
        catalogue: see `FilterTriples`.
        cleaned: the samples are those of `FilterTriples`, with nothing left to drop.
        plain: share of the queries whose plain response stands in for the bad one (`rejected_by`).
    """

    samples: Artifact
    policy: Artifact
    hygiene: Hygiene
    shard_size: int
    catalogue: str | None = field(default=None, metadata=BY_WORDS)
    cleaned: bool = False
    plain: float = 0.0

    title = "preferences"
    passes_on = True

    @override
    def run(self, run: RunFolder) -> StageResult:
        from selfsteer.models.load import load_chat

        triples = stored_pairs(self.samples.path, rejected_by(self.seed, self.plain))
        kept: Records[Triple] = triples
        notes: dict[str, Any] = {}
        dropped: Iterable[Dropped] = ()
        if not self.cleaned:
            kept = left = Left(triples, self.hygiene, load_catalogue(self.catalogue)).sift()
            notes["lead_ins_stripped"] = left.stripped
            notes["lengths"] = even_lengths(
                left,
                self.hygiene,
                lambda: load_chat(str(self.policy.path), self.loading),
                self.seed,
                match=True,
            )
            dropped = left.dropped()
        notes["about_safety"] = 0
        for number, part in enumerate(batched(kept, self.shard_size)):
            notes["about_safety"] += sum(map(names_safety, part))
            shard = [to_preference(t) for t in part]
            refuse_bad_as_chosen(part, shard)
            write_atomic(run / self.name / f"shard-{number:05d}.jsonl", dump_lines(shard))
        counts = run.drop(self.name, dropped)
        return StageResult(len(triples), len(kept), counts, notes=notes)


def to_preference(triple: Triple) -> Preference:
    """The plain pair of a triple; the names of its features stay beside it."""
    names = {"good": "chosen", "bad": "rejected"}
    features = list(named_features(triple))
    return Preference(
        triple.id,
        triple.messages,
        triple.responses["good"],
        triple.responses["bad"],
        renamed(triple.finish_reasons, names),
        {**rules(triple.extra), **({"features": features} if features else {})},
        renamed(triple.reasoning, names),
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
    """The features that a record's principles named; none where they were written without.

    Raises:
        DataError: they are no list of names.
    """
    if isinstance(record, Triple):
        return record.principles.features if record.principles else ()
    return feature_names(record.extra.get("features", ()))


def names_safety(record: Triple | Preference) -> bool:
    """Whether Safety is among the features that a record's principles named."""
    return "Safety" in named_features(record)
