"""Rules that a program checks: what a house style asks of an answer, exactly.

A rule is an entry of a ``checks`` list, which a catalogue's feature or a query has::

    checks:
      - words: {max: 60}
      - no_match: "!"
      - starts_with: [Yes, No]

An empty answer keeps no rule.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import override

from selfsteer.data.curate import written_in
from selfsteer.errors import ConfigError, clip
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import SCRIPTS, Section, did_you_mean, holding

#: Seconds that a rule's expression may take on an answer: a data set may bring one without an end.
MATCH_S = 1.0

#: What ``regex`` reads in another way than ``re``: braces that are no count, sets inside sets.
_ODD = re.compile(
    r"\\N\{[^}]*\}|\\.|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<brace>\{(?!\d+\}|\d*,\d*\}))",
    re.DOTALL,
)

#: A list item; group 1 is its marker.
_ITEM = re.compile(r"^[ \t]*([-*+•–]|\d+[.)])[ \t]+\S", re.MULTILINE)
#: What stands between two sentences.
_BREAK = re.compile(r"(?<=[.!?…])[\"'”’)\]*_]*\s+|(?<=[。！？])|\n+")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
        regex.compile(_literal(text))
    except (re.error, regex.error) as e:
        raise ValueError(f"it is not a regular expression ({e})") from None
    return text


def _script(name: str) -> str:
    if name not in SCRIPTS:
        hint = did_you_mean(name.title(), SCRIPTS)
        raise ValueError(f"it is no script; known are {', '.join(SCRIPTS)}.{hint}")
    return name


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Pattern = Annotated[str, AfterValidator(_pattern)]
Script = Annotated[str, AfterValidator(_script)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)]


class Count(Section):
    """How many there may be: ``{min: 2}``, ``{max: 5}`` or both."""

    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)

    @override
    def faults(self) -> Iterator[str]:
        least, most = self.min, self.max
        yield from holding(
            {
                "give min, max or both": least is None and most is None,
                f"min {least} exceeds max {most}": most is not None and (least or 0) > most,
            }
        )

    def holds(self, count: int) -> bool:
        """Whether so many are allowed."""
        return (self.min or 0) <= count and (self.max is None or count <= self.max)


class Items(Count):
    """How many list items there may be, and the marker that each of them must have."""

    marker: Literal["-", "*", "+", "•", "–", "number"] | None = None


class Check(Section):
    """One rule: exactly one of these is given."""

    #: Pieces between white space that hold a letter or a digit.
    words: Count | None = None
    #: Parts that end in . ! ? … before white space, in 。！？, or with their line.
    sentences: Count | None = None
    #: Parts between empty lines.
    paragraphs: Count | None = None
    #: Lines that begin with a list marker, or with a number as ``1.`` or ``1)``.
    bullets: Items | None = None
    #: A Python regular expression that must be found; ``(?i)`` in front ignores case.
    match: Pattern | None = None
    #: A regular expression that must not be found.
    no_match: Pattern | None = None
    #: The whole answer must be valid JSON.
    format: Literal["json"] | None = None
    #: The script of at least half of the letters, as Unicode names it.
    script: Script | None = None
    #: Words or phrases that must all occur as whole words, whatever their case.
    contains: Texts | None = None
    #: Words or phrases of which none may occur.
    lacks: Texts | None = None
    #: Beginnings of which the answer must have one, whatever their case.
    starts_with: Texts | None = None
    #: Endings of which it must have one.
    ends_with: Texts | None = None

    @override
    def faults(self) -> Iterator[str]:
        if len(given := self._given) != 1:
            found = ", ".join(given) or "none"
            yield f"a check has one rule, found {found}; give each rule an entry of its own"

    @property
    def _given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)

    def __str__(self) -> str:
        ((name, wanted),) = self._given.items()
        if isinstance(wanted, dict):
            wanted = ", ".join(f"{key} {value}" for key, value in wanted.items())
        return f"{name}: {wanted if isinstance(wanted, str) else ' | '.join(wanted)}"

    def passes(self, answer: str) -> bool:
        """Whether the answer keeps the rule.

        >>> Check.model_validate({"words": {"max": 3}}).passes("The bee eats nectar.")
        False

        Raises:
            ConfigError: its regular expression takes longer than `MATCH_S`.
        """
        text = answer.strip()
        (name,) = self._given
        try:
            return bool(text) and _PASSES[name](text, getattr(self, name))
        except TimeoutError:
            raise ConfigError(
                f"The rule {clip(str(self), 200)} was not decided within {MATCH_S:g} s on an "
                f"answer of {len(text):,} characters, so it could run for ever. Write it without "
                "a repetition of what is repeated or has alternatives, such as (a|aa)+."
            ) from None


class Checks(Section):
    """The rules of one feature or query."""

    checks: tuple[Check, ...]


def read_checks(value: Any, where: str) -> tuple[Check, ...]:
    """The rules in a ``checks`` list.

    Raises:
        ConfigError: it is none; names ``where``, and the nearest rule.
    """
    return validate(Checks, {"checks": value}, where).checks


def _items(text: str, wanted: Items) -> bool:
    markers = ["number" if m[0].isdigit() else m for m in _ITEM.findall(text)]
    return wanted.holds(len(markers)) and set(markers) <= {wanted.marker or m for m in markers}


def _is_json(text: str, _: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _occurs(phrase: str, text: str) -> bool:
    # only a letter or a digit can be part of a longer word: "!" occurs in "Sweet!"
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", phrase) else ""
    return re.search(f"(?i){before}{re.escape(phrase)}{after}", text) is not None


def _found(pattern: str, text: str) -> bool:
    return regex.search(_literal(pattern), text, timeout=MATCH_S) is not None


def _literal(pattern: str) -> str:
    """A pattern of ``re`` as ``regex`` must have it, which knows more signs."""

    def plain(odd: re.Match[str]) -> str:
        if odd["brace"]:
            return r"\{"
        inside = odd["set"]
        if not inside:
            return odd[0]
        return "[" + re.sub(r"\\.|\[", lambda m: m[0].rjust(2, "\\"), inside[1:], flags=re.DOTALL)

    return _ODD.sub(plain, pattern)


def _spoken(part: str) -> bool:
    return any(map(str.isalnum, part))


_PASSES: Mapping[str, Callable[[str, Any], bool]] = {
    "words": lambda text, n: n.holds(sum(map(_spoken, text.split()))),
    "sentences": lambda text, n: n.holds(sum(map(_spoken, _BREAK.split(text)))),
    "paragraphs": lambda text, n: n.holds(sum(map(_spoken, re.split(r"\n\s*\n", text)))),
    "bullets": _items,
    "match": lambda text, pattern: _found(pattern, text),
    "no_match": lambda text, pattern: not _found(pattern, text),
    "format": _is_json,
    "script": lambda text, name: written_in((name,))(text),
    "contains": lambda text, phrases: all(_occurs(p, text) for p in phrases),
    "lacks": lambda text, phrases: not any(_occurs(p, text) for p in phrases),
    "starts_with": lambda text, texts: text.lower().startswith(tuple(t.lower() for t in texts)),
    "ends_with": lambda text, texts: text.lower().endswith(tuple(t.lower() for t in texts)),
}
