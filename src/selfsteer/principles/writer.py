"""Chooses the features of a query and writes its principles p+ and p-.

Two prompts, both asked in the plain user turn of any chat model: "name the core features" and
"write a good and a bad guideline". What a model answers is read strictly; an answer that cannot be
used has a named outcome.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from selfsteer.data.curate import jaccard, ngrams, words
from selfsteer.data.records import Message, Principles, Query
from selfsteer.principles.catalogue import BUILT_IN, Catalogue, load_catalogue
from selfsteer.recipe.sections import PrinciplesConfig

# -- features ------------------------------------------------------------------------------------


def feature_prompt(query: Query, count: int, catalogue: Catalogue = BUILT_IN) -> list[Message]:
    """Asks the model to name the core features of the query."""
    return [
        Message(
            "user",
            f"Name the {count} qualities that matter most in an answer to the query below. "
            f"{_domain(catalogue)}Choose from {', '.join(catalogue.choosable)}. Answer with the "
            f"names only.\n\nQuery: {query.transcript}",
        )
    ]


def feature_answer(features: tuple[str, ...], catalogue: Catalogue = BUILT_IN) -> str:
    """The answer that `parse_features` reads back."""
    return ", ".join(catalogue.ordered(features))


def parse_features(answer: str, catalogue: Catalogue = BUILT_IN) -> tuple[str, ...]:
    """The choosable names in the answer, in the order given; anything else is dropped."""
    known = {name.casefold(): name for name in catalogue.choosable}
    longest_first = sorted(known, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    return tuple(dict.fromkeys(known[w] for w in re.findall(pattern, answer.casefold())))


def complete_features(
    chosen: tuple[str, ...], count: int, rng: random.Random, catalogue: Catalogue = BUILT_IN
) -> tuple[str, ...]:
    """Exactly ``count`` features: surplus cut, missing ones filled at random (SSO v2, §4).

    Args:
        chosen: what the model named, all choosable.
        count: features per query.
        rng: the only source of chance.
        catalogue: its weights say how likely each is drawn; its appended features join beyond the
            count, each with its own probability.
    """
    features = list(chosen[:count])
    others = [f for f in catalogue.choosable if f not in features]
    weights = [catalogue[f].weight for f in others]
    if len(set(weights)) <= 1:  # also the order of chance that the testbed's data was drawn in
        features += rng.sample(others, count - len(features))
    while len(features) < count:
        (drawn,) = rng.choices(range(len(others)), weights)
        features.append(others.pop(drawn))
        weights.pop(drawn)
    appended = catalogue.ordered(tuple(catalogue.appended))  # not in the order they were given
    features += [name for name in appended if rng.random() < catalogue.appended[name]]
    return catalogue.ordered(tuple(features))


# -- the writer's prompt -------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A worked example: a query, the adjectives asked for, and two guidelines for it."""

    query: str
    adjectives: tuple[str, str]
    good: str
    bad: str


#: Shown to a writer on request, the first ones first.
EXAMPLES = (
    Example(
        "How can I get better at remembering names?",
        ("helpful and complete", "unhelpful and incomplete"),
        "Offer several exercises for everyday meetings, say when each of them works best, and try "
        "one out on a sample name.",
        "Mention a single exercise in passing, leave open when it would work, and give the reader "
        "nothing to try out.",
    ),
    Example(
        "Does lightning ever strike the same place twice?",
        ("accurate and logical", "inaccurate and illogical"),
        "Settle the question with what has been measured on tall buildings, and lead from that "
        "evidence to the conclusion.",
        "Settle the question with a figure that nobody has measured, and jump to a conclusion that "
        "it does not support.",
    ),
    Example(
        "Write a short toast for my sister's graduation.",
        ("vivid and friendly", "dull and rude"),
        "Bring in one scene that only a sibling could know, speak to her directly, and close on a "
        "warm wish.",
        "Stay with phrases that would fit anybody, talk past her to the guests, and close on a "
        "belittling remark.",
    ),
)


def principle_prompt(
    query: Query,
    features: tuple[str, ...],
    catalogue: Catalogue = BUILT_IN,
    examples: int = 0,
) -> list[Message]:
    """Asks the model to write a good and a bad guideline for the query.

    Args:
        query: what the guidelines are for.
        features: what they are to be about (v1's way); empty: from the query alone (v2's way).
        catalogue: adjectives of the features, language and domain of the guidelines.
        examples: how many of `EXAMPLES` come before, as turns of the conversation.
    """
    sides = None
    if features:
        sides = tuple(catalogue.adjectives(features, good=good) for good in (True, False))
    turns = []
    for e in EXAMPLES[:examples]:
        asked = _asked(e.query, e.adjectives if features else None, "")
        turns += [Message("user", asked), Message("assistant", principle_answer(e.good, e.bad))]
    notes = _domain(catalogue)
    if catalogue.language != "English":
        notes += f"Write the guidelines in {catalogue.language}. "
    return [*turns, Message("user", _asked(query.transcript, sides, notes))]


def _asked(query: str, adjectives: tuple[str, ...] | None, notes: str) -> str:
    if adjectives:
        wish = (
            f"The good one asks for an answer that is {adjectives[0]}, the bad one for an answer "
            f"that is {adjectives[1]}. "
        )
    else:
        wish = (
            "Think of what tells an excellent answer to it from a poor one: the good guideline "
            "asks for the first, the bad one for the second. "
        )
    return (
        "Write two short guidelines for answering the query below, alike in structure and "
        f"length. {wish}{notes}Do not answer the query.\n\n"
        f"Query: {query}\n\nFormat:\nGood: guideline\nBad: guideline"
    )


def principle_answer(good: str, bad: str) -> str:
    """The answer that `parse_principles` reads back."""
    return f"Good: {good}\nBad: {bad}"


def _domain(catalogue: Catalogue) -> str:
    return f"The domain is {catalogue.domain}. " if catalogue.domain else ""


# -- the writer's answer -------------------------------------------------------------------------


class Outcome(StrEnum):
    """What became of a writer's answer, in the order in which it is looked at."""

    OK = "ok"
    PROMPT_TOO_LONG = "prompt_too_long"
    REQUEST_FAILED = "request_failed"
    UNFINISHED = "unfinished"
    NO_SECTIONS = "no_sections"
    ONE_SIDED = "one_sided"
    IDENTICAL = "identical"
    TOO_LONG = "too_long"
    NEAR_IDENTICAL = "near_identical"
    UNBALANCED = "unbalanced"
    LEAKS_EXAMPLE = "leaks_example"


#: A guideline beyond this many characters is an essay, or an answer to the query.
MAX_GUIDELINE_CHARS = 1200
#: From this share of common words on, two guidelines steer to the same answer.
NEAR_OVERLAP = 0.9
#: Beyond this ratio of characters, what tells the responses apart would be their length.
MAX_LENGTH_RATIO = 3.0
#: So many words in a row do not agree with an example by chance.
LEAK_WORDS = 8

_HEADING = re.compile(
    r"^[ \t*#>-]*(good|bad)(?:[ \t]+(?:guideline|principle))?[ \t*]*:[ \t*]*",
    re.IGNORECASE | re.MULTILINE,
)


def parse_principles(answer: str) -> tuple[Outcome, str, str]:
    """Reads ``Good: …`` and ``Bad: …`` from a writer's answer.

    Returns:
        The outcome and the two guidelines; the texts are empty unless the outcome is OK.
    """
    found: dict[str, str] = {}
    _, *sections = _HEADING.split(answer)
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        found.setdefault(name.lower(), " ".join(text.split()).lstrip("* "))
    good, bad = found.get("good", ""), found.get("bad", "")
    outcome = _first(
        {
            Outcome.NO_SECTIONS: not found,
            Outcome.ONE_SIDED: not good or not bad,
            Outcome.IDENTICAL: good.casefold() == bad.casefold(),
            Outcome.TOO_LONG: max(len(good), len(bad)) > MAX_GUIDELINE_CHARS,
        }
    )
    return (outcome, good, bad) if outcome is Outcome.OK else (outcome, "", "")


def _first(faults: Mapping[Outcome, bool]) -> Outcome:
    """The first fault that applies; OK if none does."""
    return next((fault for fault, applies in faults.items() if applies), Outcome.OK)


def read_answer(text: str, finish_reason: str, examples: int = 0) -> tuple[Outcome, str, str]:
    """`parse_principles`, and whether the two guidelines are contrastive, alike and the writer's.

    Args:
        text: what the writer said.
        finish_reason: why it stopped, as engines name it.
        examples: how many of `EXAMPLES` it had seen.

    Returns:
        The outcome and the two guidelines; the texts are empty unless the outcome is OK.
    """
    missing = (Outcome.PROMPT_TOO_LONG, Outcome.REQUEST_FAILED)
    ended = {name: finish_reason.startswith(name) for name in missing}
    outcome = _first({**ended, Outcome.UNFINISHED: finish_reason == "length"})
    good = bad = ""
    if outcome is Outcome.OK:
        outcome, good, bad = parse_principles(text)
    if outcome is Outcome.OK:
        outcome = contrast(good, bad)
    if outcome is Outcome.OK:
        outcome = _first({Outcome.LEAKS_EXAMPLE: any(_copied(t, examples) for t in (good, bad))})
    return (outcome, good, bad) if outcome is Outcome.OK else (outcome, "", "")


def contrast(good: str, bad: str) -> Outcome:
    """OK, or why two guidelines are no contrastive pair of similar length."""
    shorter, longer = sorted((len(good), len(bad)))
    return _first(
        {
            Outcome.IDENTICAL: words(good) == words(bad),
            Outcome.NEAR_IDENTICAL: overlap(good, bad) >= NEAR_OVERLAP,
            Outcome.UNBALANCED: longer > MAX_LENGTH_RATIO * shorter,
        }
    )


def overlap(a: str, b: str) -> float:
    """Jaccard similarity of two texts' sets of words, 0 to 1.

    >>> overlap("Use few words.", "Use many words.")
    0.5
    """
    return jaccard(set(words(a)), set(words(b)))


def _copied(text: str, examples: int) -> bool:
    shown = (text for e in EXAMPLES[:examples] for text in (e.good, e.bad))
    runs = {run for text in shown for run in ngrams(words(text), LEAK_WORDS)}
    return not runs.isdisjoint(ngrams(words(text), LEAK_WORDS))


# -- principles ----------------------------------------------------------------------------------


def picked(features: tuple[str, ...], catalogue: Catalogue = BUILT_IN) -> Principles:
    """The catalogue's own text for these features."""
    good, bad = (catalogue.guidelines(features, good=good) for good in (True, False))
    return written(features, good, bad, catalogue)


def written(
    features: tuple[str, ...], good: str, bad: str, catalogue: Catalogue = BUILT_IN
) -> Principles:
    """Principles around two guidelines: adjectives sentence, guideline, closing line."""
    return Principles(
        catalogue.principle(features, good, good=True),
        catalogue.principle(features, bad, good=False),
        features,
    )


def specimen(settings: PrinciplesConfig, features: tuple[str, ...] = ()) -> Principles:
    """Principles to show a model's steering with, whatever the query.

    These features' text; without features the recipe's fixed principles, or the text of
    Helpfulness and Accuracy, or of the first two features of a catalogue that lacks them.
    """
    if not features and settings.good is not None and settings.bad is not None:
        return Principles(settings.good, settings.bad)
    catalogue = load_catalogue(settings.catalogue)
    usual = ("Helpfulness", "Accuracy")
    known = set(usual) <= set(catalogue.by_name)
    return picked(features or (usual if known else catalogue.choosable[:2]), catalogue)
