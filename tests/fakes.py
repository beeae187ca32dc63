"""Engines for tests."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from selfsteer.engines.base import Advance, Completion, Request, SamplingParams, no_news

#: What a fake says: a text that ended by itself, text and finish reason, or everything.
Said = str | tuple[str, str] | Completion


class FakeEngine:
    """Answers each request by a function of it, and remembers what it was asked.

    Args:
        say: the answer to a request.
        batch_size: see `Engine`.
        tokens: of each prompt and answer.
    """

    def __init__(
        self,
        say: Callable[[Request], Said],
        batch_size: int | None = None,
        tokens: tuple[int, int] = (10, 5),
    ) -> None:
        self.say, self.batch_size, self.tokens = say, batch_size, tokens
        self.asked: list[Request] = []
        self.calls = 0

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance = no_news
    ) -> Iterator[Completion]:
        """See `Engine.generate`."""
        self.calls += 1
        for request in requests:
            self.asked.append(request)
            said = self.say(request)
            if isinstance(said, Completion):
                found = replace(said, id=request.id)
            else:
                text, reason = (said, "stop") if isinstance(said, str) else said
                found = Completion(request.id, text, reason, *self.tokens)
            advance(1, found.completion_tokens)
            yield found
