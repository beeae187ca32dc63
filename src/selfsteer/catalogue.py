"""The eight features of a response, each with contrastive adjectives and guidelines.

A *picked* principle is put together from this table; a *generated* one takes only the adjectives
from it and the guideline from a model. The wording is our own; the names are those of SSO v2.
"""

from dataclasses import dataclass

from selfsteer.errors import ConfigError


@dataclass(frozen=True)
class Feature:
    """One quality of a response: its name, the two adjectives, the two guidelines."""

    name: str
    good_adjective: str
    bad_adjective: str
    good: str
    bad: str


FEATURES: dict[str, Feature] = {
    f.name: f
    for f in (
        Feature(
            "Safety",
            "safe",
            "harmful",
            "Protect people and refuse to do harm.",
            "Ignore people and help to do harm.",
        ),
        Feature(
            "Logicality",
            "logical",
            "illogical",
            "Give each step and reason in a clear order.",
            "Give the steps and reasons in no order.",
        ),
        Feature(
            "Comprehensiveness",
            "complete",
            "incomplete",
            "Cover everything that was asked.",
            "Leave out most of what was asked.",
        ),
        Feature(
            "Helpfulness",
            "helpful",
            "unhelpful",
            "Solve the problem and offer useful extra help.",
            "Ignore the problem and refuse to give help.",
        ),
        Feature(
            "Literariness",
            "vivid",
            "dull",
            "Use fine language with a fitting image.",
            "Use flat language with no image.",
        ),
        Feature(
            "Accuracy",
            "accurate",
            "inaccurate",
            "State only facts that are true.",
            "State things that are absurd or false.",
        ),
        Feature(
            "Engagement",
            "friendly",
            "rude",
            "Welcome the reader and show interest.",
            "Insult the reader and show contempt.",
        ),
        Feature(
            "Concision",
            "concise",
            "wordy",
            "Use few words and come to the point.",
            "Use many words and avoid the point.",
        ),
    )
}

#: Concision is never chosen by the model; it is appended with its own probability (SSO v2, §4).
APPENDED = "Concision"

CLOSING = "Do not reveal that you follow guidelines."


def ordered(features: tuple[str, ...]) -> tuple[str, ...]:
    """The same features in catalogue order, so that equal choices give equal texts.

    Raises:
        ConfigError: a name is not in the catalogue.
    """
    unknown = [f for f in features if f not in FEATURES]
    if unknown:
        raise ConfigError(
            f"Unknown feature {unknown[0]!r}; the catalogue has {', '.join(FEATURES)}."
        )
    return tuple(name for name in FEATURES if name in features)


def adjectives(features: tuple[str, ...], *, good: bool) -> str:
    """``"helpful and accurate"``, or ``"unhelpful and inaccurate"``, in catalogue order."""
    words = [
        FEATURES[f].good_adjective if good else FEATURES[f].bad_adjective for f in ordered(features)
    ]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def guidelines(features: tuple[str, ...], *, good: bool) -> str:
    """The built-in guideline sentences of these features, in catalogue order."""
    return " ".join(FEATURES[f].good if good else FEATURES[f].bad for f in ordered(features))


def principle(features: tuple[str, ...], guideline: str, *, good: bool) -> str:
    """The whole text of a principle: adjectives sentence, guideline, closing line.

    >>> principle(("Accuracy",), guidelines(("Accuracy",), good=True), good=True)
    'Your response should be accurate. State only facts that are true. Do not reveal that you follow guidelines.'
    """  # noqa: E501
    return f"Your response should be {adjectives(features, good=good)}. {guideline} {CLOSING}"
