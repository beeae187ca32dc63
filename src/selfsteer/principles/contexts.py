"""Plain, good and bad contexts: the messages that a query becomes under a principle.

plain = the query alone; good / bad = the query with p+ / p- as the system message. A query that
already has a system message keeps it, and the principle is appended (SSO v2, §3.1). So is the
system prompt that a chat template gives where there is none, if the principles know it: plain and
steered contexts then differ in the principle alone.
"""

from collections.abc import Sequence

from selfsteer.data.records import Message, Principles

CONTEXTS = ("plain", "good", "bad")

#: What an answer in a steered context is pushed away from where two contexts are contrasted.
OPPOSITE = {"good": "bad", "bad": "good"}


def context_messages(
    messages: Sequence[Message], principles: Principles | None, context: str
) -> list[Message]:
    """The messages of one context.

    Args:
        messages: the conversation that ends in the user turn to be answered.
        principles: may be None only for the plain context.
        context: ``plain``, ``good`` or ``bad``.

    Raises:
        ValueError: an unknown context, or no principles for a steered one.
    """
    if context == "plain":
        return list(messages)
    if context not in CONTEXTS:
        raise ValueError(f"unknown context {context!r}; contexts are {', '.join(CONTEXTS)}")
    if principles is None:
        raise ValueError(f"the {context} context needs principles and the record has none")
    text = principles.good if context == "good" else principles.bad
    given = messages[0].role == "system"
    system = messages[0].content if given else principles.system
    both = f"{system}\n\n{text}" if system else text
    return [Message("system", both), *(messages[1:] if given else messages)]
