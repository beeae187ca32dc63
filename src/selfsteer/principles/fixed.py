"""Principles that the user has fixed: one pair for all queries, or a file by query id."""

from collections.abc import Mapping
from typing import Any

from selfsteer.data.files import read_rows
from selfsteer.data.jsonl import Records
from selfsteer.data.reading import read
from selfsteer.data.records import Principles, Query, Triple, rules
from selfsteer.errors import DataError, listed, short
from selfsteer.recipe.sections import PrinciplesConfig, resolve_path


class Fixed:
    """The user's own principles for each query.

    Raises:
        DataError: the file is malformed or names a query twice.
    """

    def __init__(self, settings: PrinciplesConfig) -> None:
        self._path = settings.path
        self._found = read_fixed(settings.path) if settings.path else {}
        good, bad = settings.good, settings.bad
        self._default = None if good is None or bad is None else Principles(good, bad)

    def check(self, queries: Records[Query]) -> int:
        """How many of the file's principles no query asks for.

        Raises:
            DataError: the file lacks a query, and there is no default.
        """
        used = sum(query.id in self._found for query in queries)
        if self._default is None and used < len(queries):
            first = next(query.id for query in queries if query.id not in self._found)
            raise DataError(
                f"{self._path} has no principles for {len(queries) - used:,} of {len(queries):,} "
                f"queries, the first is {short(first)}. Add them, or set principles.good and "
                "principles.bad for the ids it lacks."
            )
        return len(self._found) - used

    def triple(self, query: Query) -> Triple:
        """The query with its principles."""
        source = "fixed:default" if self._path and query.id not in self._found else "fixed"
        principles = self._found.get(query.id, self._default)
        extra = {**rules(query.extra), "source": source}
        return Triple(query.id, query.messages, principles, extra=extra)


def read_fixed(path: str) -> dict[str, Principles]:
    """Principles by query id: of each row only ``id`` and ``principles`` are read.

    Raises:
        DataError: names file and line.
    """
    found: dict[str, Principles] = {}
    for where, (identity, principles) in read(read_rows(resolve_path(path)), _principles):
        if identity in found:
            raise DataError(f"{where} is the second one with the id {short(identity)}; keep one.")
        found[identity] = principles
    return found


def _principles(row: Mapping[str, Any]) -> tuple[str, Principles]:
    identity, value = row.get("id"), row.get("principles")
    if not isinstance(identity, str) or not isinstance(value, dict):
        raise DataError(
            f"it needs 'id' and 'principles', found the keys {listed(row)}. Write "
            '{"id": "…", "principles": {"good": "…", "bad": "…"}}'
        )
    # the system prompt is that of the run's own policy
    if not {"good", "bad"} <= value.keys() <= {"good", "bad", "features", "system"}:
        raise DataError(
            f"principles have 'good', 'bad' and perhaps 'features', found {listed(value)}"
        )
    if value["good"] == value["bad"]:
        raise DataError("both principles are the same text")
    return identity, Principles(value["good"], value["bad"], value.get("features") or ())
