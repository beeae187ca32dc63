"""What stages read: records of other stages, lazily, and preference sets of other runs."""

import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfsteer.data.digests import derive_seed
from selfsteer.data.records import Preference, Query, Triple
from selfsteer.data.stored import Stored


def stored_queries(path: Path) -> Stored[Query]:
    """Queries of a JSONL file."""
    return Stored(path, Query.from_dict)


def stored_triples(path: Path) -> Stored[Triple]:
    """Triples of a JSONL file or of a folder of shards."""
    return Stored(path, Triple.from_dict)


def stored_pairs(path: Path) -> Stored[Triple]:
    """Good and bad response of each query: of triples, or of preferences."""
    return Stored(path, _pair)


def _pair(row: Mapping[str, Any]) -> Triple:
    return Preference.from_dict(row).to_triple() if "chosen" in row else Triple.from_dict(row)


def stored_preferences(folder: Path) -> Stored[Preference]:
    """Preferences of a folder of shards."""
    return Stored(folder, Preference.from_dict)


def subset(triples: Stored[Triple], limit: int | None, seed: int) -> Stored[Triple]:
    """A seeded subset that does not depend on the order of the rest, in the given order."""
    if limit is None or len(triples) <= limit:
        return triples
    hashes = ((derive_seed(seed, "subset", t.id), i) for i, t in enumerate(triples))
    return triples.take(sorted(i for _, i in heapq.nsmallest(limit, hashes)))
