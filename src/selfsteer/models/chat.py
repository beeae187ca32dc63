"""Messages to ids; the only place that renders chat templates.

A sequence is: chat template of the context's messages with generation prompt, then the response,
then the end-of-turn token, nothing after it. A response that was cut off gets no end-of-turn
token: training on one would teach stopping in mid-sentence.
"""

import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, lru_cache, wraps
from itertools import pairwise
from math import prod
from operator import mod, mul
from os.path import commonprefix
from time import thread_time
from types import BuiltinMethodType, MethodType
from typing import Any, NamedTuple

from selfsteer.data.records import Message, Triple
from selfsteer.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    RefusedConversation,
    short,
)
from selfsteer.models.reasoning import MARKS, answer_at, bare_thoughts, opened, split
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import did_you_mean

_PROBE = "Probe of the template"
_HI = Message("user", "Hi")

#: Text of the turns that a template must show whole; the number of the turn is put after it.
_WHOLE = "This is said to see whether the template shows it. " * 8

#: Variables of a template that no setting gives.
_OWN = {"messages", "add_generation_prompt", "tools", "documents"}

#: Steps of a template on a short conversation, at most; the longest templates need 6,000. And
#: seconds of the processor: they take milliseconds.
STEPS, SECONDS = 200_000, 10.0

#: One of these marks where a control token in a text is taken apart: noncharacters of Unicode, and
#: characters for private use where a text has all of those.
_MARKS = [chr(i) for i in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF4000))]

#: Environment variable with the day that templates write as today's, while a run works.
DAY = "SELFSTEER_DAY"


def today() -> str:
    """The day that templates write, such as 2026-11-29: of a run, that on which it started."""
    return os.environ.get(DAY) or str(date.today())


@dataclass(frozen=True)
class EncodedSequence:
    """Token ids of one context and one response, end-of-turn token included where it ended."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    #: Id of the record that it was made of, which errors name; equal ids of tokens stay equal.
    record: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Said(NamedTuple):
    """What sampled tokens say, and what training on it as text would change.

    ``reasoning`` has its marks and the white space before the answer, ``text`` is stripped;
    ``retokenised``: the text makes other tokens than were sampled; ``special_tokens``: the answer
    held some, which its text does not show.
    """

    reasoning: str
    text: str
    retokenised: bool
    special_tokens: bool


class ChatFormat:
    """A tokenizer and its chat template.

    Args:
        tokenizer: with a chat template.
        source: what messages call the model.
        kwargs: variables of the template that every rendering gets, such as ``enable_thinking``.
        day: what the template writes as today's date, such as 2026-11-29; None: `today`.
        stops: the ids that end an answer by the checkpoint's configuration.

    Raises:
        ArtifactError: the tokenizer has no chat template, the template fails, does not end or
            leaves out a turn of a conversation that it takes, or no token ends a turn.
        ConfigError: the template reads no such variable.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str = "the model",
        kwargs: Mapping[str, Any] | None = None,
        *,
        day: str | None = None,
        stops: Callable[[], Collection[int]] = tuple,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ArtifactError(
                f"{source} has no chat template, so a conversation cannot be turned into tokens. "
                "Use a chat or instruction-tuned checkpoint, or put a chat_template.jinja into "
                "its folder."
            )
        self.tokenizer, self.source, self._stops = tokenizer, source, stops
        self.kwargs, self.day = dict(kwargs or {}), day or today()
        self._cache: dict[tuple[tuple[Message, ...], bool], tuple[int, ...]] = {}
        self._ids_seen: dict[int, int] = {}
        try:
            self._compile()
        except Exception as e:  # not only a TemplateSyntaxError: RecursionError, for one
            raise self._broken("cannot be read", e) from e
        self._check_variables()
        self._takes_parts = False
        self._tried([_HI])
        self._takes_parts = self._lost("user") != []  # some vision models' list of parts
        if self._takes_parts and self._lost("user") != []:
            raise ArtifactError(
                f"The chat template of {source} drops what the user says, as text and as a list "
                "of parts. Correct its chat_template.jinja."
            )
        self._check_turns()

    def _broken(self, what: str, error: Exception) -> ArtifactError:
        said = str(error).rstrip(".")
        return ArtifactError(
            f"The chat template of {self.source} {what}: {type(error).__name__}: {said}. Correct "
            "its chat_template.jinja."
        )

    def _compile(self) -> None:
        self._text = self.tokenizer.get_chat_template()
        self._template = _environment().from_string(self._text)
        #: The variables that settings may give, and whether it writes today's date.
        self.variables, self.writes_date = read_template(self._text, _environment())

    def _check_variables(self) -> None:
        for name in self.kwargs.keys() - self.variables:
            reads = ", ".join(sorted(self.variables)) or "no variable"
            raise ConfigError(
                f"chat_template_kwargs: the chat template of {self.source} reads no {short(name)}, "
                f"so it would have no effect; it reads {reads}.{did_you_mean(name, self.variables)}"
            )

    def _lost(self, *roles: str) -> list[int] | None:
        """The turns, from 1, whose text the template does not show; None: it refuses them."""
        said = [Message(role, f"{_WHOLE}{turn}") for turn, role in enumerate(roles, 1)]
        shown = self._taken(said)
        if shown is None:
            return None
        return [turn for turn, message in enumerate(said, 1) if message.content not in shown]

    def _check_turns(self) -> None:
        """Refuses a template that leaves turns out of conversations that it takes."""
        talk = ("user", "assistant", "user")
        asked = [("system", "user"), ("system", *talk)] if self.has_system_role else []
        for roles in (*asked, talk):
            if lost := self._lost(*roles):
                turns = ", ".join(f"{turn} ({roles[turn - 1]})" for turn in lost)
                raise ArtifactError(
                    f"The chat template of {self.source} leaves out what is said in turn {turns} "
                    f"of a conversation with the roles {', '.join(roles)}. Correct its "
                    "chat_template.jinja."
                )

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template shows a system message; Gemma's refuses one."""
        lost = self._lost("system", "user")
        return lost is not None and 1 not in lost

    @cached_property
    def default_system(self) -> str:
        """What the template says as the system where no system message is given; mostly nothing."""
        if not self.has_system_role:
            return ""
        plain, given = self._tried([_HI]), self._tried([Message("system", _PROBE), _HI])
        before, _, after = given.partition(_PROBE)
        end = len(plain) - len(after)
        same = plain.startswith(before) and plain.endswith(after) and len(before) <= end
        found = plain[len(before) : end] if same else ""
        return found if found.strip() else ""

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an assistant turn: what the template puts after the answer.

        Where it puts nothing there, as GLM-4's, the token of the next role if the checkpoint's
        configuration stops at it; else the tokenizer's eos.
        """
        tail = self._after_answer()
        sure = (i for i in tail if i in self.special_ids or i in self._configured)
        found = next(sure, next(iter(tail), None))
        if found is None:
            found = next((i for i in self._after_answer(_HI)[:1] if i in {*self._stops()}), None)
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise ArtifactError(
                f"{self.source}: neither the chat template nor the tokenizer (eos_token) says "
                "which token ends a turn. Set eos_token in tokenizer_config.json."
            )
        return int(found)

    @cached_property
    def notes(self) -> list[str]:
        """What is odd about the template but works."""
        found = []
        if not self.has_system_role:
            found.append(
                "has no system role: principles go in front of the first user turn, so principle "
                "and query share a turn"
            )
        if self._configured.isdisjoint([self.end_of_turn, *self._after_answer()]):
            token = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            found.append(
                f"ends a turn with {token} by its template, and neither its configuration "
                "(eos_token_id of generation_config.json) nor its tokenizer (eos_token) stops at "
                "it: whoever serves it may answer on and on. Add it there"
            )
        if opening := self._unopened:
            found.append(
                f"has a template without a generation prompt: answers begin with "
                f"{short(opening)} in past turns, and are asked for without it"
            )
        return [f"{self.source} {note}" for note in found]

    @property
    def _unopened(self) -> str:
        """What stands before past answers and no generation prompt ever writes."""
        if self.prompt_text([_HI]) != self._tried([_HI], add_generation_prompt=False):
            return ""
        leaves, enters = self._opening()
        return "" if leaves else enters.strip()

    def _after_answer(self, *more: Message) -> list[int]:
        """The added tokens, special or not, that the template puts after an answer."""
        turns = [_HI, Message("assistant", _PROBE), *more]
        whole = self._taken(turns, add_generation_prompt=False) or ""
        _, shown, tail = whole.rpartition(_PROBE)
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        apart = self.special_ids.union(i for i, t in added.items() if not t.content.isspace())
        return [i for i in self._encode(tail) if i in apart] if shown else []

    @cached_property
    def _configured(self) -> frozenset[int]:
        """The tokens at which whoever serves the checkpoint ends an answer."""
        eos = self.tokenizer.eos_token_id
        return frozenset([*self._stops(), *([] if eos is None else [eos])])

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The special tokens."""
        # a fine-tune's end-of-turn token is often special without having a role of its own
        return frozenset([*self.tokenizer.all_special_ids, *self._special.values()])

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether the generation prompt leaves a block open for thoughts."""
        return opened(self.prompt_text([_HI])) is not None

    def _opening(self, **thoughts: str) -> tuple[str, str]:
        """What leaves the end of a prompt, and what enters it, where the template has an answer."""
        prompt = self.prompt_text([_HI])
        turns = [_HI, Message("assistant", _PROBE)]
        whole = self._taken(turns, add_generation_prompt=False, **thoughts) or ""
        shown, found, _ = whole.partition(_PROBE)
        if not found:
            return "", ""
        same = len(commonprefix([prompt, shown]))  # noqa: RUF071 - characters are meant
        return prompt[same:], shown[same:]

    @cached_property
    def _without_thoughts(self) -> tuple[str, str]:
        """`_opening` of an answer without thoughts; nothing where the model has none.

        Templates that leave the thoughts of earlier turns out show no empty block, so an open one
        is closed as models close it.
        """
        leaves, enters = self._opening()
        if any(marks.end in enters for marks in MARKS):
            return leaves, enters
        marks = opened(self.prompt_text([_HI]))
        return ("", f"\n{marks.end}\n\n") if marks else ("", "")

    @cached_property
    def may_reason(self) -> bool:
        """Whether thoughts may come first: the template has marks, and no prompt ends with one."""
        template, prompt = self._text, self.prompt_text([_HI]).rstrip()
        return any(m.end in template and not prompt.endswith(m.end) for m in MARKS)

    def without_thoughts(self, prompt: str) -> str:
        """A prompt that ends with an empty block of thoughts, as far as the template has one."""
        leaves, enters = self._without_thoughts
        return prompt.removesuffix(leaves) + enters

    def thoughts(self, text: str) -> str:
        """Thoughts that a server took out of their marks, as the model would have said them."""
        leaves, enters = self._opening(reasoning_content=_PROBE[::-1], thinking=_PROBE[::-1])
        if not leaves and _PROBE[::-1] in enters:
            return enters.replace(_PROBE[::-1], text)
        return bare_thoughts(text, begun=self.opens_reasoning)

    def said(self, ids: Sequence[int]) -> Said:
        """What sampled ids say, without the token that ended the turn."""
        decode = self.tokenizer.decode
        reasoning, answer = split(decode(ids), begun=self.opens_reasoning)
        if answer is None:
            return Said(reasoning, "", False, False)
        at = answer_at(ids, reasoning, decode) if reasoning else 0
        shared = decode(ids[:at])[len(reasoning.rstrip()) :]  # one token may hold both
        text = (shared + decode(ids[at:], skip_special_tokens=True)).strip()
        again = self.response_ids(text, finished=False)
        sampled = tuple(ids[max(len(ids) - len(again), 0) :] if reasoning else ids)
        return Said(reasoning, text, sampled != again, not self.special_ids.isdisjoint(ids[at:]))

    def _taken(self, messages: Sequence[Message], **given: Any) -> str | None:
        """`_tried`; None where the template refuses the conversation."""
        from jinja2 import TemplateError

        try:
            return self._tried(messages, **given)
        except ArtifactError as e:
            if isinstance(e.__cause__, TemplateError | TypeError):
                return None  # anything else is a fault
            raise

    def _tried(self, messages: Sequence[Message], **given: Any) -> str:
        """Renders a short conversation; a template that fails or does not end is an error."""
        try:
            with few_steps(STEPS):
                return self._render(messages, **given)
        except Exception as e:  # templates are programs
            roles = ", ".join(m.role for m in messages)
            raise self._broken(f"fails on a conversation of the roles {roles}", e) from e

    def _render(
        self,
        messages: Sequence[Message],
        mark: str = "",
        *,
        add_generation_prompt: bool = True,
        **thoughts: str,
    ) -> str:
        """The template's text; with a mark, control tokens in messages are taken apart by it.

        ``thoughts`` are further keys of the last message.
        """
        turns: list[dict[str, Any]] = []
        for role, content in messages:
            text = self._apart(content, mark, role) if mark else content
            parts = [{"type": "text", "text": text}] if self._takes_parts else text
            turns.append({"role": role, "content": parts})
        turns[-1] |= thoughts
        given = {**self.tokenizer.special_tokens_map, **self.kwargs}
        day = date.fromisoformat(self.day)
        made = str(
            self._template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=day.strftime,
                **given,
            )
        )
        made.encode()  # half a surrogate pair is no text
        return made

    @cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens: text that writes one would open or end a turn."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {token.content: i for i, token in added.items() if token.special}

    @cached_property
    def _control_tokens(self) -> dict[bool, dict[str, int]]:
        """The control tokens of an assistant's text (True), or of another's, with their ids.

        An assistant may write those that are not special, such as ``<think>``; from others they
        are text if the template uses them.
        """
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).items()
        used = {
            t.content: i for i, t in added if t.content in self._text and not t.content.isspace()
        }
        both = {True: self._special, False: self._special | used}
        return {own: {t: i for t, i in of.items() if len(t) > 1} for own, of in both.items()}

    @cached_property
    def _controls(self) -> dict[bool, re.Pattern[str]]:
        """Where one of them begins."""
        found = {}
        for own, tokens in self._control_tokens.items():
            any_of = "|".join(map(re.escape, tokens))
            found[own] = re.compile(f"(?=(?:{any_of}))(.)" if any_of else "(?!)", re.DOTALL)
        return found

    @cached_property
    def _disguises(self) -> bool:
        """Whether text that is no control token may become one: a normaliser changes it before."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is None or core.normalizer is None:
            return False
        added = self.tokenizer.added_tokens_decoder.values()
        # merges of BPE lead to no control token
        return type(core.model).__name__ != "BPE" or any(t.normalized for t in added)

    def _cuts(self, text: str, role: str = "assistant") -> list[int]:
        """Where control tokens in a text are taken apart: each behind its first character.

        Raises:
            DataError: one character becomes a control token.
        """
        own = role == "assistant"
        cuts = {found.end(1) for found in self._controls[own].finditer(text)}
        while self._disguises:
            pieces = pairwise(sorted({0, *cuts, len(text)}))
            more = {a + at + 1 for a, b in pieces for at in self._disguised(text[a:b], own)}
            if not more:
                break
            if more <= cuts:
                raise DataError(f"{self.source} reads one character as a control token.")
            cuts |= more
        return sorted(cuts - {len(text)})

    def _disguised(self, text: str, own: bool) -> list[int]:
        """Where control tokens begin that a text becomes."""
        made = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        controls = {*self._control_tokens[own].values()}.difference(self._unknown)
        spans = zip(made["input_ids"], made["offset_mapping"], strict=True)
        return [at for i, (at, _) in spans if i in controls]

    @cached_property
    def _unknown(self) -> list[int]:
        """What stands for characters that the tokenizer does not know."""
        return self._encode(_MARKS[-1])

    def _apart(self, text: str, mark: str, role: str = "assistant") -> str:
        return mark.join(text[a:b] for a, b in pairwise([0, *self._cuts(text, role), len(text)]))

    def _mark_for(self, messages: Sequence[Message]) -> str:
        """What takes control tokens apart; nothing where no message has one."""
        return _unused(messages) if any(self._cuts(m.content, m.role) for m in messages) else ""

    def _encode(self, text: str, mark: str = "") -> list[int]:
        """Ids of text; at each mark it is cut, so that no token reaches across."""
        ids = self.tokenizer

        def encode(part: str) -> list[int]:
            # the template writes its own begin-of-text token
            return list(ids(part, add_special_tokens=False)["input_ids"])

        first, *rest = text.split(mark) if mark else [text]
        found, lead = encode(first), encode("\n") if rest else []
        for part in rest:
            # behind a line end, as some tokenizers put a space in front of a text
            after = encode(f"\n{part}")
            found += after[len(lead) :] if after[: len(lead)] == lead else encode(part)
        return found

    def prompt_text(self, messages: Sequence[Message], *, continued: bool = False) -> str:
        """The rendered prompt with generation prompt; system text folded in where it must be.

        Args:
            messages: that end in a user turn.
            continued: they end in an assistant turn, which is left open to be continued.
        """
        if not continued:
            return self._prompt(messages)
        *turns, (role, text) = messages
        end = _unused(messages)
        return self._prompt([*turns, Message(role, text + end)], opens=False).rpartition(end)[0]

    def _prompt(self, messages: Sequence[Message], mark: str = "", *, opens: bool = True) -> str:
        folded = self.folded(messages)
        try:
            return self._render(folded, mark, add_generation_prompt=opens)
        except Exception as e:  # templates are programs
            raise RefusedConversation(
                f"The chat template of {self.source} refuses a conversation with the roles "
                f"{', '.join(m.role for m in folded)}: {e}"
            ) from e

    def folded(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages as the template takes them: without a system role, its text goes first."""
        if messages[0].role != "system" or self.has_system_role:
            return messages
        system, first, *rest = messages
        return [Message(first.role, f"{system.content}\n\n{first.content}"), *rest]

    def prompt_ids(self, messages: Sequence[Message], *, reasoned: bool = True) -> tuple[int, ...]:
        """Ids of the prompt with generation prompt.

        Args:
            messages: the conversation.
            reasoned: what follows begins with thoughts if the model has any; otherwise the prompt
                ends with an empty block of them, as far as the template has one.
        """
        key = (tuple(messages), reasoned)
        if key not in self._cache:
            if len(self._cache) >= 4096:
                self._cache.clear()
            mark = self._mark_for(messages)
            prompt = self._prompt(messages, mark)
            text = prompt if reasoned else self.without_thoughts(prompt)
            self._cache[key] = self._shared(self._encode(text, mark))
        return self._cache[key]

    def _shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Equal ids as one object: 8 bytes of memory a token, which were 40."""
        known = self._ids_seen.setdefault
        return tuple([known(i, i) for i in ids])

    def exchange_ids(self, messages: Sequence[Message], response: str) -> tuple[int, ...]:
        """Ids of a conversation and its answer, as the template ends it: what a reward model reads.

        The same as TRL's reward trainer makes of it; some templates put a line end after the
        end-of-turn token, so this is not always `prompt_ids` + `response_ids`.
        """
        turns = [*messages, Message("assistant", response)]
        mark = self._mark_for(turns)
        return tuple(self._encode(self._prompt(turns, mark, opens=False), mark))

    def response_ids(self, text: str, *, finished: bool = True) -> tuple[int, ...]:
        """Ids of a response, with the end-of-turn token if it ended by itself."""
        mark = self._mark_for([Message("assistant", text)])
        ids = self._encode(self._apart(text, mark) if mark else text, mark)
        return self._shared([*ids, self.end_of_turn] if finished else ids)

    def exchange(
        self,
        messages: Sequence[Message],
        response: str,
        *,
        reasoning: str = "",
        finished: bool = True,
    ) -> EncodedSequence:
        """A prompt and its response, after the thoughts that belong to it or an empty block."""
        prompt = self.prompt_ids(messages, reasoned=bool(reasoning))
        thoughts = self.tokenizer(reasoning, add_special_tokens=False)["input_ids"]
        answer = self.response_ids(response, finished=finished)
        return EncodedSequence(prompt, (*self._shared(thoughts), *answer))

    def response_lengths(self, responses: Sequence[tuple[str, bool]]) -> list[int]:
        """Tokens of (text, finished) as `response_ids` would give them; together is faster."""
        found = self.tokenizer(
            [text for text, _ in responses],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # that one is longer than the context is for others to say
        )["input_ids"]
        return [
            len(self.response_ids(text)) - 1 + done if self._cuts(text) else len(ids) + done
            for ids, (text, done) in zip(found, responses, strict=True)
        ]

    def refuses(self, triple: Triple, sequences: Iterable[str]) -> bool:
        """Whether the template refuses a triple's conversation in the context of one of these."""
        try:
            for context in {name.partition("/")[0] for name in sequences}:
                asked = context_messages(triple.messages, triple.principles, context)
                self.prompt_ids(asked, reasoned=False)  # which keeps them
        except RefusedConversation:
            return True
        return False

    def sequence(self, triple: Triple, name: str, max_length: int | None = None) -> EncodedSequence:
        """The sequence ``context/response`` of a triple.

        Args:
            triple: must have the response, and principles unless the context is plain.
            name: for example ``bad/plain``.
            max_length: tokens kept of prompt + response; the response's end is cut.

        Raises:
            DataError: the response is absent or has no tokens within ``max_length``.
            RefusedConversation: by the template.
        """
        context, _, response = name.partition("/")
        if response not in triple.responses:
            raise DataError(f"triple {triple.id} has no {response} response, needed for {name}")
        if context != "plain" and triple.principles is None:
            raise DataError(f"triple {triple.id} has no principles, needed for {name}")
        try:
            whole = self.exchange(
                context_messages(triple.messages, triple.principles, context),
                triple.responses[response],
                reasoning=triple.reasoning.get(response, ""),
                finished=triple.finished(response),
            )
        except RefusedConversation as e:
            raise RefusedConversation(f"triple {triple.id}: {name}: {e}") from e
        prompt, answer = whole.prompt_ids, whole.response_ids
        if max_length is not None:
            answer = answer[: max(max_length - len(prompt), 0)]
        if not answer:
            raise DataError(
                f"triple {triple.id}: {name} has no response token"
                + (f" within {max_length} tokens" if max_length is not None else "")
            )
        return EncodedSequence(prompt, answer, triple.id)


#: Operators of templates with which one step can fill the memory, or never end.
_LIMITED: dict[str, Callable[[Any, Any], Any]] = {"*": mul, "**": pow, "%": mod}

#: Filters, and methods of texts and numbers, of which the same is true.
_MAKERS = {
    *("batch", "center", "expandtabs", "format", "format_map", "from_bytes", "indent", "int"),
    *("join", "ljust", "replace", "rjust", "round", "slice", "to_bytes", "tojson", "wordwrap"),
    "zfill",
}

#: The width and the precision of a format such as ``%-20s``.
_WIDTHS = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")

#: Those of a field such as ``{:>20}``, where they are long; a brace: a field of their own.
_FIELDS = re.compile(r"\{[^{}]*?(\{|\d{6,})")

#: Characters or items that one operation may make; bits of a number.
_MOST_MADE, _MOST_BITS = 1_000_000, 10_000

#: What a filter may make of a whole conversation; a width, a count or a precision given to it.
_MOST_FILLED, _MOST_COUNT = 100_000_000, 10_000


def _unused(messages: Sequence[Message]) -> str:
    """A mark that stands in none of the messages.

    Raises:
        RefusedConversation: they have all of them.
    """
    there = set[str]().union(*(m.content for m in messages))
    found = next((c for c in _MARKS if c not in there), None)
    if found is None:
        raise RefusedConversation(
            "A conversation has all characters that could mark a place in it."
        )
    return found


def _draws(*_: Any, **__: Any) -> str:
    raise RuntimeError("it draws lots (random, lipsum), so prompts would be others each time")


@lru_cache(maxsize=1)
def _environment() -> Any:
    """What templates are compiled and rendered in: transformers' own environment, within bounds."""
    from jinja2.compiler import CodeGenerator
    from transformers.utils.chat_template_utils import _compile_jinja_template

    made: Any = _compile_jinja_template.__wrapped__("").environment  # one of our own
    made.code_generator_class = _unfolded(CodeGenerator)
    made.intercepted_binops, made.call_binop = frozenset(_LIMITED), _limited
    made.filters |= {name: _bounded(name, f) for name, f in made.filters.items() if name in _MAKERS}
    made.filters["random"] = made.globals["lipsum"] = _draws
    made.wrap_str_format = _guarded(made.wrap_str_format)
    return made


def _unfolded(generator: Any) -> Any:
    """A compiler that leaves what is constant to be computed by the rendering, which has limits."""
    from jinja2 import nodes

    class Unfolded(generator):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.optimizer = None

        def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> Any:
            if not isinstance(node, nodes.TemplateData | nodes.Const):
                raise nodes.Impossible
            return super()._output_child_to_const(node, frame, finalize)

        def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Any) -> None:
            if not all(isinstance(keyword.value, nodes.Const) for keyword in node.options):
                self.fail("autoescape takes true or false", node.lineno)
            super().visit_EvalContextModifier(node, frame)

    return Unfolded


def _bounded(name: str, given: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within bounds."""
    first = int(hasattr(given, "jinja_pass_arg"))  # where Jinja puts something before the value

    @wraps(given)
    def within_bounds(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_widths(name, _WIDTHS, str(args[0]))
        else:
            _check_made(name, *args[first:], *kwargs.values())
        return given(*args, **kwargs)

    return within_bounds


def _guarded(sandboxed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """How the sandbox replaces methods that templates ask for: those of `_MAKERS` within bounds."""

    def instead(method: Any) -> Any:
        if not isinstance(method, MethodType | BuiltinMethodType) or method.__name__ not in _MAKERS:
            return None
        name, own, call = method.__name__, method.__self__, sandboxed(method) or method

        def within_bounds(*args: Any, **kwargs: Any) -> Any:
            if name.startswith("format"):
                _check_widths(name, _FIELDS, str(own))
            else:
                _check_made(name, own, *args, *kwargs.values())
            return call(*args, **kwargs)

        return within_bounds

    return instead


def _check_made(name: str, value: Any, *given: Any) -> None:
    """Refuses what a filter or a method would make too much of.

    Raises:
        OverflowError: it would.
    """
    if any(abs(v) > _MOST_COUNT for v in given if isinstance(v, int)):
        raise OverflowError(f"its {name} is given a number of more than {_MOST_COUNT:,}")
    sizes = sorted((_length(v) for v in (value, *given)), reverse=True)[:2]
    number = name in ("int", "from_bytes")
    made, most = (8 * sizes[0], _MOST_BITS) if number else (prod(sizes), _MOST_FILLED)
    if made > most:
        raise OverflowError(f"its {name} makes more than {most:,} at once")


def _length(value: Any) -> int:
    """How much of what it is given a filter may take; what is iterated over may be long."""
    if isinstance(value, int):
        return min(abs(value), _MOST_COUNT) or 1
    if hasattr(value, "__len__"):
        return len(value) or 1
    return _MOST_MADE if hasattr(value, "__iter__") else 1


def _check_widths(name: str, places: re.Pattern[str], text: str) -> None:
    """Refuses a format that fills up to too much, or to a width that it gets from elsewhere.

    Raises:
        OverflowError: it does.
    """
    widths = [w for found in places.finditer(text) for w in found.groups() if w]
    if sum(int(w[:9]) if w.isdecimal() else _MOST_MADE + 1 for w in widths) > _MOST_MADE:
        raise OverflowError(f"its {name} makes more than {_MOST_MADE:,} at once")


def _limited(context: Any, operator: str, left: Any, right: Any) -> Any:
    """An operator of `_LIMITED` within bounds.

    Raises:
        OverflowError: it would make too much.
    """
    whole = isinstance(left, int) and isinstance(right, int)
    made, most = 0, _MOST_MADE
    if operator == "%" and isinstance(left, str):
        _check_widths(operator, _WIDTHS, left)
    elif operator == "**" and whole:
        made, most = left.bit_length() * max(right, 0), _MOST_BITS
    elif operator == "*" and whole:
        made, most = left.bit_length() + right.bit_length(), _MOST_BITS
    elif operator == "*":
        made = max(
            (len(a) * b for a, b in ((left, right), (right, left)) if _repeats(a, b)), default=0
        )
    if made > most:
        raise OverflowError(f"its {operator} makes more than {most:,} at once")
    return _LIMITED[operator](left, right)


def _repeats(a: Any, b: Any) -> bool:
    return isinstance(a, str | list | tuple) and isinstance(b, int)


@lru_cache(maxsize=64)
def read_template(template: str, environment: Any) -> tuple[frozenset[str], bool]:
    """The variables of a template that settings may give, and whether it asks for the date."""
    from jinja2 import nodes
    from jinja2.meta import TrackingCodeGenerator

    parsed = environment.parse(template)
    # names that it sets itself are no settings, unless it asks first whether they are given
    names = list(parsed.find_all(nodes.Name))
    set_here = {n.name for n in names if n.ctx == "store"}
    tests = (t.node for t in parsed.find_all(nodes.Test))
    asked = {n.name for n in tests if isinstance(n, nodes.Name)}
    reading = _unfolded(TrackingCodeGenerator)(environment)
    reading.visit(parsed)
    given = reading.undeclared_identifiers - _OWN - (set_here - asked)
    return frozenset(given), any(n.name == "strftime_now" for n in names)


@contextmanager
def few_steps(most: int) -> Iterator[None]:
    """A block that may run so many lines of Python: templates are code, and some never end.

    Lines that take long are stopped after `SECONDS` of the processor.
    """
    before, left, end = sys.gettrace(), most, thread_time() + SECONDS

    def count(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError(f"it has not ended after {most:,} steps")
        if thread_time() > end:
            raise RuntimeError(f"it has not ended after {SECONDS:g} seconds")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
