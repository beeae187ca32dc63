"""Secrets: which variables hold them, who may be told, how texts are freed of their values."""

import ipaddress
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from selfsteer.errors import clip

#: Variable with headers that OpenAI's client adds to each request, one a line; they may hold keys.
HEADERS = "OPENAI_CUSTOM_HEADERS"

#: Variables with keys of hosted servers: the protocol's own, and each ``api_key_env`` that this
#: process has read, whichever section names it. A launched server gets only those of `HUB_TOKENS`.
KEYS = {"OPENAI_API_KEY", "OPENAI_ADMIN_KEY", HEADERS}

#: Variables that a launched server may need to fetch its model.
HUB_TOKENS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})

#: How variables are called whose values are secrets.
SECRET_NAME = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)

#: Names of settings that are secrets: ``api_key`` and ``hf_token``, not ``eos_token`` or ``keys``.
SETTING = re.compile(
    r"(.*[^a-z])?((api|auth|access|hf|private|secret|session)[-_]?(key|token)"
    r"|secret|password|passwd|authorization|credentials?)|key|token|bearer",
    re.IGNORECASE,
)

#: How a command gets a secret: as an option, or as a variable of ``env``.
IN_COMMAND = re.compile(
    r"(--?|\b)(api|auth|access|hf)[-_]?(key|token|secret)\b|--?(password|secret)"
    r"|(?<!\S)(\w*_)?(key|token|secret|password|passwd|credentials?)=",
    re.IGNORECASE,
)

#: How keys of the hub and of hosted servers look.
LOOK = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|glpat-[\w-]{20,}|AKIA[A-Z0-9]{16}|AIza[\w-]{35})(?![A-Za-z0-9])"
)

#: Shorter values, such as ``true``, would be replaced everywhere.
LEAST = 8


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_command(command: str) -> bool:
    """Whether a secret seems to stand in a command."""
    return bool(IN_COMMAND.search(command) or LOOK.search(command))


def is_variable(name: str) -> bool:
    """Whether this may name a variable of the environment, and is not itself a key."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)) and not LOOK.search(name)


def places(value: Any) -> Iterator[str]:
    """Where in nested settings a secret seems to stand: dotted keys.

    >>> list(places({"headers": {"Authorization": "x"}, "eos_token": "</s>", "stop": ["a"]}))
    ['headers.Authorization']
    """
    inside = value.items() if isinstance(value, Mapping) else enumerate(value)
    for name, one in inside:
        text = clip(str(name))
        if isinstance(one, str) and (SETTING.fullmatch(str(name)) or LOOK.search(one)):
            yield text
        elif isinstance(one, Mapping | list):
            yield from (f"{text}.{place}" for place in places(one))


def values_of(names: Iterable[str]) -> dict[str, str]:
    """Those of the variables that hold a secret: a value of at least `LEAST` characters."""
    found = {name: os.environ.get(name, "").strip() for name in names}
    return {name: value for name, value in found.items() if len(value) >= LEAST}


def named_like_secrets() -> list[str]:
    """Variables of the environment that are named like one."""
    return [name for name in os.environ if SECRET_NAME.search(name)]


def header_values() -> list[str]:
    """The values of `HEADERS`, whole and without what stands in front of a key, as ``Bearer``."""
    lines = os.environ.get(HEADERS, "").split("\n")
    whole = [line.partition(":")[2].strip() for line in lines]
    found = {part for value in whole for part in (value, value.rpartition(" ")[2])}
    return sorted(value for value in found if len(value) >= LEAST)


@contextmanager
def without_account() -> Iterator[None]:
    """A block in which no variable of OpenAI's client is set: no organisation, project, header."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ.update(taken)


def spellings(values: Iterable[str]) -> list[str]:
    """How secrets may stand in a text: as they are, in JSON, in an address; the longest first.

    One secret may hold another, so the longest are to be replaced first.
    """
    found = set()
    for value in values:
        quoted = json.dumps(value)[1:-1]  # and PHP writes "\/" for a slash
        found |= {value, quoted, quoted.replace("/", r"\/"), quote(value, safe="", errors="ignore")}
    return sorted(found - {""}, key=lambda text: (-len(text), text))


def without(text: str, spelled: Iterable[str]) -> str:
    """The text with ``[key]`` in place of those; it must be whole, as a part is not found."""
    for form in spelled:
        text = text.replace(form, "[key]")
    return text
