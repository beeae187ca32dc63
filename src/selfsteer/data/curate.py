"""Which queries are worth asking: bounds, duplicates, near-duplicates, contamination, splits.

Everything is decided on the text itself: MinHash only proposes pairs, the true Jaccard similarity
of their word shingles decides; an n-gram match is a match of words, not of hashes.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from itertools import compress, pairwise
from typing import Any, NamedTuple

import regex

from selfsteer.data.digests import derive_seed
from selfsteer.data.records import Query, content_id

#: Share of a query's letters that must be of the scripts asked for.
SCRIPT_SHARE = 0.5

#: Words per shingle of the near-duplicate test.
SHINGLE = 3

#: Permutations of a MinHash signature, and the least recall at the threshold that its bands give.
PERMUTATIONS = 128
RECALL = 0.9951

#: How far two signatures may be below the threshold and still be compared: 3.6 standard deviations
#: of their similarity at 0.5, more elsewhere.
MARGIN = 0.16

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
    """The words of a text, case and compatibility forms folded, punctuation left out.

    >>> words("What's  UP, doc?")
    ['what', 's', 'up', 'doc']
    """
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())
    found: list[str] = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def ngrams(found: Sequence[str], n: int) -> list[str]:
    """All runs of n words; none where there are fewer.

    >>> ngrams(["a", "b", "c"], 2)
    ['a b', 'b c']
    """
    return [" ".join(found[i : i + n]) for i in range(len(found) - n + 1)]


def shingles(text: str) -> set[str]:
    """The runs of three words in a text; a shorter text is one shingle."""
    found = words(text)
    return set(ngrams(found, SHINGLE)) or {" ".join(found) or text}


def jaccard(a: Set[Any], b: Set[Any]) -> float:
    """Size of the intersection over size of the union; 0 for two empty sets."""
    both = len(a & b)
    return both / max(len(a) + len(b) - both, 1)


# -- bounds and duplicates -----------------------------------------------------------------------


def bounds(
    min_chars: int | None, max_chars: int | None, scripts: Sequence[str] | None
) -> Callable[[Query], str | None]:
    """A check that gives the reason why a query is out of bounds, or None.

    Args:
        min_chars: fewest characters of the user turns together; None: no bound.
        max_chars: most characters; None: no bound.
        scripts: Unicode scripts that must write at least half of the letters. A query without
            letters ("2 + 2 =") passes.
    """
    low, high = min_chars or 0, max_chars
    inside = written_in(tuple(scripts)) if scripts else None

    def check(query: Query) -> str | None:
        text = query.user_text
        if len(text) < low:
            return "too_short"
        if high is not None and len(text) > high:
            return "too_long"
        return "other_script" if inside is not None and not inside(text) else None

    return check


@cache
def written_in(scripts: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether these Unicode scripts write at least half of a text's letters; true of no letters."""
    classes = "".join(rf"\p{{Script={s}}}" for s in scripts)
    inside, latin = regex.compile(rf"(?V1)[\p{{L}}&&[{classes}]]+"), "Latin" in scripts

    def check(text: str) -> bool:
        # ASCII letters are Latin, and most texts have no other
        if latin and text.isascii():
            return True
        letters = sum(map(len, _LETTERS.findall(text)))
        return sum(map(len, inside.findall(text))) >= SCRIPT_SHARE * letters

    return check


class Duplicates:
    """Remembers queries, by a digest of 16 bytes each, to know one again."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def add(self, query: Query) -> str | None:
        """Remembers a query that is new, else says how it was seen before.

        Returns:
            ``duplicate`` for the same messages, ``duplicate_but_case`` where they have the same
            `likeness`, None for a new query.
        """
        key, content = likeness(query), content_id(query.messages)
        if key not in self._seen:
            self._seen[key] = content
            return None
        return "duplicate" if self._seen[key] == content else "duplicate_but_case"


def likeness(query: Query) -> bytes:
    """16 bytes that queries share which differ in case, white space or composition alone.

    Composition: é may be one character, or e with an accent after it; both look the same.
    """
    turns = "\0".join(f"{m.role}\0{_folded(m.content)}" for m in query.messages)
    return hashlib.blake2b(turns.encode(), digest_size=16).digest()


def _folded(text: str) -> str:
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(composed.split())


def held_out(query: Query, share: float) -> bool:
    """Whether a query is in the held-out split: a hash of its messages decides, nothing else.

    The same query is on the same side in every file, and a smaller share is part of a larger one.
    """
    return derive_seed("holdout", content_id(query.messages)) < share * 2**63


# -- near-duplicates -----------------------------------------------------------------------------


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows): as many rows as keep the chance of a missed pair below 1 - RECALL.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, §3.4); that is exact at s = threshold.
    """
    for size in range(PERMUTATIONS // 2, 1, -1):
        count = PERMUTATIONS // size
        if 1 - (1 - threshold**size) ** count >= RECALL:
            return count, size
    return PERMUTATIONS, 1


class NearDuplicates:
    """An index that finds an earlier query nearly equal to a new one.

    Nearly equal: the same system message, and a Jaccard similarity of word shingles at or above
    the threshold, both of all other turns and of the last one (so that two questions on one long
    conversation are not taken for the same). Pairs are proposed by MinHash LSH.
    """

    def __init__(self, threshold: float, queries: Any = None) -> None:
        """Keeps what goes in on ``queries``, an empty list or `Spool`; by default in memory."""
        from datasketch import MinHash, MinHashLSH
        from xxhash import xxh32_intdigest, xxh64_digest

        self.threshold = threshold
        self._queries = [] if queries is None else queries
        self._empty = MinHash(PERMUTATIONS, seed=1, hashfunc=xxh32_intdigest)
        self._index = MinHashLSH(
            num_perm=PERMUTATIONS, params=bands(threshold), hashfunc=xxh64_digest
        )
        # the low byte of each value: prompts of one template share bands by the thousands without
        # being near-duplicates, and are not worth a true comparison
        self._sketches: list[bytes] = []

    def add(self, query: Query) -> Query | None:
        """The first query in the index that this one nearly equals; if none does, it goes in."""
        mine = shingles(_spoken(query))
        signature = self._signature(mine)
        for number in self._candidates(signature):
            other: Query = self._queries[number]
            if self._alike(query, mine, other):
                return other
        self._insert(query, signature)
        return None

    def insert(self, query: Query) -> None:
        """Puts a query in, whatever it resembles."""
        self._insert(query, self._signature(shingles(_spoken(query))))

    def _signature(self, found: set[str]) -> Any:
        signature = self._empty.copy()
        signature.update_batch([s.encode() for s in found])
        return signature

    def _candidates(self, signature: Any) -> list[int]:
        import numpy as np

        numbers: list[int] = sorted(self._index.query(signature))
        sketches = np.frombuffer(b"".join(self._sketches[n] for n in numbers), np.uint8)
        same = sketches.reshape(-1, PERMUTATIONS) == signature.hashvalues.astype(np.uint8)
        return list(compress(numbers, same.mean(1) >= self.threshold - MARGIN))

    def _insert(self, query: Query, signature: Any) -> None:
        self._index.insert(len(self._queries), signature, check_duplication=False)
        self._sketches.append(signature.hashvalues.astype("uint8").tobytes())
        self._queries.append(query)

    def _alike(self, query: Query, mine: set[str], other: Query) -> bool:
        return (
            _system(other) == _system(query)
            and jaccard(mine, shingles(_spoken(other))) >= self.threshold
            and jaccard(shingles(query.text), shingles(other.text)) >= self.threshold
        )


def _spoken(query: Query) -> str:
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
        found = words(query.user_text)
        if len(found) < self.ngram:
            self._note(self._whole, _whole(query.user_text), number)
        for phrase in set(ngrams(found, self.ngram)):
            self._note(self._phrases, phrase, number)

    def _note(self, index: Mapping[str, list[int]], key: str, number: int) -> None:
        if len(index[key]) < LISTED_PER_PHRASE:
            index[key].append(number)

    def find(self, query: Query) -> list[Overlap]:
        """Each evaluation query that this one overlaps with, and the longest passage they share.

        Where a phrase is in more than four evaluation queries, the first four are listed.
        """
        found = words(query.user_text)
        shared: dict[int, str] = {}
        # a short last turn may be a whole evaluation query
        for key in {_whole(query.user_text), _whole(query.text)}:
            shared.update(dict.fromkeys(self._whole.get(key, ()), key))
        runs: dict[int, tuple[int, int]] = {}  # evaluation query → first and last n-gram of a run
        longest: dict[int, tuple[int, int]] = {}
        for i, phrase in enumerate(ngrams(found, self.ngram)):
            for number in self._phrases.get(phrase, ()):
                start, end = runs.get(number, (i, i - 1))
                runs[number] = start, end = (start if end == i - 1 else i), i
                first, last = longest.get(number, (0, -1))
                if end - start > last - first:
                    longest[number] = start, end
        for number, (start, end) in longest.items():
            shared[number] = " ".join(found[start : end + self.ngram])
        return [Overlap(query.id, *self._owners[n], shared[n]) for n in sorted(shared)]


def _whole(text: str) -> str:
    return " ".join(words(text)) or text.strip()


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
    texts = [words(q.user_text) for queries in picked.values() for q in queries]
    nearest, centres = _clusters(texts)
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
            "clusters": round(float(np.exp(-(shares * np.log(shares)).sum())) / centres, 4),
        }
    return out


def _clusters(texts: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """Each text's cluster, (n,), and how many clusters there are."""
    import numpy as np

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
    return (vectors @ centres.T).argmax(1), len(centres)
