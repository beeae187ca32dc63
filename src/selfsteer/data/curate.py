"""Which queries are worth asking: bounds, duplicates, near-duplicates, contamination, splits.

Everything is decided on the text itself: MinHash only proposes pairs, the true Jaccard similarity
of their word shingles decides; an n-gram match is a match of words, not of hashes.
"""

import hashlib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import regex

from selfsteer.data.digests import derive_seed
from selfsteer.data.records import Query, content_id
from selfsteer.data.stored import Shelf

#: Share of a query's letters that must be of the scripts asked for.
SCRIPT_SHARE = 0.5

#: Words per shingle of the near-duplicate test.
SHINGLE = 3

#: Permutations of a MinHash signature; the least recall at the threshold that its bands give; and
#: the most that is lost of it where a pair is not looked at because its signatures differ too much.
PERMUTATIONS = 128
RECALL = 0.9951
MISSED = 0.0001

#: Band entries that wait before they are sorted in.
MERGE_AT = 100_000

#: Evaluation queries listed per shared phrase; boilerplate may be in thousands of them.
LISTED_PER_PHRASE = 4

# Scripts that put no space between words: each of their characters counts as a word.
_UNSPACED = "".join(
    rf"\p{{Script={s}}}" for s in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_WORDS = regex.compile(rf"(?V1)[{_UNSPACED}]|[[\w\p{{M}}]--[{_UNSPACED}]]+")
_ASCII_WORDS = re.compile(r"\w+", re.ASCII)
_LETTERS = regex.compile(r"\p{L}+")


def words(text: str) -> list[str]:
    """The words of a text, compatibility forms and case folded, punctuation left out.

    >>> words("What's  UP, doc?")
    ['what', 's', 'up', 'doc']
    """
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())
    found: list[str] = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def asked(query: Query) -> str:
    """All user turns, one per line: what bounds and contamination are decided on."""
    if len(query.messages) == 1:
        return query.messages[0].content
    return "\n".join(m.content for m in query.messages if m.role == "user")


def transcript(query: Query) -> str:
    """A query as it is shown to a model that writes about it, without its system message.

    All turns of a conversation, each with who speaks.
    """
    spoken = [m for m in query.messages if m.role != "system"]
    if len(spoken) == 1:
        return spoken[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in spoken)


def bounds(
    min_chars: int | None, max_chars: int | None, scripts: Sequence[str] | None
) -> Callable[[Query], str | None]:
    """A check that gives the reason why a query is out of bounds, or None.

    Args:
        min_chars: fewest characters of the user turns together; null: no bound.
        max_chars: most characters; null: no bound.
        scripts: Unicode scripts that must write at least half of the letters. A query without
            letters ("2 + 2 =") passes.
    """
    low, high = min_chars or 0, max_chars
    inside = None
    if scripts:
        classes = "".join(rf"\p{{Script={s}}}" for s in scripts)
        inside = regex.compile(rf"(?V1)[\p{{L}}&&[{classes}]]+")
    latin = scripts is not None and "Latin" in scripts

    def check(query: Query) -> str | None:
        text = asked(query)
        if len(text) < low:
            return "too_short"
        if high is not None and len(text) > high:
            return "too_long"
        # ASCII letters are Latin, and most queries have no other
        if inside is not None and not (latin and text.isascii()):
            letters = sum(map(len, _LETTERS.findall(text)))
            if sum(map(len, inside.findall(text))) < SCRIPT_SHARE * letters:
                return "other_script"
        return None

    return check


class Duplicates:
    """Remembers queries, by a digest of 16 bytes each, to know one again."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def add(self, query: Query) -> str | None:
        """Remembers a query that is new, else says how it was seen before.

        Returns:
            ``duplicate`` for the same messages, ``duplicate_but_case`` where they differ in case
            or white space alone, None for a new query.
        """
        turns = "\0".join(f"{m.role}\0{_folded(m.content)}" for m in query.messages)
        key = hashlib.blake2b(turns.encode(), digest_size=16).digest()
        content = content_id(query.messages)
        first = self._seen.get(key)
        if first is None:
            self._seen[key] = content
            return None
        return "duplicate" if first == content else "duplicate_but_case"


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


# -- near-duplicates -----------------------------------------------------------------------------


def shingles(text: str) -> set[str]:
    """The runs of three words in a text; a shorter text is one shingle."""
    found = words(text)
    if len(found) < SHINGLE:
        return {" ".join(found) or text}
    return {" ".join(found[i : i + SHINGLE]) for i in range(len(found) - SHINGLE + 1)}


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection over size of the union, of two sets that are not empty."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows): as many rows as keep the chance of a missed pair below 1 - RECALL.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, §3.4); that is exact at s = threshold.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        count = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** count >= RECALL:
            return count, rows
    return PERMUTATIONS, 1


def least_matches(threshold: float) -> int:
    """How many values two signatures share, but for a chance of MISSED, at this similarity.

    Each of the values agrees with the probability of the similarity (Broder 1997), so that their
    number is binomial.
    """
    fewer = 0.0
    for k in range(PERMUTATIONS):
        odds = threshold**k * (1 - threshold) ** (PERMUTATIONS - k)
        fewer += math.comb(PERMUTATIONS, k) * odds
        if fewer > MISSED:
            return k
    return PERMUTATIONS


class NearDuplicates:
    """An index that finds an earlier query nearly equal to a new one.

    Nearly equal: the same system message, and a Jaccard similarity of word shingles at or above
    the threshold, both of all other turns and of the last one (so that two questions on one long
    conversation are not taken for the same).
    """

    def __init__(self, threshold: float, queries: Shelf | None = None) -> None:
        """Keeps what goes in on ``queries``, which is empty; by default in memory."""
        self.threshold = threshold
        self._signatures = _Signatures(*bands(threshold))
        self._index = _BandIndex()
        self._sketches = _Sketches(least_matches(threshold))
        self._queries: Shelf = [] if queries is None else queries

    def add(self, query: Query) -> Query | None:
        """The first query in the index that this one nearly equals; if none does, it goes in."""
        mine = shingles(_spoken(query))
        values = self._signatures.of(mine)
        hashes = self._signatures.bands_of(values)
        for number in self._sketches.similar(values, self._index.find(hashes)):
            if self._alike(query, mine, self._queries[number]):
                return self._queries[number]
        self._insert(query, values, hashes)
        return None

    def insert(self, query: Query) -> None:
        """Puts a query in, whatever it resembles."""
        values = self._signatures.of(shingles(_spoken(query)))
        self._insert(query, values, self._signatures.bands_of(values))

    def _insert(self, query: Query, values: Any, hashes: Any) -> None:
        self._index.add(hashes, len(self._queries))
        self._sketches.add(values, len(self._queries))
        self._queries.append(query)

    def _alike(self, query: Query, mine: set[str], other: Query) -> bool:
        if _system(other) != _system(query):
            return False
        if jaccard(mine, shingles(_spoken(other))) < self.threshold:
            return False
        if len(query.messages) == len(other.messages) == 1:
            return True
        return jaccard(shingles(query.text), shingles(other.text)) >= self.threshold


class _Signatures:
    """Hashes the bands of MinHash signatures (Broder 1997) to 64 bits each."""

    def __init__(self, count: int, rows: int) -> None:
        import numpy as np
        from datasketch import MinHash
        from xxhash import xxh32_intdigest

        self._shape = (count, rows)
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=xxh32_intdigest)
        rng = np.random.default_rng(1)
        self._factors = rng.integers(1, 2**63, self._shape, dtype=np.uint64) * 2 + 1
        self._numbers = rng.integers(1, 2**63, count, dtype=np.uint64)

    def of(self, found: set[str]) -> Any:
        """The signature of a set of shingles, (PERMUTATIONS,)."""
        signature = self._empty.copy()
        signature.update_batch([s.encode() for s in found])
        return signature.hashvalues

    def bands_of(self, values: Any) -> Any:
        """One hash per band, (bands,) uint64; two bands at different places never mean the same."""
        count, rows = self._shape
        banded = values[: count * rows].astype("uint64").reshape(self._shape)
        return (banded * self._factors).sum(1) + self._numbers


class _Sketches:
    """The low byte of each value of the signatures: which candidates are worth a true comparison.

    Prompts made from one template share bands by the thousands without being near-duplicates.
    """

    def __init__(self, least: int) -> None:
        import numpy as np

        self._np = np
        self._least = least
        self._rows = np.empty((0, PERMUTATIONS), np.uint8)

    def add(self, values: Any, number: int) -> None:
        """Notes the signature of the next record."""
        if number == len(self._rows):
            room = self._np.empty((number // 2 + 1024, PERMUTATIONS), self._np.uint8)
            self._rows = self._np.concatenate([self._rows, room])
        self._rows[number] = values.astype(self._np.uint8)

    def similar(self, values: Any, numbers: Any) -> list[int]:
        """Those of the records whose signature is near enough, in their order."""
        same = self._rows[numbers] == values.astype(self._np.uint8)
        found: list[int] = numbers[same.sum(1) >= self._least].tolist()
        return found


class _BandIndex:
    """Band hash → record numbers, in 12 bytes each: datasketch's LSH took about 300.

    New entries wait in a dictionary until they are a tenth of the sorted ones.
    """

    def __init__(self) -> None:
        import numpy as np

        self._np = np
        self._hashes, self._numbers = np.empty(0, np.uint64), np.empty(0, np.uint32)
        self._recent: dict[int, list[int]] = {}
        self._waiting = 0

    def add(self, hashes: Any, number: int) -> None:
        """Notes the bands of a record; numbers ascend."""
        for value in hashes.tolist():
            self._recent.setdefault(value, []).append(number)
        self._waiting += len(hashes)
        if self._waiting > max(MERGE_AT, len(self._hashes) // 10):
            self._merge()

    def find(self, hashes: Any) -> Any:
        """The records that share a band, (n,), first ones first."""
        left = self._np.searchsorted(self._hashes, hashes, "left")
        right = self._np.searchsorted(self._hashes, hashes, "right")
        found = [self._numbers[left[i] : right[i]] for i in self._np.flatnonzero(left < right)]
        for value in hashes.tolist():
            if value in self._recent:
                found.append(self._np.array(self._recent[value], self._np.uint32))
        return self._np.unique(self._np.concatenate(found)) if found else self._numbers[:0]

    def _merge(self) -> None:
        np = self._np
        new = [(value, n) for value, numbers in self._recent.items() for n in numbers]
        hashes = np.concatenate([self._hashes, np.array([v for v, _ in new], np.uint64)])
        numbers = np.concatenate([self._numbers, np.array([n for _, n in new], np.uint32)])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._numbers = hashes[order], numbers[order]
        self._recent, self._waiting = {}, 0


def _spoken(query: Query) -> str:
    if len(query.messages) == 1:
        return query.messages[0].content
    return "\n".join(m.content for m in query.messages if m.role != "system")


def _system(query: Query) -> str:
    first = query.messages[0]
    return _folded(first.content) if first.role == "system" else ""


# -- contamination -------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """A query and an evaluation query that share a passage (words, folded)."""

    id: str
    against: str
    evaluation_id: str
    shared: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return self._asdict()


class Contamination:
    """Evaluation queries by their n-grams of words; those shorter than n as a whole."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self._owners: list[tuple[str, str]] = []
        self._phrases: dict[str, list[int]] = defaultdict(list)
        self._whole: dict[str, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, name: str, query: Query) -> None:
        """Puts an evaluation query of the set ``name`` in."""
        number = len(self._owners)
        self._owners.append((name, query.id))
        found = words(asked(query))
        if len(found) < self.ngram:
            self._note(self._whole, " ".join(found) or asked(query).strip(), number)
        for phrase in set(_ngrams(found, self.ngram)):
            self._note(self._phrases, phrase, number)

    def _note(self, index: dict[str, list[int]], key: str, number: int) -> None:
        if len(index[key]) < LISTED_PER_PHRASE:
            index[key].append(number)

    def find(self, query: Query) -> list[Overlap]:
        """Each evaluation query that this one overlaps with, and the longest passage they share.

        Where a phrase is in more than four evaluation queries, the first four are listed.
        """
        found = words(asked(query))
        shared: dict[int, str] = {}
        for text in {asked(query), query.text}:  # a short last turn may be a whole evaluation query
            key = " ".join(words(text)) or text.strip()
            shared.update(dict.fromkeys(self._whole.get(key, ()), key))
        runs: dict[int, tuple[int, int]] = {}  # evaluation query → first and last n-gram of a run
        longest: dict[int, tuple[int, int]] = {}
        for i, phrase in enumerate(_ngrams(found, self.ngram)):
            for number in self._phrases.get(phrase, ()):
                start, end = runs.get(number, (i, i - 1))
                runs[number] = start, end = (start if end == i - 1 else i), i
                first, last = longest.get(number, (0, -1))
                if end - start > last - first:
                    longest[number] = start, end
        for number, (start, end) in longest.items():
            shared[number] = " ".join(found[start : end + self.ngram])
        return [Overlap(query.id, *self._owners[n], shared[n]) for n in sorted(shared)]


def _ngrams(found: Sequence[str], n: int) -> Iterable[str]:
    return (" ".join(found[i : i + n]) for i in range(len(found) - n + 1))


# -- splits --------------------------------------------------------------------------------------


def held_out(query: Query, share: float) -> bool:
    """Whether a query is in the held-out split: a hash of its messages decides, nothing else.

    The same query is on the same side in every file, and a smaller share is part of a larger one.
    """
    return derive_seed("holdout", content_id(query.messages)) < share * 2**63


# -- diversity -----------------------------------------------------------------------------------

#: Queries looked at; k-means on more says the same and takes longer.
_DIVERSITY_SAMPLE = 2000
_DIMENSIONS = 256


def diversity(sets: Mapping[str, Sequence[Query]]) -> dict[str, dict[str, float]]:
    """How varied sets of queries are, measured on equally many of each, so that sizes don't matter.

    ``distinct_1``, ``distinct_2``: different words and word pairs over all of them (Li et al. 2016,
    arXiv 1510.03055). ``clusters``: the queries as TF-IDF vectors of hashed words are put into
    √n clusters by spherical k-means over all sets together; exp of the entropy of a set's shares,
    that is how many clusters it fills evenly, over their number. 1 is the most varied.

    Args:
        sets: name → queries, none empty.
    """
    import numpy as np

    size = min(_DIVERSITY_SAMPLE, *(len(queries) for queries in sets.values()))
    picked = {
        name: sorted(queries, key=lambda q: derive_seed("diversity", q.id))[:size]
        for name, queries in sets.items()
    }
    texts = [words(asked(q)) for queries in picked.values() for q in queries]
    counts = np.zeros((len(texts), _DIMENSIONS))
    for row, found in enumerate(texts):
        for word in found:
            value = derive_seed(word)
            counts[row, value % _DIMENSIONS] += 1 if value >> 62 else -1
    documents = (counts != 0).sum(0)
    vectors = counts * np.log((1 + len(texts)) / (1 + documents))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    k = max(2, round(len(texts) ** 0.5))
    centres = vectors[np.random.default_rng(0).choice(len(texts), min(k, len(texts)), False)]
    for _ in range(20):
        nearest = (vectors @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-9), centres)
    nearest = (vectors @ centres.T).argmax(1)
    out = {}
    for number, name in enumerate(picked):
        part = texts[number * size : (number + 1) * size]
        pairs = [pair for found in part for pair in pairwise(found)]
        single = [word for found in part for word in found]
        shares = np.bincount(nearest[number * size : (number + 1) * size]) / size
        shares = shares[shares > 0]
        out[name] = {
            "distinct_1": round(len(set(single)) / max(len(single), 1), 4),
            "distinct_2": round(len(set(pairs)) / max(len(pairs), 1), 4),
            "clusters": round(float(np.exp(-(shares * np.log(shares)).sum())) / len(centres), 4),
        }
    return out
