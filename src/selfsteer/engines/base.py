"""The one interface to models that answer in text: requests in, completions out, joined by id.

An answer depends on its request alone (up to rounding): neither on the other requests of the call
nor on the batch, replica or try that computed it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from selfsteer.data.jsonl import batched
from selfsteer.data.records import Message
from selfsteer.errors import DataError, EngineError
from selfsteer.models.chat import ChatFormat
from selfsteer.models.reasoning import unanswered
from selfsteer.terminal import warn

#: Receives (requests, new tokens) as they finish.
Advance = Callable[[int, int], None]


def no_news(items: int, tokens: int) -> None:
    """Discards progress updates."""


@dataclass(frozen=True)
class Contrast:
    """What an answer is pushed away from while it is written (`transformers.contrast_step`).

    ``messages`` is the same conversation in another context; ``ratio`` r makes the next-token
    logits (1 + r) · z(·|here) − r · z(·|there). Below 0, the two are mixed.
    """

    messages: tuple[Message, ...]
    ratio: float


@dataclass(frozen=True)
class Request:
    """One conversation to answer; it ends in a user turn.

    ``id`` is unique within a call and names the answer; equal ``messages``, ``seed`` and
    ``contrast`` give equal answers. Only the transformers engine can do a ``contrast``.
    """

    id: str
    messages: tuple[Message, ...]
    seed: int
    contrast: Contrast | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; SSO v2, §4 uses temperature 0.7, top-p 0.8, 2048 new tokens."""

    temperature: float = 0.7
    top_p: float = 0.8
    max_new_tokens: int = 2048


#: Finish reason of a request without an answer: prompt and budget exceed the context.
PROMPT_TOO_LONG = "prompt_too_long"

#: How the finish reason of a request that failed for good begins; its cause follows.
REQUEST_FAILED = "request_failed"

#: That of a conversation which the chat template refuses.
REFUSED = f"{REQUEST_FAILED}:template"

#: Why templates refused conversations; each reason is a warning once per process.
_SAID: set[str] = set()


@dataclass(frozen=True)
class Completion:
    """The answer to the request ``id``.

    Args:
        id: of the request.
        text: the answer alone, stripped.
        finish_reason: ``stop``, ``length``, or why there is no answer.
        prompt_tokens: of the prompt.
        completion_tokens: of thoughts and answer.
        reasoning: the thoughts before the answer, their marks and the white space between included.
        retokenised: whether ``text`` makes other tokens than were sampled; None: not known.
        special_tokens: whether the answer held special tokens, which ``text`` does not show.
    """

    id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    retokenised: bool | None = None
    special_tokens: bool = False

    @property
    def finished(self) -> bool:
        """Whether it ended by itself, not by the budget."""
        return self.finish_reason != "length"

    @property
    def missing(self) -> str | None:
        """Why there is no answer at all; None where there is one, cut off or not."""
        if self.finish_reason.startswith((PROMPT_TOO_LONG, REQUEST_FAILED)):
            return self.finish_reason
        return unanswered(self.text, self.reasoning, self.finish_reason)


def stop_ids(chat: ChatFormat, configured: Sequence[int]) -> list[int]:
    """Tokens that end an answer: that of the chat template, and those of the checkpoint."""
    return sorted({chat.end_of_turn, *configured})


def completion(
    name: str, chat: ChatFormat, stops: Collection[int], prompt_tokens: int, ids: Sequence[int]
) -> Completion:
    """The answer that sampled tokens make; it ends with the first token that ends a turn."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    said = chat.said(ids[:end])
    reason, tokens = ("length", len(ids)) if end is None else ("stop", end + 1)
    return Completion(
        name,
        said.text,
        reason,
        prompt_tokens,
        tokens,
        said.reasoning,
        said.retokenised,
        said.special_tokens,
    )


def refusals(chat: ChatFormat, requests: Iterable[Request]) -> dict[str, Completion]:
    """The requests that the chat template refuses, as completions without an answer."""
    found = {}
    for r in requests:
        try:
            for messages in (r.messages, *([r.contrast.messages] if r.contrast else [])):
                chat.prompt_ids(messages)  # which keeps them
        except DataError as e:
            found[r.id] = Completion(r.id, "", REFUSED, 0, 0)
            if (said := str(e)) not in _SAID:
                _SAID.add(said)
                warn(f"{r.id} and others like it get no answer: {said}")
    return found


def cut(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """Batches of ``size`` requests of similar length, the longest first.

    Sorted by characters, then by id. Removing whole batches leaves the others as they are, so work
    that was interrupted between two batches goes on with the same ones.
    """
    order = sorted(requests, key=lambda r: (-sum(len(m.content) for m in r.messages), r.id))
    return list(batched(order, size))


class Engine(Protocol):
    """Answers requests.

    ``batch_size`` is the number of requests that are computed together, one batch of `cut` at a
    time; None where the engine schedules requests itself.
    """

    @property
    def batch_size(self) -> int | None:
        """See the class."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        """One completion per request, in any order, as they finish.

        Args:
            requests: with different ids.
            sampling: temperature 0 is greedy.
            advance: receives (requests, new tokens) as they finish.
        """
        ...


#: Asked under two seeds each, hot: an engine that samples cannot answer all of them twice alike.
PROBES = (
    "Invent a name for a village and say who lives there.",
    "Tell me something that surprises you.",
    "Write the first two sentences of a story.",
    "Name a few things that you could pack for a journey.",
)
PROBE_TOKENS = 32


class ProbedEngine:
    """An engine that schedules requests itself, and is asked first whether it samples at all.

    ``who`` names it in the error that it ignores the temperature, ``remedy`` says what may help.
    """

    batch_size = None
    who: str
    remedy: str
    _probed = False

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        """See `Engine.generate`; texts are stripped.

        Raises:
            EngineError: the temperature is ignored, a request has a contrast, or the engine failed.
        """
        self._prepare(requests, sampling)
        yield from self._answer(requests, sampling, advance)

    def _prepare(self, requests: Sequence[Request], sampling: SamplingParams) -> None:
        if any(r.contrast for r in requests):
            raise EngineError(
                f"{self.who} cannot contrast two contexts: that needs the logits of both at every "
                "token. Ask an engine of kind transformers."
            )
        if sampling.temperature > 0 and not self._probed:
            self._probe(sampling)
            self._probed = True

    def _answer(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance
    ) -> Iterator[Completion]:
        raise NotImplementedError

    def _probe(self, sampling: SamplingParams) -> None:
        budgets = sorted({PROBE_TOKENS, max(PROBE_TOKENS, sampling.max_new_tokens)})
        for budget in budgets:  # thoughts that a server keeps to itself may take more than a few
            hot = SamplingParams(max(sampling.temperature, 1.0), 1.0, budget)
            if self._samples(hot):
                return
        raise EngineError(
            f"{self.who} answers without a word within {budgets[-1]:,} tokens: it may think, and "
            "show nothing of it. Raise max_new_tokens, or turn thinking off "
            "(policy.chat_template_kwargs, or the engine's extra_body)."
        )

    def _samples(self, hot: SamplingParams) -> bool:
        """Whether it sees that the engine samples; False where no answer has a word.

        Raises:
            EngineError: the temperature is ignored.
        """
        asked = [
            Request(f"{i}/{seed}", (Message("user", text),), seed)
            for i, text in enumerate(PROBES)
            for seed in (1, 2)
        ]
        texts, silent = dict[str, list[str]](), False
        for answer in self._answer(asked, hot, no_news):
            if answer.finish_reason in ("stop", "length"):
                said = answer.reasoning + answer.text
                silent |= not said
                if said:
                    texts.setdefault(answer.id.partition("/")[0], []).append(said)
        pairs = [pair for pair in texts.values() if len(pair) == 2]
        if pairs and all(first == second for first, second in pairs):
            raise EngineError(
                f"{self.who} ignores temperature: {len(pairs)} prompts, each asked under two "
                "seeds, got the same answers twice, so good, bad and plain answers would hardly "
                f"differ. {self.remedy}"
            )
        return bool(pairs) or not silent
