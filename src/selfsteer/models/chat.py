"""Messages to ids; the only caller of ``apply_chat_template``.

A sequence is: chat template of the context's messages with generation prompt, then the response,
then the end-of-turn token, nothing after it. A response that was cut off gets no end-of-turn
token: training on one would teach stopping in mid-sentence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple

from selfsteer.data.records import Message, Triple
from selfsteer.errors import ArtifactError, ConfigError, DataError
from selfsteer.models.reasoning import MARKS, answer_at, bare_thoughts, opened, split
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import did_you_mean

_PROBE = "Probe of the system role"
_HI = Message("user", "Hi")

#: Variables of a template that no setting gives: what is rendered, and what every template has.
_OWN = {"messages", "add_generation_prompt", "tools", "documents", "strftime_now"}


@dataclass(frozen=True)
class EncodedSequence:
    """Token ids of one context and one response, end-of-turn token included where it ended."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

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

    Raises:
        ArtifactError: the tokenizer has no chat template, or no token that ends a turn.
        ConfigError: the template reads no such variable.
    """

    def __init__(
        self, tokenizer: Any, source: str = "the model", kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ArtifactError(
                f"{source} has no chat template, so a conversation cannot be turned into tokens. "
                "Use a chat or instruction-tuned checkpoint, or put a chat_template.jinja into "
                "its folder."
            )
        self.tokenizer = tokenizer
        self.source = source
        self.kwargs = dict(kwargs or {})
        for name in self.kwargs.keys() - self.variables:
            reads = ", ".join(sorted(self.variables)) or "no variable"
            raise ConfigError(
                f"chat_template_kwargs: the chat template of {source} reads no {name!r}, so it "
                f"would have no effect; it reads {reads}.{did_you_mean(name, self.variables)}"
            )
        self._cache: dict[tuple[tuple[Message, ...], bool], tuple[int, ...]] = {}
        self._ids: dict[int, int] = {}

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads and settings may give."""
        from jinja2.meta import find_undeclared_variables
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = self.tokenizer.get_chat_template()
        environment = _compile_jinja_template(template).environment
        found = find_undeclared_variables(environment.parse(template))
        return frozenset(found - _OWN - environment.globals.keys())

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template shows a system message; Gemma's refuses one."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hi"}]
        try:
            return _PROBE in self._render(messages, add_generation_prompt=True)
        except Exception as e:
            # templates refuse through jinja2's raise_exception; anything else would fail again
            # below, in the plain rendering, with its own message
            if type(e).__name__ == "TemplateError":
                return False
            raise

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an assistant turn: what the template puts after the answer."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        tail = self._render(turns).rpartition(_PROBE)[2]
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        found = next((i for i in ids if i in self.special_ids), self.tokenizer.eos_token_id)
        if found is None:
            raise ArtifactError(
                f"{self.source}: neither the chat template nor the tokenizer (eos_token) says "
                "which token ends a turn. Set eos_token in tokenizer_config.json."
            )
        return int(found)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The special tokens."""
        # a fine-tune's end-of-turn token is often special without having a role of its own
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        more = (i for i, token in added.items() if token.special)
        return frozenset([*self.tokenizer.all_special_ids, *more])

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether the generation prompt leaves a block open for thoughts."""
        return opened(self.prompt_text([_HI])) is not None

    def _opening(self, **thoughts: str) -> tuple[str, str]:
        """What leaves the end of a prompt, and what enters it, where the template has an answer."""
        prompt = self.prompt_text([_HI])
        answer: dict[str, str] = {"role": "assistant", "content": _PROBE, **thoughts}
        shown = self._render([_HI.to_dict(), answer]).partition(_PROBE)[0]
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
        template, prompt = self.tokenizer.get_chat_template(), self.prompt_text([_HI]).rstrip()
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

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        options |= self.kwargs
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def prompt_text(self, messages: Sequence[Message], *, continued: bool = False) -> str:
        """The rendered prompt with generation prompt; system text folded in where it must be.

        Args:
            messages: that end in a user turn.
            continued: they end in an assistant turn, which is left open to be continued.
        """
        folded = self.folded(messages)
        option = "continue_final_message" if continued else "add_generation_prompt"
        try:
            return self._render([m.to_dict() for m in folded], **{option: True})
        except Exception as e:
            if type(e).__name__ not in ("TemplateError", "UndefinedError", "TypeError"):
                raise
            raise DataError(
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
            # the template writes its own begin-of-text token
            prompt = self.prompt_text(messages)
            text = prompt if reasoned else self.without_thoughts(prompt)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._cache[key] = self._shared(ids)
        return self._cache[key]

    def _shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Equal ids as one object: 8 bytes of memory a token, which were 40."""
        known = self._ids.setdefault
        return tuple([known(i, i) for i in ids])

    def exchange_ids(self, messages: Sequence[Message], response: str) -> tuple[int, ...]:
        """Ids of a conversation and its answer, as the template ends it: what a reward model reads.

        The same as TRL's reward trainer makes of it; some templates put a line end after the
        end-of-turn token, so this is not always `prompt_ids` + `response_ids`.
        """
        turns = [*self.folded(messages), Message("assistant", response)]
        text = self._render([m.to_dict() for m in turns])
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def response_ids(self, text: str, *, finished: bool = True) -> tuple[int, ...]:
        """Ids of a response, with the end-of-turn token if it ended by itself."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
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
        return [len(ids) + done for ids, (_, done) in zip(found, responses, strict=True)]

    def sequence(self, triple: Triple, name: str, max_length: int | None = None) -> EncodedSequence:
        """The sequence ``context/response`` of a triple.

        Args:
            triple: must have the response, and principles unless the context is plain.
            name: for example ``bad/plain``.
            max_length: tokens kept of prompt + response; the response's end is cut.

        Raises:
            DataError: the response is absent or has no tokens within ``max_length``.
        """
        context, _, response = name.partition("/")
        if response not in triple.responses:
            raise DataError(f"triple {triple.id} has no {response} response, needed for {name}")
        if context != "plain" and triple.principles is None:
            raise DataError(f"triple {triple.id} has no principles, needed for {name}")
        whole = self.exchange(
            context_messages(triple.messages, triple.principles, context),
            triple.responses[response],
            reasoning=triple.reasoning.get(response, ""),
            finished=triple.finished(response),
        )
        prompt, answer = whole.prompt_ids, whole.response_ids
        if max_length is not None:
            answer = answer[: max(max_length - len(prompt), 0)]
        if not answer:
            raise DataError(
                f"triple {triple.id}: {name} has no response token"
                + (f" within {max_length} tokens" if max_length is not None else "")
            )
        return EncodedSequence(prompt, answer)
