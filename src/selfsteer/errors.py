"""Every error that a user can cause or meet, each with the exit code its verb ends with.

A message is one paragraph: what was found, why it cannot work, what to do.
"""

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

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


def short(value: Any, most: int = 80) -> str:
    """A value as it may stand in a message: at most so many characters."""
    return clip(repr(value), most)


def clip(text: str, most: int = 80) -> str:
    """A text as it may stand in a message without quotes: short, and on one line."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def listed(names: Iterable[Any], most: int = 12) -> str:
    """Names as they may stand in a message: so many of them at most."""
    found = [clip(str(name), 40) for name in islice(names, most + 1)]
    return ", ".join(found[:most]) + " …" * (len(found) > most) or "(none)"


def some(faults: Iterable[str], most: int = 12) -> str:
    """What is wrong with a text: so many of its faults at most."""
    found = list(islice(faults, most + 1))
    return "; ".join(found[:most]) + "; and more" * (len(found) > most)


#: User and password of an address, and what its query calls a secret: in errors of libraries, too.
_IN_ADDRESS = re.compile(
    r"(?<=://)[^\s\"'<>]*(?=@)"
    r"|(?i:(?<=[?&])([\w-]*(?:key|key_id|key-id|token|secret|passw(?:or)?d|pwd|auth|sig|signature"
    r"|credential)=)[^\s&\"'#()\[\]]+)"
)


def without_passwords(text: str) -> str:
    """The text with ``[secret]`` in place of passwords that stand in addresses."""
    return _IN_ADDRESS.sub(r"\1[secret]", text)


class SelfsteerError(Exception):
    """Base of all errors raised on purpose; the CLI prints it without a traceback.

    Its text holds no password that stands in an address.
    """

    exit_code = 3

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_passwords(a) if isinstance(a, str) else a for a in args))


class ConfigError(SelfsteerError, ValueError):
    """A recipe or an argument cannot be honoured."""

    exit_code = 2


class DataError(SelfsteerError, ValueError):
    """A query, triple or preference file cannot be used."""

    exit_code = 2


class RefusedConversation(DataError):
    """A conversation of which the chat template makes no text."""


class ArtifactError(SelfsteerError, RuntimeError):
    """A model, a run folder or the disk is not in the state that the work needs."""


class EngineError(SelfsteerError, RuntimeError):
    """An engine could not answer, or a device is too small for the work."""


class NumericsError(SelfsteerError, ArithmeticError):
    """A model made a number that is not finite, in training, scoring, teaching or sampling."""
