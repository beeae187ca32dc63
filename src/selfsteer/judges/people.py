"""Human labels as a judge; a pair without a label is unparseable."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import read_jsonl
from selfsteer.data.records import Query, Verdict
from selfsteer.errors import ConfigError, DataError, short
from selfsteer.judges.base import Judgement, Pair


def pair_digest(first: str, second: str) -> str:
    """16 hex digits of two responses, in either order."""
    return digest(sorted((first, second)))


class HumanJudge:
    """Labels from a JSONL file.

    A label holds both responses and a verdict, or the digest of both and the preferred response::

        {"id": "q1", "first": "Nectar.", "second": "Bricks.", "verdict": "first"}
        {"id": "q1", "pair": "0123456789abcdef", "preferred": "Nectar."}

    It counts for exactly these two texts: a label never judges other responses to its query.
    ``"verdict": null`` is a pair that is not labelled yet.

    Raises:
        ConfigError: there is no such file.
        DataError: a line is not a label, or two labels of a pair contradict each other.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"judge.path: there is no file {path}; give the labels' JSONL file.")
        self.path = path
        self.name = f"human:{path}"

    @cached_property
    def _labels(self) -> dict[tuple[str, str], str]:
        """(query id, pair digest) → digest of the preferred response, or ``tie``."""
        labels: dict[tuple[str, str], str] = {}
        for number, value in read_jsonl(self.path):
            try:
                key, label = _label(value)
            except DataError as e:
                raise DataError(f"{self.path}, line {number} {e}") from None
            if label is not None and labels.setdefault(key, label) != label:
                raise DataError(
                    f"{self.path}, line {number} contradicts an earlier label of the same two "
                    f"responses to {key[0]}. Keep one, or label the pair a tie."
                )
        return labels

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`."""
        if not self._labels:
            raise DataError(f"{self.path} holds no label. Fill in the verdicts first.")

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge.compare_all`."""
        return [self._compare(p) for p in pairs]

    def _compare(self, pair: Pair) -> Judgement:
        label = self._labels.get((pair.query.id, pair_digest(pair.first, pair.second)))
        if label is None:
            return Judgement(Verdict.UNPARSEABLE, reason="no_label")
        verdicts = {
            "tie": Verdict.TIE,
            digest(pair.first): Verdict.FIRST,
            digest(pair.second): Verdict.SECOND,
        }
        if label not in verdicts:
            raise DataError(
                f"{self.path}: the preferred response to {pair.query.id} is neither of the two "
                "that its pair stands for."
            )
        return Judgement(verdicts[label])


def _label(value: dict[str, Any]) -> tuple[tuple[str, str], str | None]:
    """The key of a label, and the preferred text's digest, ``tie``, or None if it is open."""
    names = ("id", "verdict", "first", "second", "pair", "preferred")
    identity, verdict, first, second, pair, preferred = map(value.get, names)
    if not isinstance(identity, str | int):
        raise DataError("is not a label: it needs the id of its query.")
    if isinstance(first, str) and isinstance(second, str):
        if verdict not in ("first", "second", "tie", None):
            raise DataError(
                f"is not a label: its verdict {short(verdict)} is not first, second, tie or null."
            )
        if verdict in ("first", "second") and first == second:
            raise DataError("prefers one of two equal responses.")
        pair = pair_digest(first, second)
        preferred = {"first": first, "second": second}.get(str(verdict))
    elif not isinstance(pair, str):
        raise DataError(
            "is not a label: give first, second and verdict, or pair (selfsteer's digest of both "
            "responses) and preferred."
        )
    if isinstance(preferred, str):
        return (str(identity), pair), digest(preferred)
    if verdict not in ("tie", None):
        raise DataError("is not a label: a pair needs the preferred response, or a verdict tie.")
    return (str(identity), pair), verdict
