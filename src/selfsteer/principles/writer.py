"""Chooses the features of a query and writes its principles p+ and p-.

Two prompts, both asked in the plain user turn of any chat model: "name the core features" and
"write a good and a bad guideline". What a model answers is parsed strictly; an answer that cannot
be used falls back to the catalogue's text and is counted by reason.
"""

import random
import re
from enum import StrEnum

from selfsteer import catalogue
from selfsteer.records import Message, Principles, Query

#: What the model may choose from: all features but the appended one.
CHOOSABLE = tuple(name for name in catalogue.FEATURES if name != catalogue.APPENDED)


def feature_prompt(query: Query, count: int) -> list[Message]:
    """Asks the model to name the core features of the query."""
    return [
        Message(
            "user",
            f"Name the {count} qualities that matter most in an answer to the query below. "
            f"Choose from {', '.join(CHOOSABLE)}. Answer with the names only.\n\n"
            f"Query: {_shown(query)}",
        )
    ]


def feature_answer(features: tuple[str, ...]) -> str:
    """The answer that `parse_features` reads back."""
    return ", ".join(catalogue.ordered(features))


def parse_features(answer: str) -> tuple[str, ...]:
    """The catalogue names in the answer, in the order given; anything else is dropped."""
    known = {name.lower(): name for name in CHOOSABLE}
    words = re.findall(r"[A-Za-z]+", answer.lower())
    return tuple(dict.fromkeys(known[w] for w in words if w in known))


def complete_features(
    chosen: tuple[str, ...], count: int, concision: float, rng: random.Random
) -> tuple[str, ...]:
    """Exactly ``count`` features: surplus cut, missing ones filled at random (SSO v2, §4).

    Args:
        chosen: what the model named, all choosable.
        count: features per query.
        concision: the probability that Concision is appended beyond the count.
        rng: the only source of chance.
    """
    features = list(chosen[:count])
    features += rng.sample([f for f in CHOOSABLE if f not in features], count - len(features))
    if rng.random() < concision:
        features.append(catalogue.APPENDED)
    return catalogue.ordered(tuple(features))


def principle_prompt(query: Query, features: tuple[str, ...]) -> list[Message]:
    """Asks the model to write a good and a bad guideline for the query."""
    return [
        Message(
            "user",
            "Write two short guidelines for answering the query below, alike in structure and "
            f"length. The good one asks for an answer that is "
            f"{catalogue.adjectives(features, good=True)}, the bad one for an answer that is "
            f"{catalogue.adjectives(features, good=False)}. Do not answer the query.\n\n"
            f"Query: {_shown(query)}\n\nFormat:\nGood: guideline\nBad: guideline",
        )
    ]


def principle_answer(good: str, bad: str) -> str:
    """The answer that `parse_principles` reads back."""
    return f"Good: {good}\nBad: {bad}"


class Outcome(StrEnum):
    """What became of a writer's answer."""

    OK = "ok"
    NO_SECTIONS = "no_sections"
    ONE_SIDED = "one_sided"
    IDENTICAL = "identical"
    TOO_LONG = "too_long"


#: A guideline beyond this many characters is an essay, or an answer to the query.
MAX_GUIDELINE_CHARS = 1200

_SECTION = re.compile(
    r"^[\s*#>-]*(good|bad)(?:\s+(?:guideline|principle))?[\s*]*:[\s*]*(.*?)\s*"
    r"(?=^[\s*#>-]*(?:good|bad)(?:\s+(?:guideline|principle))?[\s*]*:|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)


def parse_principles(answer: str) -> tuple[Outcome, str, str]:
    """Reads ``Good: …`` and ``Bad: …`` from a writer's answer.

    Returns:
        The outcome and the two guidelines; the texts are empty unless the outcome is OK.
    """
    found: dict[str, str] = {}
    for name, text in _SECTION.findall(answer):
        found.setdefault(name.lower(), " ".join(text.split()))
    good, bad = found.get("good", ""), found.get("bad", "")
    if not found:
        outcome = Outcome.NO_SECTIONS
    elif not good or not bad:
        outcome = Outcome.ONE_SIDED
    elif good.casefold() == bad.casefold():
        outcome = Outcome.IDENTICAL
    elif max(len(good), len(bad)) > MAX_GUIDELINE_CHARS:
        outcome = Outcome.TOO_LONG
    else:
        return Outcome.OK, good, bad
    return outcome, "", ""


def picked(features: tuple[str, ...]) -> Principles:
    """The catalogue's own text for these features."""
    return written(
        features,
        catalogue.guidelines(features, good=True),
        catalogue.guidelines(features, good=False),
    )


def written(features: tuple[str, ...], good: str, bad: str) -> Principles:
    """Principles around two guidelines: adjectives sentence, guideline, closing line."""
    return Principles(
        catalogue.principle(features, good, good=True),
        catalogue.principle(features, bad, good=False),
        features,
    )


def _shown(query: Query) -> str:
    spoken = [m for m in query.messages if m.role != "system"]
    if len(spoken) == 1:
        return spoken[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in spoken)
