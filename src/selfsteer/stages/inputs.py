"""What stages read: records of other stages, lazily, and preference sets of other runs."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import Stored, T
from selfsteer.data.records import Preference, Query, Triple
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.recipe.sections import resolve_path
from selfsteer.run.folder import RunFolder
from selfsteer.run.sums import check_sums
from selfsteer.terminal import warn


class Share(NamedTuple):
    """A slice of the queries: that of an iteration, of a fixed size or one of equal ones."""

    iteration: int
    #: queries per iteration; None: an equal share of all iterations
    size: int | None
    #: iterations that share; None with a size, so that a run can be given more of them later
    of: int | None

    def bounds(self, count: int) -> tuple[int, int]:
        """Start and size among ``count`` queries in id order; it may reach beyond the last."""
        if self.size is not None:
            return (self.iteration - 1) * self.size, self.size
        assert self.of is not None
        start, end = (count * k // self.of for k in (self.iteration - 1, self.iteration))
        return start, max(end - start, 1)

    def most(self, count: int) -> int:
        """Queries of the largest slice of ``count``."""
        return min(self.size or -(-count // (self.of or 1)), count)

    def take(self, queries: Stored[T]) -> Stored[T]:
        """The slice; queries are used again where there are too few."""
        start, size = self.bounds(len(queries))
        if start + size > len(queries):
            warn(
                f"iteration {self.iteration} needs queries {start + 1:,} to {start + size:,} of "
                f"{len(queries):,}; earlier ones are used again"
            )
        elif self.of is not None and len(queries) * self.iteration // self.of == start:
            warn(
                f"iteration {self.iteration} takes a query that another one takes too: {self.of:,} "
                f"iterations share {len(queries):,} queries; lower iterations, or give more queries"
            )
        places = ((start + i) % len(queries) for i in range(min(size, len(queries))))
        return queries.take(sorted(places))


def stored_queries(path: Path) -> Stored[Query]:
    """Queries of a JSONL file."""
    return Stored(path, Query.from_dict)


def stored_triples(path: Path) -> Stored[Triple]:
    """Triples of a JSONL file or of a folder of shards."""
    return Stored(path, Triple.from_dict)


def stored_pairs(path: Path, rejected: Callable[[str], str] | None = None) -> Stored[Triple]:
    """Good and bad response of each query: of triples, or of preferences.

    Args:
        path: where they are.
        rejected: from a triple's id to the response that is the bad one of a pair, in which no
            other than the good one stands beside it; None: triples as they are.
    """

    def pair(row: Mapping[str, Any]) -> Triple:
        if "chosen" in row:
            return Preference.from_dict(row).to_triple()
        triple = Triple.from_dict(row)
        return triple if rejected is None else as_pair(triple, rejected(triple.id))

    return Stored(path, pair)


def as_pair(triple: Triple, rejected: str) -> Triple:
    """The good response of a triple, and the one of that name as the bad one."""
    names = {"good": "good", rejected: "bad"}
    return replace(
        triple,
        responses=renamed(triple.responses, names),
        finish_reasons=renamed(triple.finish_reasons, names),
        reasoning=renamed(triple.reasoning, names),
    )


def renamed(values: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """The values of these names under their new ones, as far as there are any.

    >>> renamed({"plain": "stop"}, {"good": "chosen", "plain": "rejected"})
    {'rejected': 'stop'}
    """
    return {new: values[old] for old, new in names.items() if old in values}


def stored_preferences(folder: Path) -> Stored[Preference]:
    """Preferences of a folder of shards."""
    return Stored(folder, Preference.from_dict)


def subset(triples: Stored[Triple], limit: int | None, seed: int) -> Stored[Triple]:
    """A seeded subset that does not depend on the order of the rest, in the given order."""
    if limit is None or len(triples) <= limit:
        return triples
    hashes = ((derive_seed(seed, "subset", t.id), i) for i, t in enumerate(triples))
    return triples.take(sorted(i for _, i in heapq.nsmallest(limit, hashes)))


def preferences_of(source: str) -> Path:
    """Where a preference set is: a file or folder, or the last preferences of a run folder.

    Raises:
        ConfigError: there is nothing.
        ArtifactError: the run has not come that far.
    """
    path = Path(resolve_path(source))
    if (path / "resolved.json").is_file():
        recipe = read_json(dict[str, Any], path / "resolved.json")
        mine = [
            e
            for e in RunFolder(path).ledger()
            if e.get("kind") == "WritePairs"
            and (e["method"], e["round"]) == (recipe["method"], recipe["iterations"])
        ]
        if not mine or mine[-1]["event"] != "finish":
            raise ArtifactError(
                f"The last preferences of the run {source} are not finished. Let the run come "
                "that far first."
            )
        check_sums(path, mine[-1]["stage"], mine[-1].get("sums", {}))
        path = path / mine[-1]["outputs"][0]
    if not path.exists():
        raise ConfigError(f"There are no preferences at {path}; give a file or a run folder.")
    return path
