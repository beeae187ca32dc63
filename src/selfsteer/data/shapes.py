"""One record in each shape: how it is known, how it is read, and how ours is written in it.

Nothing here touches a file. What a shape cannot say is counted by `selfsteer.formats.export`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfsteer.data.records import Message, Preference, Principles, Query, Triple
from selfsteer.errors import DataError
from selfsteer.principles.contexts import context_messages


class Unusable(DataError):
    """A record that is well formed and still cannot become one of ours; ``reason`` is counted."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Half:
    """One labelled answer, half a preference: TRL's unpaired record."""

    id: str
    prompt: tuple[Message, ...]
    text: str
    label: bool


@dataclass(frozen=True)
class Shape:
    """A kind of record: its name in a message, how it is known, its reader.

    ``reads`` are the keys whose meaning the reader takes over or that repeat others; a key that is
    neither one of them nor in the result's ``extra`` is lost.
    """

    title: str
    fits: Callable[[Mapping[str, Any]], bool]
    reads: frozenset[str]
    read: Callable[[Mapping[str, Any]], Triple | Preference | Query | Half]


# -- the authors' release, and Alpaca's ranking form, from which it has grown ---------------------


def read_release(record: Mapping[str, Any]) -> Triple:
    """A record of the authors' release; see `selfsteer.formats.read_triples`."""
    rest = dict(record)
    query = _alpaca_query(rest)
    responses = {
        "good": _response(rest.pop("chosen"), "chosen"),
        "bad": _response(rest.pop("rejected"), "rejected"),
    }
    raw = rest.pop("raw", None)
    if raw is not None and (plain := _response(raw, "raw")):
        responses = {"plain": plain, **responses}
    system = query.messages[0].content if query.messages[0].role == "system" else ""
    principles = _release_principles(rest, system)
    extra = {k: v for k, v in rest.items() if k not in ("messages", "finish_reasons")}
    return Triple(query.id, query.messages, principles, responses, extra=extra)


def write_release(triple: Triple) -> dict[str, Any]:
    """A triple with a good and a bad response as the release has it."""
    systems = {
        context: ""
        if triple.principles is None
        else context_messages(triple.messages, triple.principles, context)[0].content
        for context in ("good", "bad")
    }
    return {
        "idx": triple.id,
        **_alpaca(triple.messages),
        "p_system": systems["good"],
        "n_system": systems["bad"],
        "chosen": triple.responses["good"],
        "rejected": triple.responses["bad"],
        "raw": triple.responses.get("plain", ""),
    }


def read_alpaca(record: Mapping[str, Any]) -> Preference:
    """LLaMA-Factory's ranking form of an Alpaca record."""
    rest = dict(record)
    query = _alpaca_query(rest)
    chosen, rejected = (_response(rest.pop(name), name) for name in ("chosen", "rejected"))
    return Preference(query.id, query.messages, chosen, rejected, extra=_foreign(rest))


def write_alpaca(preference: Preference) -> dict[str, Any]:
    """A preference for LLaMA-Factory's ``formatting: alpaca``."""
    return {
        "id": preference.id,
        **_alpaca(preference.prompt),
        "chosen": preference.chosen,
        "rejected": preference.rejected,
    }


def _alpaca_query(rest: dict[str, Any]) -> Query:
    """Takes the conversation and the id out of an Alpaca record."""
    asked = [_text_or_empty(rest.pop(key, None), key) for key in ("instruction", "input")]
    turns: list[Message] = []
    if system := _text_or_empty(rest.pop("system", None), "system"):
        turns.append(Message("system", system))
    history = rest.pop("history", None) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or [type(t) for t in pair] != [str, str]:
            raise DataError(
                f"history must be a list of [user, assistant] pairs, found {short(pair)}"
            )
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    turns.append(Message("user", "\n".join(filter(None, asked))))
    identity = rest.pop("id", None)
    if identity is None:
        identity = rest.pop("idx", None)
    return Query.from_dict({"id": identity, "messages": turns})


def _alpaca(messages: Sequence[Message]) -> dict[str, Any]:
    """A conversation as Alpaca has it: last user turn, pairs before it, system message."""
    has_system = messages[0].role == "system"
    said = [m.content for m in messages if m.role != "system"]
    return {
        "instruction": said[-1],
        "history": [list(pair) for pair in zip(said[:-1:2], said[1:-1:2], strict=True)],
        "system": messages[0].content if has_system else "",
    }


def _release_principles(rest: dict[str, Any], system: str) -> Principles | None:
    """Takes the guidelines out of a record of the release."""
    found = rest.pop("principles", None)
    entries = found if isinstance(found, list) else []
    names = [entry.get("feature") for entry in entries if isinstance(entry, Mapping)]
    features = tuple(name for name in names if isinstance(name, str))
    texts = {}
    for key in ("p_system", "n_system"):
        whole = _text_or_empty(rest.pop(key, None), key)
        texts[key] = whole
        if system and whole.startswith(system):
            tail = whole[len(system) :]
            if not tail.strip():
                raise DataError(f"{key} holds no guideline beyond the query's own system message")
            # "You are" is no message before "You are kind.": only a whole one is cut off.
            if tail[0].isspace():
                texts[key] = tail.lstrip()
    if not any(texts.values()):
        return None
    if not all(texts.values()):
        raise DataError("p_system and n_system belong together, and one of them is missing")
    return Principles(texts["p_system"], texts["n_system"], features)


# -- TRL -----------------------------------------------------------------------------------------


def read_preference(record: Mapping[str, Any]) -> Preference:
    """TRL's preference with an explicit prompt, a text or a chat."""
    texts = {name: _response(record[name], name) for name in ("chosen", "rejected")}
    reasons = record.get("finish_reasons") or {}
    if not isinstance(reasons, Mapping) or not reasons.keys() <= texts.keys():
        raise DataError(f"finish_reasons are of chosen and rejected, found {short(reasons)}")
    # Parquet has a null where JSON has no key
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    return Preference.from_dict({**record, **texts, "finish_reasons": reasons})


def write_preference(preference: Preference) -> dict[str, Any]:
    """The four columns that every preference has."""
    return replace(preference, finish_reasons={}, extra={}).to_dict()


def write_prompt(preference: Preference) -> dict[str, Any]:
    """TRL's prompt-only record."""
    return {"id": preference.id, "prompt": _dicts(preference.prompt)}


def read_half(record: Mapping[str, Any]) -> Half:
    """One of TRL's unpaired records (KTO): prompt, completion, label."""
    query = Query.from_dict({k: record[k] for k in ("id", "prompt", "system") if k in record})
    label = record["label"]
    if not isinstance(label, bool):
        raise DataError(f"label must be true or false, found {short(label)}")
    return Half(query.id, query.messages, _response(record["completion"], "completion"), label)


def write_halves(preference: Preference) -> list[dict[str, Any]]:
    """The two labelled answers of a preference, the good one first."""
    return [
        {**write_prompt(preference), "completion": [_assistant(text)], "label": label}
        for text, label in ((preference.chosen, True), (preference.rejected, False))
    ]


# -- LLaMA-Factory's other form ------------------------------------------------------------------

_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant"}


def read_sharegpt(record: Mapping[str, Any]) -> Preference:
    """LLaMA-Factory's ranking form of a ShareGPT record."""
    rest = dict(record)
    found = rest.pop("conversations")
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise DataError(f"conversations must be a list of turns, found {short(found)}")
    turns = [_sharegpt_turn(turn) for turn in found]
    texts = []
    for name in ("chosen", "rejected"):
        answer = rest.pop(name)
        turn = _sharegpt_turn(answer) if isinstance(answer, Mapping) else None
        if turn is None or turn["role"] != "assistant":
            raise DataError(f"{name} must be one turn from gpt, found {short(answer)}")
        texts.append(turn["content"])
    query = Query.from_dict(
        {"id": rest.pop("id", None), "messages": turns, "system": rest.pop("system", None)}
    )
    return Preference(query.id, query.messages, texts[0], texts[1], extra=_foreign(rest))


def write_sharegpt(preference: Preference) -> dict[str, Any]:
    """A preference for LLaMA-Factory's ``formatting: sharegpt``."""
    said = [m for m in preference.prompt if m.role != "system"]
    names = {"user": "human", "assistant": "gpt"}
    return {
        "id": preference.id,
        "conversations": [{"from": names[m.role], "value": m.content} for m in said],
        "system": _alpaca(preference.prompt)["system"],
        "chosen": {"from": "gpt", "value": preference.chosen},
        "rejected": {"from": "gpt", "value": preference.rejected},
    }


def _sharegpt_turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or turn.get("from") not in _SHAREGPT:
        raise DataError(f"a turn must be from one of {', '.join(_SHAREGPT)}, found {short(turn)}")
    return {"role": _SHAREGPT[turn["from"]], "content": turn.get("value")}


# -- whole conversations: distilabel, UltraFeedback-binarized, OpenAI ----------------------------


def read_pair(record: Mapping[str, Any]) -> Preference:
    """Two whole conversations that differ in the last answer: distilabel, UltraFeedback-binarized.

    Raises:
        Unusable: ``not_rated_higher`` where the record's own ratings do not put the chosen answer
            above the rejected one, ``prompts_differ`` where the two have not the same prompt.
    """
    answers, prompts = [], []
    for name in ("chosen", "rejected"):
        turns = record[name]
        if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) < 2:
            raise DataError(f"{name} must be a conversation, found {short(turns)}")
        answers.append(_response([turns[-1]], name))
        prompts.append(list(turns[:-1]))
    if prompts[0] != prompts[1]:
        raise Unusable("prompts_differ", "chosen and rejected do not answer the same prompt")
    for chosen, rejected in (
        ("chosen_rating", "rejected_rating"),
        ("score_chosen", "score_rejected"),
    ):
        above, below = record.get(chosen), record.get(rejected)
        rated = all(isinstance(r, int | float) for r in (above, below))
        if rated and not above > below:  # type: ignore[operator]
            raise Unusable("not_rated_higher", f"{chosen} {above} is not above {rejected} {below}")
    identity = record.get("id", record.get("prompt_id"))
    query = Query.from_dict({"id": identity, "messages": prompts[0]})
    rest = {k: v for k, v in record.items() if k not in SHAPES["pair"].reads}
    if record.get("generations", answers) != answers:
        rest["generations"] = record["generations"]
    extra = _foreign(rest)
    return Preference(query.id, query.messages, answers[0], answers[1], extra=extra)


def write_pair(preference: Preference, models: tuple[str, str] | None) -> dict[str, Any]:
    """A preference with the columns of distilabel's FormatChatGenerationDPO.

    Ratings are an order, 1 for the chosen and 0 for the rejected answer; nobody gave points.

    Args:
        preference: what to write.
        models: names of those that wrote the chosen and the rejected answer, if known.
    """
    prompt = _dicts(preference.prompt)
    first = next(m.content for m in preference.prompt if m.role == "user")
    known = models is not None
    out: dict[str, Any] = {
        "id": preference.id,
        "prompt": first,
        "prompt_id": hashlib.sha256(first.encode()).hexdigest(),
        "messages": prompt,
        "generations": [preference.chosen, preference.rejected],
        **({"generation_models": list(models or ())} if known else {}),
        "ratings": [1.0, 0.0],
    }
    for i, (side, text) in enumerate(
        (("chosen", preference.chosen), ("rejected", preference.rejected))
    ):
        out[side] = [*prompt, _assistant(text)]
        if models is not None:
            out[f"{side}_model"] = models[i]
        out[f"{side}_rating"] = out["ratings"][i]
    return out


def read_chat(record: Mapping[str, Any]) -> Triple:
    """A conversation that ends in an answer (OpenAI's chat form): a triple with a good response."""
    rest = dict(record)
    turns = rest.pop("messages")
    query = Query.from_dict({"id": rest.pop("id", None), "messages": turns[:-1]})
    text = _response([turns[-1]], "the last turn")
    return Triple(query.id, query.messages, None, {"good": text}, extra=_foreign(rest))


def write_chat(preference: Preference) -> dict[str, Any]:
    """The chosen conversation, for fine-tuning."""
    return {"messages": [*_dicts(preference.prompt), _assistant(preference.chosen)]}


# -- helpers -------------------------------------------------------------------------------------


def short(value: Any) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _assistant(text: str) -> dict[str, str]:
    return Message("assistant", text).to_dict()


def _dicts(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [m.to_dict() for m in messages]


def _foreign(rest: Mapping[str, Any]) -> dict[str, Any]:
    """Other keys, but for those that our own records would read as theirs."""
    ours = ("messages", "prompt", "system", "principles", "responses", "finish_reasons")
    return {k: v for k, v in rest.items() if k not in ours}


def _text_or_empty(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, found {short(value)}")
    return value


def _response(value: Any, name: str) -> str:
    """A text, or a list of one text or one assistant turn."""
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(found, Mapping) and found.get("role") == "assistant":
        found = found.get("content")
    if not isinstance(found, str):
        raise DataError(f"{name} must be one text or one assistant turn, found {short(value)}")
    return found


# -- which shape ---------------------------------------------------------------------------------

_PAIR = frozenset({"chosen", "rejected"})
_QUERY = frozenset({"prompt", "messages"})
_OWN = _QUERY | {"id", "system", "finish_reasons"}
_ALPACA = _PAIR | {"id", "idx", "instruction", "input", "history", "system"}
_RELEASE = frozenset({"p_system", "n_system", "raw", "principles"})


def _turns(value: Any) -> list[Any]:
    ok = isinstance(value, list) and len(value) > 1 and all(isinstance(t, Mapping) for t in value)
    return value if ok else []


def _has_pair(record: Mapping[str, Any], *more: str) -> bool:
    return record.keys() >= {*_PAIR, *more} and not _turns(record["chosen"])


def _ends_in_answer(record: Mapping[str, Any]) -> bool:
    turns = _turns(record.get("messages"))
    return bool(turns) and turns[-1].get("role") == "assistant"


def _is_bare(record: Mapping[str, Any]) -> bool:
    """Neither a response nor a label: nothing but a query."""
    more = {"responses", "instruction", "conversations", "completion", *_PAIR}
    return not more & record.keys()


SHAPES = {
    "triple": Shape(
        "a triple of a run",
        lambda r: "responses" in r,
        _OWN | {"principles", "responses"},
        lambda r: Triple.from_dict(r),
    ),
    "release": Shape(
        "a record of the SSO release",
        lambda r: _has_pair(r, "instruction") and bool(_RELEASE & r.keys()),
        _ALPACA | _RELEASE,
        read_release,
    ),
    "alpaca": Shape(
        "an Alpaca record with a ranking",
        lambda r: _has_pair(r, "instruction") and not _RELEASE & r.keys(),
        _ALPACA,
        read_alpaca,
    ),
    "sharegpt": Shape(
        "a ShareGPT record with a ranking",
        lambda r: _has_pair(r, "conversations"),
        frozenset({"id", "conversations", "system", "chosen", "rejected"}),
        read_sharegpt,
    ),
    "preference": Shape(
        "a preference", lambda r: _has_pair(r, "prompt"), _OWN | _PAIR, read_preference
    ),
    "pair": Shape(
        "a pair of conversations",
        lambda r: r.keys() >= _PAIR and bool(_turns(r["chosen"])),
        frozenset({"id", "prompt_id", "prompt", "messages", "generations", *_PAIR}),
        read_pair,
    ),
    "unpaired": Shape(
        "a labelled answer",
        lambda r: r.keys() >= {"prompt", "completion", "label"},
        frozenset({"id", "prompt", "system", "completion", "label"}),
        read_half,
    ),
    "chat": Shape(
        "a conversation with its answer",
        lambda r: _is_bare(r) and _ends_in_answer(r),
        frozenset({"id", "messages"}),
        read_chat,
    ),
    "query": Shape(
        "a query",
        lambda r: _is_bare(r) and not _ends_in_answer(r) and not r.keys().isdisjoint(_QUERY),
        _OWN,
        lambda r: Query.from_dict(r),
    ),
}


def shapes_of(record: Mapping[str, Any]) -> list[str]:
    """The shapes that a record has; more than one is no shape."""
    return [name for name, shape in SHAPES.items() if shape.fits(record)]
