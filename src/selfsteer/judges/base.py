"""Who says which of two responses is better, asked in both orders.

Every judge answers a `Pair` with one of five verdicts; ``unparseable`` is one of them and never a
tie. Kinds: the testbed's exact oracle, a chat model (`chat_judge`), a reward model
(`reward_judge`), and labels that people gave.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from selfsteer.data.digests import digest, digest_path, model_digest
from selfsteer.data.jsonl import read_jsonl
from selfsteer.data.records import Query, Verdict
from selfsteer.errors import ConfigError, DataError
from selfsteer.recipe.sections import JudgeConfig, resolve_path


@dataclass(frozen=True)
class Pair:
    """Two responses to one query; which of them is ``first`` has no meaning for a judge."""

    query: Query
    first: str
    second: str


@dataclass(frozen=True)
class Judgement:
    """A verdict and how it came about.

    ``shown`` is what a judge that sees positions said in each order: FIRST is the response that
    was *shown* first, so a judge without bias says FIRST and SECOND. None: it sees no positions.
    ``reason`` says why a verdict is unparseable. Tokens and seconds are what asking cost.
    """

    verdict: Verdict
    shown: tuple[Verdict, Verdict] | None = None
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class Judge(Protocol):
    """Compares pairs of responses, each asked in both orders."""

    name: str

    def check(self, queries: Sequence[Query]) -> None:
        """Fails now if it cannot judge answers to these, before any are sampled.

        Raises:
            SelfsteerError: a query is not of its world, or its model or file is missing.
        """
        ...

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement per pair, in their order."""
        ...


class Scorer(Protocol):
    """Gives one response a score; ``scale`` says what the number means."""

    name: str
    scale: str

    def score_all(self, answers: Sequence[tuple[Query, str]]) -> list[float | None]:
        """One score per (query, response), higher is better; None where there is none."""
        ...


@runtime_checkable
class ScoringJudge(Judge, Scorer, Protocol):
    """A judge that also gives one response a score."""


def by_scores(a: float | None, b: float | None, margin: float) -> Verdict:
    """What two scores say; equal up to ``margin`` is a tie.

    >>> by_scores(0.5, 0.2, 0.1).value
    'first'
    """
    if a is None or b is None:
        return Verdict.UNPARSEABLE
    if abs(a - b) <= margin:
        return Verdict.TIE
    return Verdict.FIRST if a > b else Verdict.SECOND


class OracleJudge:
    """The testbed's exact judge: compares scores, so the order cannot matter."""

    name = "oracle"
    scale = "oracle's total, 0 to 1"

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`."""
        for query in queries:
            self.score(query, "")

    def score(self, query: Query, response: str) -> float:
        """Oracle total of the response, 0 to 1.

        Raises:
            DataError: the query is not of the testbed's world.
        """
        from selfsteer.testbed import oracle

        return oracle.score(query.text, response).total

    def score_all(self, answers: Sequence[tuple[Query, str]]) -> list[float | None]:
        """See `Scorer.score_all`."""
        return [self.score(query, response) for query, response in answers]

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge.compare_all`."""
        return [
            Judgement(by_scores(self.score(p.query, p.first), self.score(p.query, p.second), 1e-9))
            for p in pairs
        ]


def pair_digest(first: str, second: str) -> str:
    """16 hex digits of two responses, whichever is named first."""
    return digest(sorted((first, second)))


class HumanJudge:
    """Labels that people gave, from a JSONL file; a pair without a label is unparseable.

    A label holds both responses and a verdict, or the digest of both and the preferred response::

        {"id": "q1", "first": "Nectar.", "second": "Bricks.", "verdict": "first"}
        {"id": "q1", "pair": "0123456789abcdef", "preferred": "Nectar."}

    It counts for exactly these two texts: a label never judges other responses to its query.
    ``"verdict": null`` is a pair that nobody has labelled yet.

    Raises:
        DataError: a line is not a label, or two labels of a pair contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = f"human:{path}"

    @cached_property
    def _labels(self) -> dict[tuple[str, str], str]:
        """(query id, pair digest) → digest of the preferred response, or ``tie``."""
        labels: dict[tuple[str, str], str] = {}
        for number, value in read_jsonl(self.path):
            key, said = _label(value, f"{self.path}, line {number}")
            if said is None:
                continue
            if labels.setdefault(key, said) != said:
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
        said = self._labels.get((pair.query.id, pair_digest(pair.first, pair.second)))
        if said is None:
            return Judgement(Verdict.UNPARSEABLE, reason="no_label")
        verdicts = {
            "tie": Verdict.TIE,
            digest(pair.first): Verdict.FIRST,
            digest(pair.second): Verdict.SECOND,
        }
        if said not in verdicts:
            raise DataError(
                f"{self.path}: the preferred response to {pair.query.id} is neither of the two "
                "that its pair stands for."
            )
        return Judgement(verdicts[said])


def _label(value: dict[str, Any], where: str) -> tuple[tuple[str, str], str | None]:
    """The key of a label, and the preferred text's digest, ``tie``, or None if it is open."""
    identity, verdict = value.get("id"), value.get("verdict")
    first, second = value.get("first"), value.get("second")
    if not isinstance(identity, str | int):
        raise DataError(f"{where}: a label needs the id of its query.")
    if isinstance(first, str) and isinstance(second, str):
        key = (str(identity), pair_digest(first, second))
        answers = {
            "first": digest(first),
            "second": digest(second),
            "tie": "tie",
            None: None,
        }
        if verdict is None or (isinstance(verdict, str) and verdict in answers):
            if verdict in ("first", "second") and first == second:
                raise DataError(f"{where} prefers one of two equal responses.")
            return key, answers[verdict]
        raise DataError(f"{where}: the verdict must be first, second, tie or null: {verdict!r}.")
    pair, preferred = value.get("pair"), value.get("preferred")
    if not isinstance(pair, str):
        raise DataError(
            f"{where} is no label: give first, second and verdict, or pair (selfsteer's digest of "
            "both responses) and preferred."
        )
    key = (str(identity), pair)
    if isinstance(preferred, str):
        return key, digest(preferred)
    if verdict in ("tie", None):
        return key, verdict
    raise DataError(f"{where}: a label by pair needs the preferred response, or a verdict tie.")


def judge_inputs(settings: JudgeConfig | None) -> Any:
    """What a judge's verdicts depend on, for the fingerprint of a stage.

    Raises:
        ConfigError: the labels are not there.
    """
    if settings is None or settings.kind == "oracle":
        return settings and "oracle"
    if settings.kind == "human":
        path = _labels_path(settings)
        return {"kind": "human", "labels": digest_path(path)}
    assert settings.model is not None
    found = settings.model_dump(exclude={"model", "path", "engine"})
    if settings.engine.kind != "transformers":
        found["engine"] = settings.asked.identity
    return {**found, "model": model_digest(judge_source(settings))}


def judge_source(settings: JudgeConfig) -> str:
    """Folder, hub id or server's name of a judge's model."""
    assert settings.model is not None
    return settings.model if settings.engine.base_url else resolve_path(settings.model)


def _labels_path(settings: JudgeConfig) -> Path:
    assert settings.path is not None
    path = Path(resolve_path(settings.path))
    if not path.is_file():
        raise ConfigError(f"judge.path: there is no file {path}; give the labels' JSONL file.")
    return path


def load_judge(settings: JudgeConfig | None, folder: Path | None = None) -> Judge | None:
    """The judge that a recipe names; its model is loaded when it is first asked something new.

    Args:
        settings: None is nobody.
        folder: where the answers of judges that cost something are kept and found again, by
            content; None keeps them in memory.
    """
    if settings is None:
        return None
    if settings.kind == "oracle":
        return OracleJudge()
    if settings.kind == "human":
        return HumanJudge(_labels_path(settings))
    if settings.kind == "chat":
        from selfsteer.judges.chat import chat_judge

        return chat_judge(settings, folder)
    from selfsteer.judges.reward import RewardJudge

    return RewardJudge(settings, folder)


def load_judges(settings: Iterable[JudgeConfig]) -> list[Judge]:
    """`load_judge` of several, without a folder."""
    return [judge for s in settings if (judge := load_judge(s)) is not None]


def accuracy(verdicts: Iterable[Verdict]) -> float | None:
    """(wins + ½·(ties + inconsistent)) / judged, where FIRST is a win.

    ``unparseable`` verdicts are not in the denominator. None where nothing was judged.
    """
    count = Counter(verdicts)
    judged = sum(count.values()) - count[Verdict.UNPARSEABLE]
    if judged == 0:
        return None
    half = count[Verdict.TIE] + count[Verdict.INCONSISTENT]
    return (count[Verdict.FIRST] + 0.5 * half) / judged


def verdict_counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each verdict was given, all classes named."""
    count = Counter(verdicts)
    return {v.value: count[v] for v in Verdict}


def combine(shown: tuple[Verdict, Verdict]) -> Verdict:
    """One verdict from both orders; each is FIRST where the response *shown* first won.

    A verdict that does not hold in both orders is INCONSISTENT, a tie in one of them included.
    """
    if Verdict.UNPARSEABLE in shown:
        return Verdict.UNPARSEABLE
    swapped = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST}
    there, back = shown[0], swapped.get(shown[1], shown[1])
    return there if there is back else Verdict.INCONSISTENT
