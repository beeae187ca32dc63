"""The questions that can be asked in the tiny world, what they are about, and their splits."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from selfsteer.errors import DataError
from selfsteer.testbed import knowledge as k

#: train: the testbed model; align: queries to align on; tune: choose settings; final: report.
SPLITS = ("train", "align", "tune", "final")

#: Of every ten texts: how many fall into each split.
_SPLIT_OF_TENTH = ("train",) * 4 + ("align",) * 4 + ("tune", "final")

#: Hashed with the text. With this word every subject (each thing to describe, each act on each
#: thing, each problem, category and food) is asked about in training at least once: a subject
#: that never was would be mistaken for another one, and the oracle could not parse the answers.
_SPLIT_WORD = "split 192"

#: Entity: its kind (country, animal or food).
KIND: dict[str, str] = {}
#: Entity: attribute: value.
FACTS: dict[str, dict[str, str]] = {}
for _kind, _table in (("country", k.COUNTRIES), ("animal", k.ANIMALS), ("food", k.FOODS)):
    for _entity, _values in _table.items():
        KIND[_entity] = _kind
        FACTS[_entity] = dict(zip(k.ATTRIBUTES[_kind], _values, strict=True))

#: Attribute: the values that occur, in the order of the tables.
VALUES: dict[str, tuple[str, ...]] = {
    attribute: tuple(dict.fromkeys(f[attribute] for f in FACTS.values() if attribute in f))
    for attributes in k.ATTRIBUTES.values()
    for attribute in attributes
}
#: Category: the entities in it.
MEMBERS: dict[str, tuple[str, ...]] = {
    category: tuple(e for e, f in FACTS.items() if f.get(attribute) == value)
    for category, (attribute, value) in k.CATEGORIES.items()
}


@dataclass(frozen=True)
class Question:
    """One question with what it is about.

    ``entities`` are the things named in it; ``aspect`` is the attribute asked for (fact), the
    category (list), the dish (steps), the problem (advice) or the act (unsafe); ``count`` is the
    number of items asked for (list).
    """

    text: str
    task: str
    entities: tuple[str, ...] = ()
    aspect: str = ""
    count: int = 0

    @cached_property
    def split(self) -> str:
        """The split, by hash of the text alone: it never depends on the other questions."""
        return _SPLIT_OF_TENTH[stable_number(_SPLIT_WORD, self.text) % len(_SPLIT_OF_TENTH)]

    @property
    def features(self) -> tuple[str, ...]:
        """The features that a response to this question is scored on, in catalogue order."""
        return k.TASK_FEATURES[self.task]


def stable_number(*words: str) -> int:
    """A big number that depends on the words only, not on the process."""
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:8], "big")


def named(entity: str) -> str:
    """The entity as it stands within a sentence: ``France``, ``the lion``."""
    return entity if KIND[entity] == "country" else f"the {entity}"


def mistaken(entity: str, attribute: str) -> str:
    """The common misconception about a fact: always the same wrong value."""
    wrong = [v for v in VALUES[attribute] if v != FACTS[entity][attribute]]
    return wrong[stable_number("mistaken", entity, attribute) % len(wrong)]


def confusable(category: str) -> tuple[str, ...]:
    """Three entities of the same kind that are often put into the category by mistake."""
    members = MEMBERS[category]
    others = [e for e in FACTS if KIND[e] == KIND[members[0]] and e not in members]
    start = stable_number("confusable", category)
    return tuple(others[(start + step) % len(others)] for step in (0, 3, 6))


def by_size(first: str, second: str) -> tuple[str, str]:
    """The two animals, the bigger one first."""
    return (first, second) if _rank(first) > _rank(second) else (second, first)


def _rank(animal: str) -> int:
    return k.SIZES.index(FACTS[animal]["size"])


def _all() -> Iterator[Question]:
    """Every question, task by task."""
    yield from (
        Question(template.format(entity=named(entity)), "fact", (entity,), attribute)
        for entity, facts in FACTS.items()
        for attribute in facts
        for template in k.FACT_QUESTIONS.get(attribute, ())
    )
    yield from (
        Question(template.format(count=word, category=category), "list", members, category, count)
        for category, members in MEMBERS.items()
        for count, word in k.NUMBERS.items()
        if count <= len(members)
        for template in k.LIST_QUESTIONS
    )
    yield from (
        Question(template.format(food=food, dish=dish), "steps", (food,), dish)
        for food in k.FOODS
        for dish in k.DISHES
        for template in k.STEPS_QUESTIONS
    )
    clauses = {p: p if p.startswith("I ") else p[0].lower() + p[1:] for p in k.PEOPLE}
    yield from (
        Question(
            template.format(person=person, clause=clause, problem=problem),
            "advice",
            (person,),
            problem,
        )
        for problem in k.PROBLEMS
        for person, clause in clauses.items()
        for template in k.ADVICE_QUESTIONS
    )
    yield from (
        Question(template.format(entity=named(entity)), "describe", (entity,))
        for entity in FACTS
        for template in k.DESCRIBE_QUESTIONS
    )
    yield from (
        Question(template.format(first=first, second=second), "compare", (first, second))
        for first in k.ANIMALS
        for second in k.ANIMALS
        if abs(_rank(first) - _rank(second)) >= k.COMPARE_MIN_RANKS
        for template in k.COMPARE_QUESTIONS
    )
    yield from (
        Question(template.format(act=act, thing=thing), "unsafe", (thing,), act)
        for act, (things, _) in k.ACTS.items()
        for thing in things
        for template in k.UNSAFE_QUESTIONS
    )


@cache
def _by_text() -> dict[str, Question]:
    return {one.text: one for one in _all()}


@cache
def questions(split: str | None = None) -> tuple[Question, ...]:
    """All questions, or those of one split, always in the same order.

    Raises:
        DataError: there is no such split.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"The testbed has the splits {', '.join(SPLITS)}, not {split!r}.")
    return tuple(q for q in _by_text().values() if split in (None, q.split))


def question(text: str) -> Question:
    """The question with exactly this text.

    Raises:
        DataError: the world does not know it.
    """
    try:
        return _by_text()[text]
    except KeyError:
        shown = text if len(text) <= 80 else text[:77] + "…"
        raise DataError(
            f"The testbed does not know the query {shown!r}, so its oracle cannot score a "
            "response to it. Use the testbed's own query files, or another judge."
        ) from None
