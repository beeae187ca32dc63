"""The one reader of other people's rows: what a row asks, what answers it has, which record it is.

A row is read in three steps. `several` turns what only goes by other names, or holds several
questions, into rows of the forms below:

| a row has it if it has | becomes |
|---|---|
| `custom_id` and `body` (a line of OpenAI's batches) | `body`, with that id |
| `instruction` and `instances` (self-instruct) | Alpaca, one row per instance |
| `trait` and `questions` (Open Character) | one `prompt` per question |
| `prompt`, a message with `replies` (Open Assistant) | its text; for `ranked` a pair per question |
| `input`, `output_1`, `output_2` and `label` (LLMBar) | `prompt`, `chosen`, `rejected` |
| `chosen`, a text that begins with `Human:` (hh-rlhf) | two conversations |
| `turns` (MT-Bench) | the first turn as `prompt`, the others as `later_turns` |
| `question`, perhaps with `answer` (GSM8K) | `messages` |

`asked` takes a row's conversation up to the last user turn; each way to write one down is an entry
of `FORMS`, and the first that fits counts:

| form | a row has it if it has | the conversation |
|---|---|---|
| two conversations | `chosen`, a conversation | `chosen` without its last turn |
| ShareGPT | `conversations` | that |
| our own and TRL's | `prompt` (text or chat) or `messages` | that; beside each other: the prompt |
| Alpaca | `instruction` | `history`, then `instruction` with a non-empty `input` on the next line |

A `system` text goes before any of them. `record` adds the answers and makes the record: `chosen`
and `rejected` give a preference (or a triple, where the keys of the authors' release are there),
`completion` and `label` half of one, an answer after the conversation a triple with a good response
only, and nothing a query.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

from selfsteer.data.files import Row, Rows, Unusable
from selfsteer.data.jsonl import dump_line
from selfsteer.data.records import RULES, Preference, Principles, Query, Triple, answer_text
from selfsteer.errors import DataError, listed, short

Record = Triple | Preference | Query

# -- rows that go by other names, or hold several --------------------------------------------------

#: With one of these a row is of a form of its own, and a question beside it is not what is asked.
_CONVERSATIONS = frozenset({"prompt", "messages", "conversations", "instruction", "chosen"})

#: Without these, a question of other people's sets may not make sense.
_NEEDED = frozenset({"context", "choices", "options", "passage", "story", "image", "table"})


def unfolded(rows: Rows, split: Callable[[Row], Sequence[Row]] | None = None) -> Rows:
    """The rows that each row stands for, by `several` unless another way is given."""
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            parts = (split or several)(row)
        except DataError as e:
            yield where, e
            continue
        for number, part in enumerate(parts, 1):
            yield where if len(parts) == 1 else f"{where}, part {number}", part


def several(row: Row) -> Sequence[Row]:
    """The rows, one or more, of a form of `FORMS` that a row stands for.

    Raises:
        Unusable: ``needs_context``, a question whose text stands in another key.
        DataError: it is malformed.
    """
    if isinstance(row.get("prompt"), str):
        return [row]
    given = {k: v for k, v in row.items() if v is not None}
    if isinstance(given.get("body"), Mapping) and "custom_id" in given:
        return [{**given["body"], "id": given["custom_id"]}]
    if given.get("instances") and "instruction" in given:
        return _instances(given)
    if isinstance(given.get("questions"), list) and "trait" in given:
        more = given.pop("additional_questions", None) or []
        if not isinstance(more, list):
            raise DataError(f"additional_questions must be a list, found {short(more)}")
        asked = [*given.pop("questions"), *more]
        return [{**given, "prompt": question} for question in asked] or [row]
    if _is_tree(row):
        return [{"id": given.get("message_tree_id"), "prompt": row["prompt"]["text"]}]
    if given.keys() >= {"input", "output_1", "output_2", "label"}:
        return [_better_of_two(given)]
    kinds, chosen = _CONVERSATIONS & given.keys(), given.get("chosen")
    if kinds == {"chosen"} and isinstance(chosen, str) and _SPOKEN.match(chosen):
        return [{**given, **{k: _dialogue(given.get(k), k) for k in ("chosen", "rejected")}}]
    if kinds:
        return [row]
    if "turns" in given:
        return [_first_turn(given)]
    if "question" in given:
        return [_question(given)]
    return [row]


def _instances(given: dict[str, Any]) -> list[Row]:
    found = given.pop("instances")
    if not isinstance(found, list) or not all(isinstance(x, Mapping) for x in found):
        raise DataError(f"instances must be a list of objects, found {short(found)}")
    names = [given.get("id"), *(f"{given.get('id')}-{n}" for n in range(2, len(found) + 1))]
    ids = names if "id" in given else [None] * len(found)
    return [{**given, **one, "id": i} for one, i in zip(found, ids, strict=True)]


def _better_of_two(given: dict[str, Any]) -> Row:
    prompt, first, second, label = (
        given.pop(k) for k in ("input", "output_1", "output_2", "label")
    )
    if label not in (1, 2):
        raise DataError(f"label must be 1 or 2, the better output, found {short(label)}")
    chosen, rejected = (first, second) if label == 1 else (second, first)
    return {**given, "prompt": prompt, "chosen": chosen, "rejected": rejected}


_SPOKEN = re.compile(r"\s*Human:")
_SPEAKER = re.compile(r"(?<!\s)(\s*+)(Human|Assistant):")


def _dialogue(text: Any, name: str) -> list[dict[str, str]]:
    """The turns of a text of hh-rlhf."""
    if not isinstance(text, str) or not _SPOKEN.match(text):
        raise DataError(f"{name} must be a dialogue that begins with 'Human:', found {short(text)}")
    turns = [m for m in _SPEAKER.finditer(text) if "\n\n" in m[1] or m.start() == 0]
    ends = [*(m.start() for m in turns[1:]), len(text)]
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": speakers[m[2]], "content": text[m.end() : end].strip()}
        for m, end in zip(turns, ends, strict=True)
    ]


def _first_turn(given: dict[str, Any]) -> Row:
    turns = given.pop("turns")
    texts = turns if isinstance(turns, list) else [turns]
    if any(isinstance(t, Mapping) and {"role", "from"} & t.keys() for t in texts):
        return {**given, "messages": texts}
    texts = [t.get("content") if isinstance(t, Mapping) else t for t in texts]
    if not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(f"turns must be a list of texts, found {short(turns)}")
    later = {"later_turns": texts[1:]} if texts[1:] else {}
    return {**given, "prompt": texts[0], **later}


def _question(given: dict[str, Any]) -> Row:
    if needed := sorted(_NEEDED & given.keys()):
        raise Unusable(
            "needs_context",
            f"the question stands beside {', '.join(needed)}, which selfsteer does not know how to "
            "put into a prompt. Write the whole prompt into a column 'prompt'",
        )
    turns = [{"role": "user", "content": given.pop("question")}]
    if isinstance(given.get("answer"), str):
        turns.append({"role": "assistant", "content": given.pop("answer")})
    return {**given, "messages": turns}


def _is_tree(row: Row) -> bool:
    return isinstance(row.get("prompt"), Mapping) and "text" in row["prompt"]


def ranked(row: Row) -> Sequence[Row]:
    """As `several`; of a tree, the best reply over the worst one wherever people ranked them.

    Raises:
        Unusable: ``no_ranked_replies`` in a tree; else as `several`.
    """
    if not _is_tree(row):
        return several(row)
    found: list[Row] = []
    waiting: list[tuple[Mapping[str, Any], list[dict[str, Any]]]] = [(row["prompt"], [])]
    for node, before in waiting:  # grows on the way
        turns = [*before, {"role": node.get("role"), "content": node.get("text")}]
        given = node.get("replies") or []
        if not isinstance(given, list):
            raise DataError(f"replies must be a list, found {short(given)}")
        replies = [r for r in given if isinstance(r, Mapping) and not r.get("deleted")]
        waiting += [(reply, turns) for reply in replies]
        by_rank = {r["rank"]: r.get("text") for r in replies if isinstance(r.get("rank"), int)}
        if node.get("role") == "prompter" and len(by_rank) > 1:
            best, worst = by_rank[min(by_rank)], by_rank[max(by_rank)]
            pair = {"prompt": turns, "chosen": best, "rejected": worst}
            found.append({"id": node.get("message_id"), **pair})
    if not found:
        raise Unusable("no_ranked_replies", "no message of the tree has two replies of other ranks")
    return found


# -- what a row asks -----------------------------------------------------------------------------

_SPEAKERS = {"system": "system", "developer": "system"}
_SPEAKERS |= dict.fromkeys(("human", "user", "prompter"), "user")
_SPEAKERS |= dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant")

#: Turns of programs, in the words of several of them.
_TOOLS = (
    *("tool", "function", "function_call", "tool_call", "tool_response"),
    *("observation", "ipython"),
)

#: Keys of answers that are no turns of the conversation but follow it.
_OWN_ANSWERS = frozenset({"chosen", "rejected", "completion"})

#: Keys of other people's rows; with one of them, `prompt` is not our own.
_ANSWERED = frozenset({"chosen", "rejected", "completions"})


def _is_foreign(row: Row) -> bool:
    """Whether a row with a `prompt` is not our own; UltraChat has `messages` beside it."""
    return bool(_ANSWERED & row.keys()) or {"prompt_id", "messages"} <= row.keys()


def _has_own_answers(row: Row) -> bool:
    given = (row.get(key) for key in _OWN_ANSWERS)
    return any(isinstance(value, str | list | Mapping) and value for value in given)


def _repeats(row: Row, answer: str) -> bool:
    """Whether the preferred answer of a row is its conversation's own last one."""
    found = row.get("chosen", row.get("completion"))
    try:
        return _answer(found, "the answer") == answer
    except (DataError, Unusable):
        return False


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(t, Mapping) for t in value)


def _own_turns(row: Row) -> Any:
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is None:
        return messages
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages is None or not isinstance(turns, list):
        return turns
    if not _is_foreign(row):
        raise DataError(
            f"a query needs exactly one of 'prompt' and 'messages', found the keys {listed(row)}"
        )
    # UltraChat: the conversation goes on after the prompt, and its next turn is the answer; where
    # the row has answers of its own, it is one of them again
    goes_on = _is_conversation(messages) and messages[: len(turns)] == turns
    later = messages[len(turns) :] if goes_on and not _has_own_answers(row) else []
    return [*turns, *takewhile(lambda turn: turn.get("role") == "assistant", later)]


def _alpaca_turns(row: Row) -> list[dict[str, Any]]:
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or [type(t) for t in pair] != [str, str]:
            raise DataError(
                f"history must be a list of [user, assistant] pairs, found {short(pair)}"
            )
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"instruction and input must be texts, found {short(parts)}")
    texts = [*(text for pair in history for text in pair), "\n".join(filter(str.strip, parts))]
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


@dataclass(frozen=True)
class Form:
    """A way to write a conversation down.

    Args:
        title: as it stands in a message; empty for our own.
        fits: whether a row has it; nulls are taken out of the row before.
        turns: the conversation, perhaps with its answer; a turn has ``role`` and ``content``, or
            ``from`` and ``value``.
        reads: the keys that the conversation is read from, or that repeat it.
    """

    title: str
    fits: Callable[[Row], bool]
    turns: Callable[[Row], Any]
    reads: frozenset[str]


PAIRED = Form(
    "two conversations",
    lambda row: _is_conversation(row.get("chosen")),
    lambda row: row["chosen"][:-1],
    frozenset({"chosen", "prompt", "messages"}),
)
SHAREGPT = Form(
    "ShareGPT",
    lambda row: "conversations" in row,
    lambda row: row["conversations"],
    frozenset({"conversations"}),
)
OWN = Form(
    "",
    lambda row: "prompt" in row or isinstance(row.get("messages"), list),
    _own_turns,
    frozenset({"prompt", "messages"}),
)
ALPACA = Form(
    "Alpaca",
    lambda row: "instruction" in row,
    _alpaca_turns,
    frozenset({"instruction", "input", "history", "idx"}),
)
FORMS = (PAIRED, SHAREGPT, OWN, ALPACA)

_EVERYWHERE = frozenset({"id", "prompt_id", "system"})
_ASKED = _EVERYWHERE.union(
    _ANSWERED,
    _OWN_ANSWERS,
    RULES,
    ("tools", "functions", "instances"),
    *(form.reads for form in FORMS),
)


def asked_columns(names: Sequence[str]) -> list[str]:
    """Those columns of a table that `asked` reads; all of them where none holds a conversation."""
    known = _CONVERSATIONS.intersection(names)
    return [name for name in names if name in _ASKED or not known]


class Asked(NamedTuple):
    """The conversation of a row, as a query; the answer after it; and the form that it had.

    Of our own rows the query keeps other keys, but for those that records have a meaning for.
    """

    query: Query
    answer: Any
    form: Form


def asked(row: Row) -> Asked:
    """What a row asks.

    The id is ``id``, else ``prompt_id``, of Alpaca's form else ``idx``, else a hash of the
    messages. An answer after the last user turn is cut off. Two of them are refused, and so is one
    where the row's other answers (`chosen`, `completion` …) follow it.

    Raises:
        Unusable: ``unknown_shape``, ``no_user_turn``, ``turns_do_not_alternate``, ``empty_query``,
            ``has_tools`` or ``not_text``.
        DataError: it is malformed.
    """
    given = {k: v for k, v in row.items() if v is not None}
    form = next((form for form in FORMS if form.fits(given)), None)
    if form is None:
        raise Unusable(
            "unknown_shape",
            f"no known shape of record, its keys are {listed(row)}; give "
            "'prompt' (text or chat) or 'messages' (chat), 'instruction' (Alpaca), or "
            "'conversations' (ShareGPT), or rename a column",
        )
    for key in ("tools", "functions"):
        if given.get(key) not in (None, "", "[]", [], {}):
            raise Unusable("has_tools", f"{key} are offered, which the policy would not see")
    found = form.turns(given)
    if not isinstance(found, list):
        raise DataError(f"a conversation must be a list of turns, found {short(found)}")
    turns = [turn for turn in map(_turn, found) if turn != _NO_SYSTEM]
    end = len(turns)
    while end > 1 and turns[end - 1]["role"] == "assistant":
        end -= 1
    _check_conversation(turns[:end])
    if len(turns) - end > 1:
        raise Unusable("turns_do_not_alternate", "the conversation ends in several answers")
    if end < len(turns) and _has_own_answers(given) and not _repeats(given, turns[end]["content"]):
        raise Unusable("turns_do_not_alternate", "the row's answers follow another answer")
    ours = form is OWN and not _is_foreign(given)
    ids = ("id", "prompt_id", *(("idx",) if form is ALPACA else ()))
    ignored = form.reads | _OURS | (set() if "id" in given else {"prompt_id"})
    more = {k: v for k, v in row.items() if k not in ignored} if ours else {}
    query = Query.from_dict(
        {
            **more,
            "id": next((given[k] for k in ids if k in given), None),
            "messages": turns[:end],
            "system": given.get("system"),
        }
    )
    answer = turns[end]["content"] if end < len(turns) else None
    return Asked(storable(query), answer, form)


#: What an absent system message is written as.
_NO_SYSTEM = {"role": "system", "content": None}


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"a turn must be an object with a role and a content, found {short(turn)}")
    who = turn.get("role") or turn.get("from")
    if who in _TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("has_tools", f"a turn of tools: {short(turn)}")
    if not isinstance(who, str) or who not in _SPEAKERS:
        raise DataError(f"a turn must be from one of {', '.join(_SPEAKERS)}, found {short(turn)}")
    text = turn.get("content") if turn.get("content") is not None else turn.get("value")
    return {"role": _SPEAKERS[who], "content": _joined(text) if isinstance(text, list) else text}


def _joined(parts: Sequence[Any]) -> str:
    """The texts of a content in parts, one per line."""
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    kinds = [part.get("type") for part in parts if isinstance(part, Mapping)]
    others = [kind for kind in kinds if kind not in ("text", "input_text", "output_text")]
    if others or not all(isinstance(text, str) for text in texts):
        raise Unusable("not_text", f"a content that is not text alone: {short(parts)}")
    return "\n".join(texts)


def _check_conversation(turns: Sequence[Mapping[str, Any]]) -> None:
    """Raises Unusable of a conversation that cannot be asked."""
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    last = turns[-1]["content"] if turns else None
    if "user" not in spoken:
        raise Unusable("no_user_turn", "the conversation has no user turn")
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise Unusable("turns_do_not_alternate", "user and assistant do not take turns")
    if isinstance(last, str) and not last.strip():
        raise Unusable("empty_query", "the last user turn is empty")


S = TypeVar("S", bound=Record)


def storable(record: S) -> S:
    """The record; half a surrogate pair, NaN or a date would fail hours later.

    Raises:
        Unusable: ``not_storable``, it cannot be written as a line.
    """
    try:
        dump_line(record).encode()
    except (TypeError, ValueError) as e:
        raise Unusable("not_storable", f"it cannot be stored as UTF-8 JSON: {e}") from None
    return record


# -- which record a row is -----------------------------------------------------------------------

_PAIR = frozenset({"chosen", "rejected"})
_RELEASE = frozenset({"p_system", "n_system", "raw", "principles"})
_HALF = frozenset({"completion", "label"})
#: Pairs of keys where a row's own ratings stand.
_RATINGS = (("chosen_rating", "rejected_rating"), ("score_chosen", "score_rejected"))
#: Keys that our own records would read as theirs.
_OURS = {"messages", "prompt", "system", "principles", "responses", "finish_reasons", "reasoning"}

RELEASE_TITLE = "triple (SSO release)"
HALF_TITLE = "labelled answer"


class Read(NamedTuple):
    """A record, what kind of row it was read from, and the keys that it has no place for."""

    title: str
    record: Record
    lost: frozenset[str] = frozenset()


def record(row: Row, *, release: bool = False) -> Read:
    """The record that a row is; a labelled answer is a triple with one response.

    Args:
        row: of any shape of docs/formats.md.
        release: whether an Alpaca pair is one of the authors' release, of which a record may lack
            the keys that tell.

    Raises:
        Unusable: as `asked`; also ``unknown_shape`` where two conversations stand side by side,
            ``prompts_differ`` and ``not_rated_higher`` of a pair.
        DataError: it is malformed.
    """
    if "responses" in row:
        return Read("triple", storable(Triple.from_dict(row)))
    query, answer, form = asked(row)
    others = {"prompt", "conversations", "instruction"} & row.keys() - form.reads
    if others and form is not PAIRED:
        raise Unusable("unknown_shape", f"more than one kind of record: its keys are {listed(row)}")
    reads = form.reads | _EVERYWHERE
    made: Record
    if row.keys() >= _PAIR:
        reads |= _PAIR
        chosen, rejected = _pair(row, form)
        if row.get("generations") == [chosen, rejected]:
            reads |= {"generations"}
        if form is ALPACA and (release or _RELEASE & row.keys()):
            title, reads = RELEASE_TITLE, reads | _RELEASE
            made = _release(row, query, chosen, rejected)
        else:
            title = f"preference ({form.title})" if form.title else "preference"
            kept = {k: v for k, v in row.items() if k in ("finish_reasons", "reasoning")}
            # a column of this name that others write is one text
            own = {k: v for k, v in kept.items() if form is OWN and not isinstance(v, str)}
            own |= _said_of(row, "chosen", "rejected")
            reads |= own.keys()
            pair = {"chosen": chosen, "rejected": rejected, **own}
            made = Preference.from_dict({"id": query.id, "prompt": query.messages, **pair})
    elif row.keys() >= _HALF:
        title, label = HALF_TITLE, row["label"]
        if not isinstance(label, bool):
            raise DataError(f"label must be true or false, found {short(label)}")
        text = _answer(row["completion"], "completion")
        side = "good" if label else "bad"
        known = _said_of(row, side)
        half = Triple(query.id, query.messages, None, {side: text}, **known)
        return Read(title, storable(half), frozenset(row.keys() - reads - _HALF - known.keys()))
    elif answer is not None or (form is ALPACA and row.get("output")):
        title, reads = "answered query", reads | {"output"}
        text = _answer(row["output"] if answer is None else answer, "the answer")
        known = _said_of(row, "good")
        made = Triple(query.id, query.messages, None, {"good": text}, **known)
        reads |= known.keys()
    else:
        title, made = "query", query
    extra = {k: v for k, v in row.items() if k not in reads | _OURS}
    made = replace(made, extra={**extra, **query.extra} if made is query else extra)
    return Read(title, storable(made), frozenset(row.keys() - reads - made.extra.keys()))


def _said_of(row: Row, *names: str) -> dict[str, Any]:
    """``finish_reasons`` and ``reasoning``, where they are of answers of these names alone."""

    def fits(value: Any) -> bool:
        mapping = isinstance(value, Mapping) and value.keys() <= {*names}
        return mapping and all(isinstance(v, str) for v in value.values())

    return {k: dict(row[k]) for k in ("finish_reasons", "reasoning") if k in row and fits(row[k])}


def _pair(row: Row, form: Form) -> tuple[str, str]:
    """The chosen and the rejected answer, which answer the same prompt and are rated as such."""
    sides = {name: row[name] for name in ("chosen", "rejected")}
    if form is PAIRED and not _is_conversation(sides["rejected"]):
        raise DataError(f"rejected must be a conversation too, found {short(sides['rejected'])}")
    chosen, rejected = (
        _answer(value[-1:] if form is PAIRED else value, name) for name, value in sides.items()
    )
    if form is PAIRED and sides["chosen"][:-1] != sides["rejected"][:-1]:
        raise Unusable("prompts_differ", "chosen and rejected do not answer the same prompt")
    for better, worse in _RATINGS:
        above, below = row.get(better), row.get(worse)
        if isinstance(above, int | float) and isinstance(below, int | float) and not above > below:
            raise Unusable("not_rated_higher", f"{better} {above} is not above {worse} {below}")
    return chosen, rejected


def _answer(value: Any, name: str) -> str:
    """As `answer_text`, of turns as other programs write them too."""
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    return answer_text(_turn(found) if isinstance(found, Mapping) else value, name)


def _release(row: Row, query: Query, chosen: str, rejected: str) -> Triple:
    """A record of the authors' release, whose guidelines are whole system messages."""
    raw = row.get("raw")
    plain = _answer(raw, "raw") if raw is not None else ""
    responses = {**({"plain": plain} if plain else {}), "good": chosen, "bad": rejected}
    first = query.messages[0]
    system = first.content if first.role == "system" else ""
    good, bad = (_guideline(row, key, system) for key in ("p_system", "n_system"))
    principles = None
    if good or bad:
        if not (good and bad):
            raise DataError("p_system and n_system belong together, and one of them is missing")
        entries = row.get("principles")
        found = entries if isinstance(entries, list) else []
        names = [entry.get("feature") for entry in found if isinstance(entry, Mapping)]
        principles = Principles(good, bad, [name for name in names if isinstance(name, str)])
    return Triple(query.id, query.messages, principles, responses)


def _guideline(row: Row, key: str, system: str) -> str:
    """What a system message of the release says beyond the query's own."""
    whole = row.get(key) or ""
    if not isinstance(whole, str):
        raise DataError(f"{key} must be a text, found {short(whole)}")
    if not system or not whole.startswith(system):
        return whole
    tail = whole[len(system) :]
    if not tail.strip():
        raise DataError(f"{key} holds no guideline beyond the query's own system message")
    # "You are" is no message before "You are kind.": only a whole one is cut off.
    return tail.lstrip() if tail[0].isspace() else whole
