"""Rules that people have written, read from a file, and the prompt that asks for their opposites.

A constitution is plain text with one rule per line, a Markdown list, or JSON Lines with a ``trait``
each, as OpenCharacterTraining has it (arXiv 2511.01689)::

    {"trait": "I am not afraid to be direct and honest.", "questions": ["Am I too old to learn?"]}

A rule stays as it is, word for word. A trait speaks of itself in the first person: the writer turns
it into a rule as well.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from selfsteer.data.curate import ngrams
from selfsteer.data.curate import words as split
from selfsteer.data.jsonl import read_jsonl
from selfsteer.data.records import Dropped, Message
from selfsteer.errors import DataError
from selfsteer.principles.catalogue import MOST_FEATURES, Catalogue, Feature
from selfsteer.principles.writer import MAX_GUIDELINE_CHARS, Outcome, contrast
from selfsteer.recipe.texts import unfit

_ITEM = re.compile(r"^(\s*)(?:[-*+•]|\d+[.)])\s+(?=\S)")
_TRAIT = re.compile(r"\b(?:I|I'm|I'd|I'll|I've|my|me|myself)\b")
_LABEL = re.compile(
    r"^[ \t*#>-]*(good adjective|bad adjective|good|bad|name)(?:[ \t]+rule)?[ \t*]*:[ \t*]*",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSED = re.compile(r"[.!?…][\"'”’)\]]*$")


@dataclass(frozen=True)
class Rule:
    """One rule; ``where`` says on which line it begins."""

    where: str
    text: str

    @property
    def is_trait(self) -> bool:
        """Whether it speaks of itself in the first person."""
        return _TRAIT.search(self.text) is not None

    def to_dict(self) -> dict[str, str]:
        """The JSON form."""
        return {"where": self.where, "text": self.text}


def read_rules(path: Path) -> tuple[list[Rule], list[Dropped]]:
    """The rules of a file, and the lines that are none.

    In a file with list items only these are rules; headings are none anywhere. Dropped are
    ``heading``, ``outside_a_list``, ``no_trait``, ``too_long`` and ``duplicate``.

    Raises:
        DataError: the file cannot be read, or holds no rule, or more than a catalogue can have.
    """
    if wrong := unfit(path):
        raise DataError(f"The rules {path} {wrong}.")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise DataError(f"The rules {path} cannot be read: {reason}.") from None
    found = _of_json(path) if text.lstrip().startswith("{") else _of_text(text)
    rules: list[Rule] = []
    dropped: list[Dropped] = []
    seen: set[str] = set()
    for rule, reason in found:
        if reason is None and len(rule.text) > MAX_GUIDELINE_CHARS:
            reason = "too_long"
        if reason is None and rule.text.casefold() in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(rule.text.casefold())
            rules.append(rule)
        else:
            dropped.append(Dropped(rule.where, reason, rule))
    if not rules:
        raise DataError(
            f"{path} holds no rule. Give one rule per line, a Markdown list, or JSON Lines with "
            'a "trait" each.'
        )
    if len(rules) > MOST_FEATURES:
        raise DataError(
            f"{path} holds {len(rules):,} rules, and a catalogue has at most {MOST_FEATURES:,} "
            "features. Give the file fewer."
        )
    return rules, dropped


def _of_json(path: Path) -> Iterator[tuple[Rule, str | None]]:
    for number, value in read_jsonl(path):
        trait = value.get("trait") if isinstance(value, Mapping) else None
        if isinstance(trait, str) and trait.strip():
            yield Rule(f"line {number}", " ".join(trait.split())), None
        else:
            yield Rule(f"line {number}", str(value)[:200]), "no_trait"


_MARKED = re.compile(
    r"(?<![\w*`])(?:`(?P<code>[^`]+)`|\*\*(?P<strong>\S|\S.*?\S)\*\*|__(?P<bold>\S|\S.*?\S)__)(?![\w*`])"
)


def _of_text(text: str) -> Iterator[tuple[Rule, str | None]]:
    lines = text.splitlines()
    listed = any(map(_ITEM.match, lines))
    parts: list[tuple[int, str, str | None]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            parts.append((number, "", None))
        elif line.startswith("#"):
            parts.append((number, line.lstrip("# "), "heading"))
        elif item := _ITEM.match(line):
            parts.append((number, line[item.end() :], None))
        elif listed and line[0].isspace() and parts and parts[-1][1] and not parts[-1][2]:
            at, begun, _ = parts[-1]  # an item goes on
            parts[-1] = (at, f"{begun} {line.strip()}", None)
        else:
            parts.append((number, line, "outside_a_list" if listed else None))
    for number, part, reason in parts:
        said = " ".join(_unmarked(part).split())
        if said:
            yield Rule(f"line {number}", said), reason


def _unmarked(text: str) -> str:
    """Markdown without the marks around bold words and code; within words they are text.

    >>> _unmarked("**Be** brief, and write `__init__` and snake__names as they are.")
    'Be brief, and write __init__ and snake__names as they are.'
    """
    return _MARKED.sub(lambda m: m["code"] or _unmarked(m["strong"] or m["bold"]), text)


# -- the writer ------------------------------------------------------------------------------------

#: Worked examples, shown as turns of the conversation: rules, then traits.
_RULES = (
    Feature(
        name="Language",
        good_adjective="matching in language",
        bad_adjective="foreign",
        good="Answer in the language of the question.",
        bad="Answer in another language than that of the question.",
    ),
    Feature(
        name="Warmth",
        good_adjective="warm",
        bad_adjective="cold",
        good="Greet the reader warmly before the answer.",
        bad="Dismiss the reader coldly before the answer.",
    ),
)
_TRAITS = (
    (
        "I am curious, and I like to ask people about their work.",
        Feature(
            name="Curiosity",
            good_adjective="curious",
            bad_adjective="incurious",
            good="Show curiosity and ask people about their work.",
            bad="Show boredom and never ask people about their work.",
        ),
    ),
    (
        "When somebody is angry with me, I stay calm and listen.",
        Feature(
            name="Calm",
            good_adjective="calm",
            bad_adjective="irritable",
            good="Stay calm and listen when somebody is angry.",
            bad="Snap back and interrupt when somebody is angry.",
        ),
    ),
)

_SHOWN = (*_RULES, *(feature for _, feature in _TRAITS))
#: Words in a row that an answer does not share with an example by chance.
COPIED = 5
_RUNS = {run for f in _SHOWN for t in (f.good, f.bad) for run in ngrams(split(t), COPIED)}


def rule_prompt(rule: Rule) -> list[Message]:
    """Asks for the opposite of a rule, a name and two adjectives, after worked examples."""
    shown = _TRAITS if rule.is_trait else [(f.good, f) for f in _RULES]
    turns = []
    for text, feature in shown:
        turns += [
            Message("user", _asked(Rule("", text))),
            Message("assistant", rule_answer(feature, with_good=rule.is_trait)),
        ]
    return [*turns, Message("user", _asked(rule))]


def _asked(rule: Rule) -> str:
    given, good = ("Rule", "")
    task = "Below is a rule for the answers of an assistant. Write its opposite, a bad rule that"
    if rule.is_trait:
        given, good = "Trait", "Good: the trait as a rule that tells an assistant what to do\n"
        task = (
            "Below is a trait of an assistant. Turn it into a good rule for its answers, and write "
            "a bad rule that"
        )
    return (
        f"{task} asks for the contrary in that one point and is otherwise alike in structure and "
        "length. Give the point a name of one word, an adjective for answers that keep the good "
        "rule and one for answers that keep the bad rule.\n\n"
        f"{given}: {rule.text}\n\nFormat:\n{good}Bad: rule\nName: word\nGood adjective: word\n"
        "Bad adjective: word"
    )


def rule_answer(feature: Feature, *, with_good: bool) -> str:
    """The answer that `read_feature` reads back."""
    good = f"Good: {feature.good}\n" if with_good else ""
    return (
        f"{good}Bad: {feature.bad}\nName: {feature.name}\n"
        f"Good adjective: {feature.good_adjective}\nBad adjective: {feature.bad_adjective}"
    )


class Unwritten(StrEnum):
    """Why a writer's answer makes no feature, beside the reasons of `Outcome`."""

    FIRST_PERSON = "first_person"
    NO_NAME = "no_name"
    NO_ADJECTIVES = "no_adjectives"


def read_feature(rule: Rule, text: str, finish_reason: str) -> Feature | str:
    """The feature that an answer makes of a rule, or why it makes none.

    Args:
        rule: what was asked about; unless it is a trait, it is the good guideline as it is.
        text: the writer's answer.
        finish_reason: why it stopped; ``length``, or why there is no answer.
    """
    if finish_reason != "stop":
        return str(Outcome.UNFINISHED) if finish_reason == "length" else finish_reason
    found: dict[str, str] = {}
    _, *parts = _LABEL.split(text)
    for label, said in zip(parts[::2], parts[1::2], strict=True):
        said = next(iter(said.strip().splitlines()), "")
        found.setdefault(label.lower(), " ".join(said.split()).strip("* "))
    if not rule.is_trait:
        found["good"] = rule.text
    good, bad = (_sentence(found.get(side, "")) for side in ("good", "bad"))
    if not good or not bad:
        return str(Outcome.ONE_SIDED if good or bad else Outcome.NO_SECTIONS)
    if max(len(good), len(bad)) > MAX_GUIDELINE_CHARS:
        return str(Outcome.TOO_LONG)
    if any(_copied(text) for text in (good, bad) if text != rule.text):
        return str(Outcome.LEAKS_EXAMPLE)
    if (outcome := contrast(good, bad)) is not Outcome.OK:
        return str(outcome)
    if rule.is_trait and any(map(_TRAIT.search, (good, bad))):
        return str(Unwritten.FIRST_PERSON)
    name = found.get("name", "").rstrip(".")
    if not name or len(name.split()) > 3:
        return str(Unwritten.NO_NAME)
    words = [found.get(f"{side} adjective", "").rstrip(".").lower() for side in ("good", "bad")]
    if not all(words) or len(set(words)) < 2 or max(len(w.split()) for w in words) > 4:
        return str(Unwritten.NO_ADJECTIVES)
    first, second = words
    if any(words == [f.good_adjective, f.bad_adjective] for f in _SHOWN):
        return str(Outcome.LEAKS_EXAMPLE)
    return Feature(
        name=name[:1].upper() + name[1:],
        good_adjective=first,
        bad_adjective=second,
        good=good,
        bad=bad,
    )


def _copied(text: str) -> bool:
    """Whether it has a run of words of a worked example."""
    return not _RUNS.isdisjoint(ngrams(split(text), COPIED))


def _sentence(text: str) -> str:
    """The text with an end, as other rules may follow it."""
    return text if not text or _CLOSED.search(text) else f"{text.rstrip(',;:')}."


def catalogue_yaml(features: list[Feature], source: str, domain: str | None) -> str:
    """A catalogue of these features, their names made different where two are equal."""
    named: list[Feature] = []
    taken: set[str] = set()
    for feature in features:
        numbered = chain([feature.name], (f"{feature.name} {n}" for n in count(2)))
        name = next(n for n in numbered if n.casefold() not in taken)
        taken.add(name.casefold())
        named.append(feature.model_copy(update={"name": name}))
    whole = Catalogue(features=tuple(named), domain=domain)
    value: dict[str, Any] = whole.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"# Made from {source}: the bad halves, names and adjectives were written by a model. Read "
        f"them,\n# then: selfsteer principles lint FILE\n{text}"
    )
