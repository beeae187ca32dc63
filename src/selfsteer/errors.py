"""Every error that a user can cause or meet, each with the exit code its verb ends with.

A message is one paragraph: what was found, why it cannot work, what to do.
"""

from collections.abc import Iterable

#: Records that a message names; a batch is rarely larger.
NAMED = 32


def named(records: Iterable[str]) -> str:
    """Which records an error is about, each once.

    >>> named(["q1", "q2", "q1"])
    'the records q1, q2'
    """
    ids = list(dict.fromkeys(records))
    more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
    return f"the records {', '.join(ids[:NAMED])}{more}"


class SelfsteerError(Exception):
    """Base of all errors raised on purpose; the CLI prints it without a traceback."""

    exit_code = 3


class ConfigError(SelfsteerError, ValueError):
    """A recipe or an argument cannot be honoured."""

    exit_code = 2


class DataError(SelfsteerError, ValueError):
    """A query, triple or preference file cannot be used."""

    exit_code = 2


class ArtifactError(SelfsteerError, RuntimeError):
    """A model, a run folder or the disk is not in the state that the work needs."""


class EngineError(SelfsteerError, RuntimeError):
    """An engine could not answer, or a device is too small for the work."""


class NumericsError(SelfsteerError, ArithmeticError):
    """A model made a number that is not finite, in training, scoring, teaching or sampling."""
