"""Writes a response with a wanted level of each feature; the oracle reads the levels back.

A response is an opener (Engagement), a lead (Concision), the body of its task and a closer
(Helpfulness), each where its feature applies::

    I am glad you asked me! A few plain words will be enough. The capital of France is Paris. Also, people in France speak French.
"""  # noqa: E501

import random
from collections.abc import Callable, Mapping

from selfsteer.testbed import knowledge as k
from selfsteer.testbed.questions import (
    FACTS,
    KIND,
    MEMBERS,
    Question,
    by_size,
    confusable,
    mistaken,
    named,
    stable_number,
)

#: Tasks whose responses end with a closer.
CLOSING_TASKS = ("fact", "steps", "unsafe")

#: Feature: ``good``, ``flaw`` or ``odd``.
Levels = Mapping[str, str]


def respond(question: Question, levels: Levels, rng: random.Random, *, terse: float = 0.0) -> str:
    """A response in which each feature of the question has the given level.

    Args:
        question: what is asked.
        levels: a level for every one of the question's features.
        rng: chooses among wordings of the same level.
        terse: how often a sentence is left out without which the levels are the same.
    """

    def spoken(sentences: list[str]) -> list[str]:
        return [] if terse and rng.random() < terse else sentences

    sentences = []
    if "Engagement" in levels:
        opener = [rng.choice(openers(question.task)[levels["Engagement"]])]
        sentences += spoken(opener) if levels["Engagement"] == "flaw" else opener
    lead = [rng.choice(k.LEADS[levels["Concision"]])]
    sentences += spoken(lead) if levels["Concision"] == "good" else lead
    body = _BODIES[question.task](question, levels, rng)
    if question.task in CLOSING_TASKS and levels["Helpfulness"] == "flaw":
        body = [*body[:-1], *spoken(body[-1:])]
    return " ".join([*sentences, *body])


def openers(task: str) -> Mapping[str, tuple[str, ...]]:
    """The opening sentences that suit a task, by level."""
    return k.COMFORTING_OPENERS if task == "advice" else k.OPENERS


def statement(entity: str, attribute: str, value: str) -> str:
    """A sentence on one fact, such as ``The lion eats meat``."""
    return sentence(k.STATEMENTS[attribute].format(entity=named(entity), value=value))


def sentence(clause: str) -> str:
    """The clause with a capital letter and a full stop."""
    return clause[0].upper() + clause[1:] + "."


def extra_fact(entity: str, asked: str) -> str:
    """The further fact that a helpful answer adds: always the same one."""
    others = [a for a in k.ATTRIBUTES[KIND[entity]] if a not in (asked, "size")]
    attribute = others[stable_number("extra", entity, asked) % len(others)]
    value = FACTS[entity][attribute]
    return f"Also, {k.STATEMENTS[attribute].format(entity=named(entity), value=value)}."


def enumeration(items: list[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def recipe(question: Question) -> tuple[str, str, str, str]:
    """The four steps in their right order."""
    cook, serve = k.DISHES[question.aspect]
    return k.WASH_STEP.format(food=question.entities[0]), k.CUT_STEP, cook, serve


def _value(entity: str, attribute: str, level: str, rng: random.Random) -> str:
    if level == "good":
        return FACTS[entity][attribute]
    if level == "flaw":
        return mistaken(entity, attribute)
    return rng.choice(k.ABSURD_VALUES[attribute])


def _closer(level: str, good: str, rng: random.Random) -> str:
    return good if level == "good" else rng.choice(k.CLOSERS[level])


def _fact(question: Question, levels: Levels, rng: random.Random) -> list[str]:
    entity, asked = question.entities[0], question.aspect
    value = _value(entity, asked, levels["Accuracy"], rng)
    return [
        statement(entity, asked, value),
        _closer(levels["Helpfulness"], extra_fact(entity, asked), rng),
    ]


def _list(question: Question, levels: Levels, rng: random.Random) -> list[str]:
    completeness = levels["Comprehensiveness"]
    missing = {"good": 0, "flaw": 1, "odd": question.count - 1}[completeness]
    items = rng.sample(MEMBERS[question.aspect], question.count - missing)
    if levels["Accuracy"] == "flaw":
        items[-1] = rng.choice(confusable(question.aspect))
    elif levels["Accuracy"] == "odd":
        items[-1] = rng.choice(k.ABSURD_THINGS)
    if completeness == "flaw":
        items.append(k.ITEM_PLACEHOLDER)
    elif completeness == "odd":
        items *= question.count
    return [f"Here are some {question.aspect}: {enumeration(items)}."]


def _steps(question: Question, levels: Levels, rng: random.Random) -> list[str]:
    food = question.entities[0]
    wash, cut, cook, serve = recipe(question)
    if levels["Comprehensiveness"] == "flaw":
        wash = k.VAGUE_STEP
    elif levels["Comprehensiveness"] == "odd":
        wash, cut = (step.format(food=food) for step in k.ABSURD_STEPS)
    steps = {
        "good": (wash, cut, cook, serve),
        "flaw": (wash, cut, serve, cook),
        "odd": (serve, cook, cut, wash),
    }[levels["Logicality"]]
    return [
        *(f"{word}, {step}" for word, step in zip(k.STEP_WORDS, steps, strict=True)),
        _closer(levels["Helpfulness"], k.TIP_CLOSER.format(food=food), rng),
    ]


def _advice(question: Question, levels: Levels, rng: random.Random) -> list[str]:
    tips = {
        "good": k.PROBLEMS[question.aspect],
        "flaw": k.WEAK_TIPS,
        "odd": k.ABSURD_TIPS,
    }[levels["Helpfulness"]]
    said = {
        "good": [*tips],
        "flaw": [*tips[:2], k.TIP_PLACEHOLDER],
        "odd": [tips[0]] * 3,
    }[levels["Comprehensiveness"]]
    return [f"{k.PEOPLE[question.entities[0]]} could {enumeration(said)}."]


def _describe(question: Question, levels: Levels, rng: random.Random) -> list[str]:
    entity = question.entities[0]
    kind, accuracy = KIND[entity], levels["Accuracy"]
    first, second = k.DESCRIBED[kind]
    # An ordinary author gets one fact wrong, not both.
    first_level = "good" if accuracy == "flaw" else accuracy
    styles = {"good": k.SIMILES[kind], **k.STYLES}[levels["Literariness"]]
    return [
        statement(entity, first, _value(entity, first, first_level, rng)),
        statement(entity, second, _value(entity, second, accuracy, rng)),
        rng.choice(styles),
    ]


def _compare(question: Question, levels: Levels, rng: random.Random) -> list[str]:
    bigger, smaller = by_size(*question.entities)
    big, small = FACTS[bigger]["size"], FACTS[smaller]["size"]
    winner, loser, sizes = {
        "good": (bigger, smaller, (big, small)),
        # Believing the wrong one to be bigger means believing the sizes that say so.
        "flaw": (smaller, bigger, (big, small)),
        "odd": (rng.choice(k.ABSURD_THINGS), bigger, (k.ABSURD_SIZE, big)),
    }[levels["Accuracy"]]
    if levels["Logicality"] == "good":
        reason = k.BIGGER_REASON.format(
            winner=winner, winner_size=sizes[0], loser=loser, loser_size=sizes[1]
        )
    else:
        reason = rng.choice(k.COMPARE_REASONS[levels["Logicality"]])
    return [f"{k.BIGGER.format(winner=winner)} {reason}"]


def _unsafe(question: Question, levels: Levels, rng: random.Random) -> list[str]:
    act, thing = question.aspect, question.entities[0]
    safety, logic = levels["Safety"], levels["Logicality"]
    reason = k.SAFETY_REASONS[safety] if logic == "good" else rng.choice(k.UNSAFE_REASONS[logic])
    harmless = k.HARMLESS_CLOSER.format(act=k.ACTS[act][1], thing=thing)
    return [
        f"{k.SAFETY[safety].format(act=act, thing=thing)} {reason}",
        _closer(levels["Helpfulness"], harmless, rng),
    ]


_BODIES: dict[str, Callable[[Question, Levels, random.Random], list[str]]] = {
    "fact": _fact,
    "list": _list,
    "steps": _steps,
    "advice": _advice,
    "describe": _describe,
    "compare": _compare,
    "unsafe": _unsafe,
}
