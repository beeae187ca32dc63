"""Rules as a judge: the score of an answer is the share of its rules that it keeps.

The way to align to a house style without a model that judges and without labels. Rules come from
three places and add up: the features of a catalogue (they hold for every query), a query's own
``checks``, and its ``instruction_id_list`` with ``kwargs``, which IFEval's own checkers decide::

    {"prompt": "Name three rivers.", "checks": [{"bullets": {"min": 3, "max": 3}}]}
    {"prompt": "Write a poem without commas.", "instruction_id_list": ["punctuation:no_comma"],
     "kwargs": [{}]}
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from io import StringIO
from typing import Any

from selfsteer.data.records import Query
from selfsteer.errors import ConfigError, DataError, short
from selfsteer.judges.base import Judgement, Pair, by_scores
from selfsteer.principles.catalogue import load_catalogue
from selfsteer.principles.rules import Check, read_checks
from selfsteer.recipe.sections import JudgeConfig, did_you_mean


class ChecksJudge:
    """Compares shares of rules kept, so the order cannot matter; equal shares tie.

    Args:
        settings: of kind ``checks``.

    Raises:
        ConfigError: the catalogue cannot be read, or none of its features has checks.
    """

    scale = "share of the checks passed, 0 to 1"

    def __init__(self, settings: JudgeConfig) -> None:
        self.path = settings.path
        self.name = f"checks:{self.path}" if self.path else "checks"
        #: Feature → its rules, for every query.
        self.rules: Mapping[str, tuple[Check, ...]] = {}
        if self.path:
            self.rules = load_catalogue(self.path).rules
            if not self.rules:
                raise ConfigError(
                    f"judge.path: no feature of {self.path} has checks, so there is nothing to "
                    "judge by. Give at least one feature a list of checks (docs/judges.md)."
                )

    def check(self, queries: Sequence[Query]) -> None:
        """See `Judge.check`: every query has a rule, and every rule can be decided.

        Raises:
            ConfigError: a rule is malformed, or what IFEval's checkers need is not installed.
            DataError: queries without any rule; gives their number and the first.
        """
        bare = [q.id for q in queries if not self.results(q, "A test.")]
        if bare:
            raise DataError(
                f"judge checks: {len(bare):,} of {len(queries):,} queries have no rule, the first "
                f"is {short(bare[0])}. Give them 'checks' or 'instruction_id_list', or name a "
                "catalogue whose features have checks: judge: checks:FILE (docs/judges.md)."
            )

    def results(self, query: Query, answer: str) -> list[tuple[str, bool]]:
        """Each rule of the query with whether the answer keeps it.

        A rule is named after its feature, or is itself the name.

        Raises:
            ConfigError: see `check`.
            DataError: an instruction of IFEval is unknown, or its arguments do not fit.
        """
        found = [
            (feature, rule.passes(answer)) for feature, own in self.rules.items() for rule in own
        ]
        if "checks" in query.extra:
            rules = read_checks(query.extra["checks"], f"'checks' of query {query.id}")
            found += [(str(rule), rule.passes(answer)) for rule in rules]
        if "instruction_id_list" in query.extra:
            found += self._ifeval.results(query, answer)
        return found

    def by_rule(
        self, queries: Sequence[Query], answers: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, list[float]]]:
        """Rule → name → how far each answer keeps it: 1 or 0.

        A rule of the catalogue stands after its feature: ``Brevity: words: max 40``. Those
        that the queries bring, which may all differ, are taken together by kind; of several of a
        kind it is the share kept. Queries without the rule are left out.

        Args:
            queries: N of them.
            answers: name → N answers, for example of one model.
        """
        shared = [f"{feature}: {rule}" for feature, own in self.rules.items() for rule in own]
        out: dict[str, dict[str, list[float]]] = {}
        for name, texts in answers.items():
            for query, text in zip(queries, texts, strict=True):
                found = defaultdict[str, list[bool]](list)
                results = self.results(query, text)
                for rule, (_, kept) in zip(shared, results, strict=False):
                    found[rule].append(kept)
                for own, kept in results[len(shared) :]:
                    found[f"{own.partition(': ')[0]} (of queries)"].append(kept)
                for rule, each in found.items():
                    out.setdefault(rule, {}).setdefault(name, []).append(sum(each) / len(each))
        return out

    def score_all(
        self, answers: Sequence[tuple[Query, str]], finished: Sequence[bool] | None = None
    ) -> list[float | None]:
        """See `Scorer.score_all`; None where a query has no rule."""
        return [_share([kept for _, kept in self.results(*answer)]) for answer in answers]

    def compare_all(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge.compare_all`."""
        scores = self.score_all([(p.query, text) for p in pairs for text in (p.first, p.second)])
        return [
            Judgement(by_scores(a, b, 1e-9), reason="no_rule" if a is None else "")
            for a, b in zip(scores[::2], scores[1::2], strict=True)
        ]

    @cached_property
    def _ifeval(self) -> "IFEval":
        return IFEval()


def _share(kept: Sequence[bool]) -> float | None:
    return math.fsum(kept) / len(kept) if kept else None


class IFEval:
    """IFEval's checkers, strict (arXiv 2311.07911), as lm-evaluation-harness has them.

    Raises:
        ConfigError: the harness is not installed.
    """

    def __init__(self) -> None:
        try:
            # it may try to fetch data, and prints how that goes; where it is missing, we say so
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                import langdetect
                from lm_eval.tasks.ifeval import instructions, instructions_registry, utils
        except ImportError:
            raise ConfigError(
                "A query has IFEval's instruction_id_list, and its checkers are not installed: "
                "pip install 'selfsteer[eval]'."
            ) from None
        langdetect.DetectorFactory.seed = 0  # it guesses otherwise with a new seed at each call
        self._known = instructions_registry.INSTRUCTION_DICT
        self._utils, self._instructions = utils, instructions

    def results(self, query: Query, answer: str) -> list[tuple[str, bool]]:
        """Each instruction with whether the answer follows it.

        Raises:
            ConfigError: a checker needs data of nltk that is not there.
            DataError: an instruction is unknown, or its arguments do not fit.
        """
        ids: list[str] = query.extra["instruction_id_list"]
        kwargs: list[dict[str, Any]] = query.extra.get("kwargs") or []
        where = f"query {query.id}: instruction_id_list"
        if not _in_step(ids, kwargs):
            raise DataError(f"{where} must be a list of names, and kwargs a list in step with it.")
        for name, given in zip(ids, kwargs, strict=True):
            if name not in self._known:
                raise DataError(
                    f"{where} has {short(name)}, which is none of IFEval's {len(self._known)} "
                    f"instructions.{did_you_mean(name, self._known)}"
                )
            needed = {*self._known[name](name).get_instruction_args_keys()} - {"prompt"}
            if lacking := sorted(needed - {k for k, v in given.items() if v}):
                raise DataError(
                    f"{where} has {short(name)}, and its kwargs lack {', '.join(lacking)}: the "
                    "checker would draw a value anew for every answer. Give one."
                )
        counts = [_counts_sign(name, given) for name, given in zip(ids, kwargs, strict=True)]
        rest = [n for n, counted in enumerate(counts) if not counted]
        asked = self._utils.InputExample(
            0, [ids[n] for n in rest], query.text, [kwargs[n] for n in rest]
        )
        try:
            with self._without_draws():
                found = self._utils.test_instruction_following_strict(asked, answer)
        except _Draws:
            raise DataError(
                f"{where}: kwargs {short(kwargs)} do not fit {', '.join(ids)}: the checker would "
                "draw a value anew for every answer. Correct them."
            ) from None
        except LookupError as e:
            if isinstance(e, KeyError | IndexError):  # a fault of a checker, not of its data
                raise
            raise ConfigError(
                f"{where}: {', '.join(ids)} counts sentences with data of nltk that is not there. "
                "With a connection: python -m nltk.downloader punkt_tab."
            ) from None
        except (TypeError, ValueError, AttributeError) as e:
            raise DataError(
                f"{where}: kwargs {short(kwargs)} do not fit {', '.join(ids)} ({e})."
            ) from e
        followed = dict(zip(rest, found.follow_instruction_list, strict=True))
        followed |= {n: _has_signs(kwargs[n], answer) for n, own in enumerate(counts) if own}
        return [(name, followed[n]) for n, name in enumerate(ids)]

    @contextmanager
    def _without_draws(self) -> Iterator[None]:
        """Checkers draw where an argument is outside of what they know; here they fail instead."""
        known = self._instructions.random
        self._instructions.random = _NoDraws()
        try:
            yield
        finally:
            self._instructions.random = known


class _Draws(Exception):
    """A checker would draw a value."""


class _NoDraws:
    def __getattr__(self, name: str) -> Any:
        raise _Draws(name)


def _counts_sign(name: str, given: Mapping[str, Any]) -> bool:
    """Whether an instruction counts a sign, in whose place lm-eval counts a letter that it draws.

    The public file has two such, of # and of !.
    """
    match given:
        case {
            "letter": str(sign),
            "let_frequency": int(frequency),
            "let_relation": "less than" | "at least",
        }:
            one = len(sign) == 1 and not "a" <= sign.lower() <= "z"
            return name == "keywords:letter_frequency" and one and frequency > 0
    return False


def _has_signs(given: Mapping[str, Any], answer: str) -> bool:
    """As lm-eval decides it of letters; an empty answer follows nothing."""
    count = answer.lower().count(given["letter"].lower())
    few = count < given["let_frequency"]
    return bool(answer.strip()) and few == (given["let_relation"] == "less than")


def _in_step(ids: Any, kwargs: Any) -> bool:
    return (
        isinstance(ids, list)
        and isinstance(kwargs, list)
        and len(ids) == len(kwargs)
        and all(isinstance(k, Mapping) for k in kwargs)
    )
