"""What is wrong with a catalogue file: what cannot be used, and what would steer badly."""

import re
from collections.abc import Iterator
from itertools import combinations

import regex

from selfsteer.principles.catalogue import Catalogue, Feature, Finding, read
from selfsteer.principles.writer import MAX_GUIDELINE_CHARS, Outcome, contrast, overlap

#: From this share of common words on, two features ask for the same thing.
SAME_FEATURE = 0.7

#: A guideline that speaks of guidelines is repeated in the response.
_LEAK = re.compile(
    r"(?<!first )\bprinciples?\b|\bguidelines?\b|\bsystem (?:prompt|message)\b"
    r"|\b(?:your|these|the|my) instructions?\b|\breveal\w*[^.]*\b(?:told|asked|instructed)\b",
    re.IGNORECASE,
)
#: In any script, a quotation or a bracket closed after it.
_SENTENCE_END = regex.compile(r"""[\p{Sentence_Terminal}…]["'\p{Pe}\p{Pf}]*$""")
_ADVICE = {
    Outcome.IDENTICAL: "the two are the same; make the bad one ask for the opposite",
    Outcome.NEAR_IDENTICAL: "the two share nearly all words; make the bad one ask for the opposite",
    Outcome.UNBALANCED: "one is more than three times as long as the other; make them alike, or "
    "the responses will differ in length",
}


def lint(text: str) -> list[Finding]:
    """All findings on a catalogue's YAML, in the order of their lines; none: it is clean."""
    catalogue, findings, lines = read(text)
    if catalogue is not None:
        findings = [
            Finding(lines.get(name, 1), f"{name}{key}", problem)
            for name, key, problem in _problems(catalogue)
        ]
    return sorted(findings, key=lambda f: f.line)


def _problems(catalogue: Catalogue) -> Iterator[tuple[str, str, str]]:
    """(feature, its key, what is wrong and what to do)."""
    if not catalogue.closing.strip():
        yield (
            "closing",
            "",
            "is empty, so nothing keeps responses from naming their principle; write a line that "
            "asks not to reveal it",
        )
    for feature in catalogue.features:
        for key, problem in _feature(feature):
            yield feature.name, key, problem
    for a, b in combinations(catalogue.features, 2):
        for problem in _alike(a, b):
            yield b.name, "", problem


def _feature(feature: Feature) -> Iterator[tuple[str, str]]:
    outcome = contrast(feature.good, feature.bad)
    if outcome is not Outcome.OK:
        yield ".bad", f"{outcome}: {_ADVICE[outcome]}"
    if feature.good_adjective.casefold() == feature.bad_adjective.casefold():
        yield ".bad_adjective", "identical: it is the good adjective; write its opposite"
    for name in ("good_adjective", "bad_adjective", "good", "bad"):
        found = getattr(feature, name)
        leak = _LEAK.search(found)
        if leak:
            yield (
                f".{name}",
                (
                    f"leaks: it says {leak[0]!r}, which responses will repeat; say only what a "
                    "response should be like"
                ),
            )
        if name in ("good", "bad") and not _SENTENCE_END.search(found):
            yield f".{name}", "does not end like a sentence, but others may follow; end it with one"
        if len(found) > MAX_GUIDELINE_CHARS:
            yield (
                f".{name}",
                f"too_long: {len(found)} characters, at most {MAX_GUIDELINE_CHARS}; shorten it",
            )


def _alike(a: Feature, b: Feature) -> Iterator[str]:
    for side in ("good", "bad"):
        if overlap(getattr(a, side), getattr(b, side)) >= SAME_FEATURE:
            yield f"its {side} guideline is nearly that of {a.name}; merge the two or reword one"
        adjective = f"{side}_adjective"
        if getattr(a, adjective).casefold() == getattr(b, adjective).casefold():
            yield f"its {side} adjective is that of {a.name}; merge the two or reword one"
