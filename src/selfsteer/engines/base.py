"""The one interface through which anything is asked of a model that answers in text."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from selfsteer.data.records import Message
from selfsteer.errors import EngineError
from selfsteer.models.chat import ChatFormat

#: Told (conversations, new tokens) as they finish.
Advance = Callable[[int, int], None]


def no_news(items: int, tokens: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; SSO v2, §4 uses temperature 0.7, top-p 0.8, 2048 new tokens."""

    temperature: float = 0.7
    top_p: float = 0.8
    max_new_tokens: int = 2048


#: Finish reason of a conversation that was not answered: prompt and budget exceed the context.
PROMPT_TOO_LONG = "prompt_too_long"

#: How the finish reason of a request that failed for good begins; its cause follows.
REQUEST_FAILED = "request_failed"


@dataclass(frozen=True)
class Completion:
    """One answer: text, finish reason (``stop``, ``length``, or why there is none), tokens."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def missing(self) -> str | None:
        """Why there is no answer at all; None where there is one, cut off or not."""
        lost = self.finish_reason.startswith((PROMPT_TOO_LONG, REQUEST_FAILED))
        return self.finish_reason if lost else None


def completion(
    chat: ChatFormat, stop_ids: Collection[int], prompt_tokens: int, ids: Sequence[int]
) -> Completion:
    """The answer that sampled tokens make; an end of turn within the budget is its last token."""
    finished = bool(ids) and ids[-1] in stop_ids
    text = chat.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
    return Completion(text.strip(), "stop" if finished else "length", prompt_tokens, len(ids))


#: Asked under two seeds each, hot: an engine that samples cannot answer all of them twice alike.
PROBES = (
    "Invent a name for a village and say who lives there.",
    "Tell me something that surprises you.",
    "Write the first two sentences of a story.",
    "Name a few things that you could pack for a journey.",
)
PROBE_TOKENS = 32


def probe(temperature: float) -> tuple[list[list[Message]], SamplingParams]:
    """Open questions, each twice in a row, and how to ask them; `check_probe` has the verdict."""
    params = SamplingParams(max(temperature, 1.0), 1.0, PROBE_TOKENS)
    return [[Message("user", p)] for p in PROBES for _ in range(2)], params


def check_probe(found: Sequence[Completion], who: str, remedy: str) -> None:
    """Fails if every question of `probe` got the same answer twice.

    Args:
        found: the answers, each conversation asked under a seed of its own.
        who: the engine, for the message.
        remedy: what may help, a sentence.

    Raises:
        EngineError: the temperature is ignored.
    """
    pairs = list(zip(found[::2], found[1::2], strict=True))
    pairs = [(a, b) for a, b in pairs if a.missing is None and b.missing is None]
    if pairs and all(a.text == b.text for a, b in pairs):
        raise EngineError(
            f"{who} ignores temperature: {len(pairs)} prompts, each asked under two seeds, got the "
            "same answers twice, so good, bad and plain answers would hardly differ. "
            f"{remedy}"
        )


class Engine(Protocol):
    """Answers conversations."""

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: SamplingParams,
        seed: int,
        advance: Advance = no_news,
    ) -> list[Completion]:
        """One completion per conversation, in their order.

        Args:
            conversations: each ends in a user turn.
            sampling: temperature 0 is greedy.
            seed: equal arguments and seed give equal texts.
            advance: told (conversations, new tokens) as they finish.
        """
        ...
