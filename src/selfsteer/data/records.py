"""The data types: Query, Principles, Triple, Preference, Verdict; frozen, checked when made.

One record is one JSON object on one line. A triple with everything in it::

    {"id": "q1", "messages": [{"role": "user", "content": "What does the bee eat?"}],
     "principles": {"good": "Your response should be accurate. …", "bad": "…", "features": ["Accuracy"]},
     "responses": {"plain": "Okay. …", "good": "The bee eats nectar.", "bad": "The bee eats bricks."},
     "finish_reasons": {"plain": "stop", "good": "stop", "bad": "stop"}}

Where the recipe keeps the thoughts of models that reason, ``"reasoning": {"good": "<think>…"}`` holds
them by response: thoughts, then response, is what was sampled.

Keys that a record does not know (provenance) are kept in ``extra`` and written back.
"""  # noqa: E501

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Self

from selfsteer.data.jsonl import Record
from selfsteer.errors import DataError, listed, short

#: Raised when the shape of a line changes; part of every stage's fingerprint.
SCHEMA_VERSION = 1

RESPONSES = ("plain", "good", "bad")

#: Keys of a query that say what its answers must keep to; every record made from it has them.
RULES = ("checks", "instruction_id_list", "kwargs")
ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """The chat-template form."""
        return {"role": self.role, "content": self.content}


def parse_messages(value: Any) -> tuple[Message, ...]:
    """Checks a conversation: an optional system message, then user and assistant in turn.

    Raises:
        DataError: not a list of role/content pairs, an unknown role, an empty or misplaced turn,
            or a conversation that does not end in a user turn.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"messages must be a non-empty list of turns, found {short(value)}")
    turns = []
    for turn in value:
        if isinstance(turn, Message):
            turn = turn.to_dict()
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise DataError(f"a turn must have a role and a text content, found {short(turn)}")
        if turn.get("role") not in ROLES:
            raise DataError(
                f"a turn's role must be one of {', '.join(ROLES)}, found {short(turn.get('role'))}"
            )
        if not _encodable(turn["content"]):
            raise DataError("a turn holds half a surrogate pair, which UTF-8 cannot store")
        turns.append(Message(turn["role"], turn["content"]))
    spoken = turns[1:] if turns[0].role == "system" else turns
    if not spoken or spoken[-1].role != "user":
        raise DataError(
            f"a query must end in a user turn, this conversation ends in a turn of the "
            f"{turns[-1].role}; cut the last answer off or drop the line"
        )
    for i, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[i % 2]:
            raise DataError(f"user and assistant must take turns, turn {i + 1} is {turn.role}")
    if not spoken[-1].content.strip():
        raise DataError("the last user turn is empty")
    return tuple(turns)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_extra(out: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance after the record's own keys; it never overwrites one of them."""
    return {**out, **{k: v for k, v in extra.items() if k not in out}}


def rules(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What answers must keep to, among what is known of a record."""
    return {name: extra[name] for name in RULES if name in extra}


def _check_reasons(reasons: Any, names: tuple[str, ...]) -> dict[str, str]:
    if not isinstance(reasons, Mapping | None):
        raise DataError(f"finish_reasons must be an object, found {short(reasons)}")
    given = {name: reason for name, reason in (reasons or {}).items() if reason is not None}
    for name, reason in given.items():
        if name not in names or reason not in ("stop", "length"):
            raise DataError(
                f"finish_reasons give 'stop' or 'length' to {', '.join(names)}, found "
                f"{short(name)}: {short(reason)}"
            )
    return given


def _check_reasoning(reasoning: Any, names: tuple[str, ...]) -> dict[str, str]:
    if not isinstance(reasoning, Mapping):
        raise DataError(f"reasoning must be an object of texts, found {short(reasoning)}")
    for name, text in reasoning.items():
        if name not in names or not isinstance(text, str) or not _encodable(text):
            raise DataError(
                f"reasoning gives UTF-8 texts to {', '.join(names)}, found {short(name)}: "
                f"{short(text)}"
            )
    return dict(reasoning)


def answer_text(value: Any, name: str) -> str:
    """The text of an answer: itself, an assistant turn, or a list of one of these.

    Raises:
        DataError: it is something else; ``name`` says what it was to be.
    """
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(found, Mapping) and found.get("role") == "assistant":
        found = found.get("content")
    if not isinstance(found, str):
        raise DataError(f"{name} must be one text or one assistant turn, found {short(value)}")
    return found


def content_id(messages: Sequence[Message]) -> str:
    """A query's id where none is given: 16 hex digits of the SHA-256 of its messages."""
    text = json.dumps([list(m) for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Query:
    """A prompt, or a conversation that ends with a user turn (x)."""

    id: str
    messages: tuple[Message, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", parse_messages(self.messages))
        if not self.id or not isinstance(self.id, str):
            raise DataError(f"a query's id must be a non-empty string, found {short(self.id)}")

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content

    @property
    def user_text(self) -> str:
        """All user turns, one per line."""
        return "\n".join(m.content for m in self.messages if m.role == "user")

    @property
    def transcript(self) -> str:
        """All turns but a system message, each with its role where there are several."""
        spoken = [m for m in self.messages if m.role != "system"]
        if len(spoken) == 1:
            return spoken[0].content
        return "\n".join(f"{m.role}: {m.content}" for m in spoken)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Reads ``prompt`` (string or chat) or ``messages``, with optional ``id`` and ``system``.

        Raises:
            DataError: neither or both are present, or the conversation is malformed.
        """
        rest = dict(value)
        both = {k: rest.pop(k, None) for k in ("prompt", "messages")}
        given = {k: v for k, v in both.items() if v is not None}
        if len(given) != 1:
            raise DataError(
                f"a query needs exactly one of 'prompt' and 'messages', found the keys "
                f"{listed(value)}"
            )
        (content,) = given.values()
        turns = [{"role": "user", "content": content}] if isinstance(content, str) else content
        messages = parse_messages(turns)
        if system := rest.pop("system", None):
            if not isinstance(system, str):
                raise DataError(f"system must be a string, found {short(system)}")
            if messages[0].role == "system":
                raise DataError("the query has both a 'system' field and a system turn; keep one")
            messages = (Message("system", system), *messages)
        identity = rest.pop("id", None)
        return cls(content_id(messages) if identity is None else str(identity), messages, rest)

    def to_dict(self) -> dict[str, Any]:
        """The JSONL line."""
        out = {"id": self.id, "messages": [m.to_dict() for m in self.messages]}
        return _with_extra(out, self.extra)


def feature_names(value: Any) -> tuple[str, ...]:
    """The features in a record.

    Raises:
        DataError: no list of names.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(name, str) for name in value):
        raise DataError(f"features must be a list of names, found {short(value)}")
    return tuple(value)


@dataclass(frozen=True)
class Principles:
    """A good and a bad guideline (p+, p-), whole texts as they stand in the system message.

    ``system`` is what the policy's chat template says as the system where a query does not: then
    the principle follows it, as it would follow a query's own system message.
    """

    good: str
    bad: str
    features: Sequence[str] = ()
    system: str = ""

    def __post_init__(self) -> None:
        for name in ("good", "bad"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip() or not _encodable(text):
                raise DataError(f"the {name} principle must be a non-empty UTF-8 text")
        if not isinstance(self.system, str):
            raise DataError(f"the principles' system must be a text, found {short(self.system)}")
        object.__setattr__(self, "features", feature_names(self.features))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        own = {"good": self.good, "bad": self.bad, "features": list(self.features)}
        return {**own, "system": self.system} if self.system else own


@dataclass(frozen=True)
class Triple:
    """A query, its principles and the plain, good and bad response (yo, y+, y-).

    Responses that no term needs may be absent; principles too, where only the plain context is
    used. ``finish_reasons`` says per response ``stop`` or ``length``; absent means ``stop``.
    ``reasoning`` has the thoughts that are trained on with a response, with their marks.
    """

    id: str
    messages: tuple[Message, ...]
    principles: Principles | None = None
    responses: Mapping[str, str] = field(default_factory=dict)
    finish_reasons: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    reasoning: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", parse_messages(self.messages))
        for name, text in self.responses.items():
            if name not in RESPONSES:
                raise DataError(f"responses are named {', '.join(RESPONSES)}, found {short(name)}")
            if not isinstance(text, str) or not _encodable(text):
                raise DataError(f"responses/{name} must be a UTF-8 text, found {short(text)}")
        _check_reasons(self.finish_reasons, RESPONSES)
        _check_reasoning(self.reasoning, RESPONSES)

    @property
    def query(self) -> Query:
        """What it answers."""
        return Query(self.id, self.messages, self.extra)

    def finished(self, response: str) -> bool:
        """Whether the response ended by itself, so that it is followed by an end-of-turn token."""
        return self.finish_reasons.get(response, "stop") != "length"

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Reads the JSONL form; raises DataError on anything that is not it."""
        rest = dict(value)
        query = Query.from_dict(
            {k: rest.pop(k) for k in ("id", "messages", "prompt", "system") if k in rest}
        )
        principles = rest.pop("principles", None)
        if principles is not None:
            if not isinstance(principles, Mapping) or not {"good", "bad"} <= set(principles):
                raise DataError(f"principles need 'good' and 'bad', found {short(principles)}")
            principles = Principles(
                principles["good"],
                principles["bad"],
                principles.get("features") or (),
                principles.get("system") or "",
            )
        responses = rest.pop("responses", None) or {}
        reasons = _check_reasons(rest.pop("finish_reasons", None), RESPONSES)
        if not isinstance(responses, Mapping):
            raise DataError(f"responses must be an object, found {short(responses)}")
        responses = {k: v for k, v in responses.items() if v is not None}
        thoughts = _check_reasoning(rest.pop("reasoning", None) or {}, RESPONSES)
        return cls(query.id, query.messages, principles, responses, reasons, rest, thoughts)

    def to_dict(self) -> dict[str, Any]:
        """The JSONL line."""
        out: dict[str, Any] = {"id": self.id, "messages": [m.to_dict() for m in self.messages]}
        if self.principles is not None:
            out["principles"] = self.principles.to_dict()
        if self.responses:
            out["responses"] = dict(self.responses)
        if self.finish_reasons:
            out["finish_reasons"] = dict(self.finish_reasons)
        if self.reasoning:
            out["reasoning"] = dict(self.reasoning)
        return _with_extra(out, self.extra)


@dataclass(frozen=True)
class Preference:
    """The training record (x; chosen ≻ rejected): principles removed, TRL's chat form on disk."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    finish_reasons: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    reasoning: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", parse_messages(self.prompt))

    @property
    def query(self) -> Query:
        """What it answers."""
        return Query(self.id, self.prompt, self.extra)

    def finished(self, side: str) -> bool:
        """Whether ``chosen`` or ``rejected`` ended by itself; see `Triple.finished`."""
        return self.finish_reasons.get(side, "stop") != "length"

    def to_triple(self) -> Triple:
        """The same pair as a triple: chosen is the good response, rejected the bad one."""
        names = {"chosen": "good", "rejected": "bad"}
        return Triple(
            self.id,
            self.prompt,
            None,
            {"good": self.chosen, "bad": self.rejected},
            {names[k]: v for k, v in self.finish_reasons.items()},
            rules(self.extra),
            {names[k]: v for k, v in self.reasoning.items()},
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Reads TRL's conversational preference record with an explicit prompt."""
        rest = dict(value)
        query = Query.from_dict({k: rest.pop(k) for k in ("id", "prompt", "system") if k in rest})
        chosen, rejected = (answer_text(rest.pop(n, None), n) for n in ("chosen", "rejected"))
        reasons = _check_reasons(rest.pop("finish_reasons", None), ("chosen", "rejected"))
        thoughts = _check_reasoning(rest.pop("reasoning", None) or {}, ("chosen", "rejected"))
        return cls(query.id, query.messages, chosen, rejected, reasons, rest, thoughts)

    def to_dict(self) -> dict[str, Any]:
        """The JSONL line."""
        out: dict[str, Any] = {
            "id": self.id,
            "prompt": [m.to_dict() for m in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }
        if self.finish_reasons:
            out["finish_reasons"] = dict(self.finish_reasons)
        if self.reasoning:
            out["reasoning"] = dict(self.reasoning)
        return _with_extra(out, self.extra)


class Dropped(NamedTuple):
    """A record that was left out: its id (or file and line), why, and as much of it as there is."""

    id: str
    reason: str
    record: Record | Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """One line of a stage's ``.dropped.jsonl``."""
        out: dict[str, Any] = {"id": self.id, "reason": self.reason}
        if self.record is not None:
            own = self.record if isinstance(self.record, Mapping) else self.record.to_dict()
            out["record"] = dict(own)
        return out


class Verdict(StrEnum):
    """What a judge that was asked in both orders said of two responses."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    INCONSISTENT = "inconsistent"
    UNPARSEABLE = "unparseable"
