"""The training examples of the testbed model: what it has seen decides what it can be steered to.

Five kinds: answers in the plain, the good and the bad context, the two tasks of a principle
writer (name features, write guidelines), and documents that state facts. The contexts are made by
the same functions that the pipeline uses. Only questions of the ``train`` split occur.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from selfsteer.data.records import Message, Query, content_id
from selfsteer.principles import catalogue, writer
from selfsteer.principles.contexts import context_messages
from selfsteer.testbed import knowledge as k
from selfsteer.testbed.grammar import respond, statement
from selfsteer.testbed.questions import FACTS, KIND, Question, questions

#: Kind of example: its share.
MIXTURE = {"plain": 0.46, "good": 0.17, "bad": 0.17, "meta": 0.10, "document": 0.10}

#: P(good, flaw, odd) of a feature in training: in the plain context, and where the principle names
#: it or not. Sampling below temperature 1 sharpens them: plain answers get a little worse.
PLAIN_ODDS = (0.46, 0.52, 0.02)
NAMED_ODDS = {"good": (0.78, 0.20, 0.02), "bad": (0.14, 0.26, 0.60)}
OTHER_ODDS = {"good": (0.50, 0.48, 0.02), "bad": (0.40, 0.52, 0.08)}

#: The uneven world: of what the odds say, how much is left of a feature's being good, in every
#: context; each feature of each task has one of these, and what it loses is an ordinary flaw.
UNEVEN_SHARES = (1.0, 0.75, 0.5, 0.35)
#: The uneven world: how often a sentence that adds nothing to the score is left out.
UNEVEN_TERSE = 0.5

#: How often a principle names one applicable feature, all three, or one applicable and one other;
#: otherwise it names two applicable ones.
ONE_FEATURE, THREE_FEATURES, ONE_AND_OTHER = 0.03, 0.03, 0.20

#: How often Concision is appended to the features of a principle.
CONCISION = 0.2
_APPENDING = catalogue.BUILT_IN.appending({"Concision": CONCISION})

#: Entities in a document, and facts on each.
DOCUMENT_ENTITIES, DOCUMENT_FACTS = 4, 2


@dataclass(frozen=True)
class Example:
    """One training sequence; a document has no messages and is learned whole."""

    kind: str
    messages: tuple[Message, ...]
    response: str


def corpus(count: int, seed: int, *, uneven: bool = False) -> Iterator[Example]:
    """Yields training examples; the same arguments always give the same ones.

    Args:
        count: how many.
        seed: of all that is drawn.
        uneven: a harder world on the same questions, in which some features are good less often
            than others in every context, and answers of one task differ in length.
    """
    rng = random.Random(seed)
    by_task: dict[str, list[Question]] = {task: [] for task in k.TASK_FEATURES}
    for question in questions("train"):
        by_task[question.task].append(question)
    for _ in range(count):
        (kind,) = rng.choices(list(MIXTURE), list(MIXTURE.values()))
        # Tasks are equally frequent, however many questions they have.
        question = rng.choice(by_task[rng.choice(list(by_task))])
        if kind == "document":
            yield _document(rng)
        elif kind == "meta":
            yield rng.choice(_META)(question, rng)
        else:
            yield answer_example(question, kind, rng, uneven=uneven)


def as_query(question: Question) -> Query:
    """The question as the pipeline reads it from a query file."""
    messages = (Message("user", question.text),)
    return Query(content_id(messages), messages)


def choosable(question: Question) -> tuple[str, ...]:
    """The features that a principle for this question should name."""
    return tuple(f for f in question.features if f not in catalogue.BUILT_IN.appended)


def principle_features(question: Question, rng: random.Random) -> tuple[str, ...]:
    """What a principle for this question names in training."""
    applicable, draw = choosable(question), rng.random()
    if draw < ONE_FEATURE:
        chosen = rng.sample(applicable, 1)
    elif draw < ONE_FEATURE + THREE_FEATURES:
        chosen = list(applicable)
    elif draw < ONE_FEATURE + THREE_FEATURES + ONE_AND_OTHER:
        others = [f for f in catalogue.BUILT_IN.choosable if f not in applicable]
        chosen = [rng.choice(applicable), rng.choice(others)]
    else:
        chosen = rng.sample(applicable, 2)
    return writer.complete_features(tuple(chosen), len(chosen), rng, _APPENDING)


def draw_levels(
    question: Question,
    context: str,
    named: tuple[str, ...],
    rng: random.Random,
    *,
    uneven: bool = False,
) -> dict[str, str]:
    """A level for each feature of the question, as likely as the context makes it."""
    levels = {}
    for feature in question.features:
        if context == "plain":
            odds = PLAIN_ODDS
        else:
            odds = (NAMED_ODDS if feature in named else OTHER_ODDS)[context]
        if uneven:
            good, flaw, odd = odds
            left = good * share_left(question.task, feature)
            odds = (left, flaw + good - left, odd)
        (levels[feature],) = rng.choices(k.LEVELS, odds)
    return levels


def share_left(task: str, feature: str) -> float:
    """One of `UNEVEN_SHARES`; the features of a task have different ones."""
    place = k.TASK_FEATURES[task].index(feature) + list(k.TASK_FEATURES).index(task)
    return UNEVEN_SHARES[place % len(UNEVEN_SHARES)]


def answer_example(
    question: Question, context: str, rng: random.Random, *, uneven: bool = False
) -> Example:
    """The question in a context, with a response of the quality that the context makes likely."""
    named = () if context == "plain" else principle_features(question, rng)
    principles = writer.picked(named) if named else None
    messages = context_messages(as_query(question).messages, principles, context)
    levels = draw_levels(question, context, named, rng, uneven=uneven)
    terse = UNEVEN_TERSE if uneven else 0.0
    return Example(context, tuple(messages), respond(question, levels, rng, terse=terse))


def _feature_example(question: Question, rng: random.Random) -> Example:
    prompt = writer.feature_prompt(as_query(question), 2)
    chosen = tuple(rng.sample(choosable(question), 2))
    return Example("features", tuple(prompt), writer.feature_answer(chosen))


def _principle_example(question: Question, rng: random.Random) -> Example:
    features = principle_features(question, rng)
    prompt = writer.principle_prompt(as_query(question), features)
    good, bad = (catalogue.BUILT_IN.guidelines(features, good=good) for good in (True, False))
    return Example("principles", tuple(prompt), writer.principle_answer(good, bad))


def _document(rng: random.Random) -> Example:
    """True facts on some entities of a kind, so that knowledge does not rest on answers alone."""
    kind = rng.choice(list(k.ATTRIBUTES))
    sentences = []
    for entity in rng.sample([e for e in FACTS if KIND[e] == kind], DOCUMENT_ENTITIES):
        for attribute in rng.sample(k.ATTRIBUTES[kind], DOCUMENT_FACTS):
            sentences.append(statement(entity, attribute, FACTS[entity][attribute]))
    return Example("document", (), " ".join(sentences))


_META: tuple[Callable[[Question, random.Random], Example], ...] = (
    _feature_example,
    _principle_example,
)
