"""Sampling from a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, hosted ones.

What can be mended by asking again is asked again: 408, 409, 429, 5xx, time-outs, lost connections
and answers that cannot be read, with exponential backoff and jitter, not before the server says. A
request that fails for good becomes a `Completion` whose finish reason says so, for its stage to
drop and count; several in a row stop the stage.
"""

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Message
from selfsteer.engines.base import (
    PROBE_TOKENS,
    PROBES,
    PROMPT_TOO_LONG,
    REQUEST_FAILED,
    Advance,
    Completion,
    Request,
    SamplingParams,
    check_probe,
    no_news,
    probe,
)
from selfsteer.engines.launch import LaunchedServer
from selfsteer.errors import ConfigError, EngineError
from selfsteer.models.chat import ChatFormat
from selfsteer.recipe.sections import EngineSettings
from selfsteer.terminal import say, warn

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

#: Requests in a row, each failed for good, after which a server counts as dead.
DEAD_AFTER = 5

#: Longest wait of our own, and the longest that a server may ask for, in seconds.
LONGEST_BACKOFF, LONGEST_PAUSE = 60.0, 3600.0

#: Tokens that a chat template adds to a message at most, where there is no tokenizer to ask.
TEMPLATE_TOKENS = 64

#: Seconds between two writings of the counts.
SAVE_EVERY_S = 2.0


@dataclass
class Usage:
    """What a run has asked of a server, over all its stages and tries.

    Args:
        path: file that keeps the counts; None keeps them in memory.
    """

    path: Path | None = None
    requests: int = 0
    retried: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    under_way: int = 0

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            for name, value in json.loads(self.path.read_bytes()).items():
                setattr(self, name, Counter(value) if name == "failed" else value)
        self._before = self.counts()
        self._saved = time.monotonic()

    def counts(self) -> dict[str, Any]:
        """All counts, as they are kept."""
        names = ("requests", "retried", "prompt_tokens", "completion_tokens")
        found: dict[str, Any] = {n: getattr(self, n) for n in names}
        return {**found, "failed": dict(sorted((+self.failed).items()))}

    def here(self) -> dict[str, Any]:
        """Counts since this object was made."""
        before = self._before
        found = {n: v - before[n] for n, v in self.counts().items() if n != "failed"}
        failed = self.failed - Counter(before["failed"])
        return {**found, "failed": dict(sorted(failed.items()))}

    def save(self, *, now: bool = False) -> None:
        """Writes the counts, every other second or now."""
        if self.path is None or not (now or time.monotonic() - self._saved > SAVE_EVERY_S):
            return
        write_atomic(self.path, json.dumps(self.counts()) + "\n")
        self._saved = time.monotonic()


class Fault(Exception):
    """One try of a request that gave no answer.

    Args:
        reason: for counts, such as ``http_500``.
        said: what the server or the connection said.
        again: whether another try may help; ``stop`` whether no request at all can succeed.
        pause: seconds that the server asks everybody to wait.
    """

    def __init__(
        self,
        reason: str,
        said: str,
        *,
        again: bool = True,
        stop: bool = False,
        pause: float | None = None,
    ) -> None:
        super().__init__(said)
        self.reason, self.said, self.again, self.stop, self.pause = reason, said, again, stop, pause


# -- reading an answer -----------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Message(_Part):
    content: str | None = None


class _Choice(_Part):
    message: _Message
    finish_reason: str


class _Tokens(_Part):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


class _Reply(_Part):
    choices: list[_Choice]
    usage: _Tokens


def read_reply(body: bytes) -> _Reply:
    """A chat completion with exactly one choice.

    Raises:
        Fault: it is none; worth another try.
    """
    try:
        value = json.loads(body.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except UnicodeError as e:
        raise Fault("invalid_utf8", str(e)) from None
    except (ValueError, RecursionError) as e:
        raise Fault("malformed_json", f"{e}: {body[:80]!r}") from None
    try:
        reply = _Reply.model_validate(value)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Fault("malformed_answer", f"{where}: {first['msg']}") from None
    if len(reply.choices) != 1:
        raise Fault(f"{len(reply.choices)}_choices", "one choice was asked for")
    return reply


def status_fault(status: int, said: str, code: str | None, headers: Mapping[str, str]) -> Fault:
    """What an HTTP error means for its request."""
    reason, text = f"http_{status}", f"{status}: {' '.join(said.split())[:300]}"
    if status in (401, 403, 404) or code == "insufficient_quota":
        return Fault(reason, text, again=False, stop=True)
    if status in (408, 409, 429) or status >= 500:
        return Fault(reason, text, pause=retry_after(headers))
    too_long = "context length", "context size", "context window", "context_length_exceeded"
    if any(words in f"{said} {code}" for words in too_long):
        return Fault(PROMPT_TOO_LONG, text, again=False)
    return Fault(reason, text, again=False)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or a date (RFC 9110, §10.2.3)."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(float(value) / scale, 0.0)
        except ValueError:
            try:
                return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
            except ValueError:
                continue
    return None


# -- asking ----------------------------------------------------------------------------------------


class OpenAIEngine:
    """Answers through chat completions, many at once.

    Args:
        settings: of kind ``openai``.
        model: what the server calls its model.
        base_url: where it is, up to ``/v1``.
        usage: counts of all that is asked under these settings.
        chat: the model's own template where the model is at hand: prompts are then counted, and
            folded where it knows no system role, exactly as training will.
        context_length: of the model; longer prompts are not sent.
        server: set if it was launched for this engine.
    """

    batch_size = None

    def __init__(
        self,
        settings: EngineSettings,
        model: str,
        base_url: str,
        usage: Usage,
        *,
        chat: ChatFormat | None = None,
        context_length: int | None = None,
        server: LaunchedServer | None = None,
    ) -> None:
        self.settings, self.model, self.base_url, self.usage = settings, model, base_url, usage
        self._chat, self._limit, self._server = chat, context_length, server
        self._key = "" if server else os.environ.get(settings.api_key_env, "").strip()
        # in a thread of its own, so that requests go on while answers are used, also in notebooks
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._jitter = random.Random()
        self._failed_in_a_row = 0
        self._not_before = 0.0
        self._probed = False

    @cached_property
    def _client(self) -> "openai.AsyncOpenAI":
        import openai

        host = urlsplit(self.base_url).hostname or ""
        here = host == "localhost" or host.startswith("127.") or host == "::1"
        return openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.base_url,
            max_retries=0,  # tries are counted, so they are ours
            timeout=self.settings.timeout,
            # a proxy would look for its own loopback
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not here),
        )

    def close(self) -> None:
        """Ends the connections; a second time it does nothing."""
        if self._loop.is_closed():
            return
        client = self.__dict__.pop("_client", None)
        if client is not None:
            self._start(client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.usage.save(now=True)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def check(self) -> None:
        """Fails if the server is not there or does not serve the model.

        Raises:
            EngineError: no answer.
            ConfigError: it serves others.
        """
        import openai

        names: list[str] = []

        async def look() -> None:
            client = self._client.with_options(timeout=10)
            names.extend([m.id async for m in client.models.list()])
            if self.model not in names:  # some answer to names that they do not list
                await self._client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": "Hi"}], max_tokens=1
                )

        try:
            self._start(look()).result()
        except openai.APIStatusError as e:
            if e.status_code in (401, 403):
                raise self._refused(f"{e.status_code}: {e.message}") from None
            if names:
                raise ConfigError(
                    f"{self.base_url} does not serve {self.model!r} but {', '.join(names[:5])}"
                    f"{' …' if len(names) > 5 else ''} ({self._hidden(e.message)}). Set model to "
                    "one of those."
                ) from None
            return  # not every server lists its models
        except openai.APIConnectionError as e:
            raise EngineError(
                f"Nobody answers at {self.base_url} ({_cause(e)}). Start the server, or correct "
                "base_url."
            ) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            return

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        """See `Engine.generate`; texts are stripped.

        Raises:
            EngineError: the server is dead, refuses us or ignores the temperature, or the next
                request would pass ``max_requests`` or ``max_tokens_total``.
        """
        answered: SimpleQueue[Completion | None] = SimpleQueue()
        asking = self._start(self._generate(requests, sampling, answered.put))
        asking.add_done_callback(lambda _: answered.put(None))
        try:
            while (answer := answered.get()) is not None:
                advance(1, answer.completion_tokens)
                yield answer
            asking.result()
        finally:
            asking.cancel()

    async def _generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        put: Callable[[Completion], None],
    ) -> None:
        if sampling.temperature > 0 and not self._probed:
            found: list[Completion] = []
            await self._ask_all(*probe(sampling.temperature), found.append)
            check_probe(
                found,
                f"The server at {self.base_url}",
                "Let it sample; transformers serve does so if the model's generation_config.json "
                "has do_sample: true.",
            )
            self._probed = True
        try:
            await self._ask_all(requests, sampling, put)
        finally:
            self.usage.save(now=True)

    async def _ask_all(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        put: Callable[[Completion], None],
    ) -> None:
        failed: list[tuple[Request, Completion]] = []

        async def work(todo: Iterator[Request]) -> None:
            for request in todo:
                answer = await self._answer(request, sampling)
                if answer.finish_reason.startswith(REQUEST_FAILED) and self._failed_in_a_row:
                    failed.append((request, answer))
                    continue
                if not self._failed_in_a_row:  # the server lives, so these failed by themselves
                    for _, earlier in failed:
                        put(earlier)
                    failed.clear()
                put(answer)

        todo = iter(requests)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.concurrency, len(requests))):
                    group.create_task(work(todo))
        except ExceptionGroup as e:
            raise e.exceptions[0] from None
        if failed:
            await self._alive()
            for request, answer in failed:
                self.usage.failed[answer.finish_reason] -= 1
                put(await self._answer(request, sampling))

    async def _alive(self) -> None:
        """Whether the last requests failed because of themselves, or because the server is dead.

        A server that dies with the last requests of a call must not cost their records.
        """
        self._failed_in_a_row = DEAD_AFTER - 1  # one more, and it is dead
        plain = SamplingParams(0.0, 1.0, PROBE_TOKENS)
        await self._answer(Request("alive", (Message("user", PROBES[0]),), 0), plain)
        self._failed_in_a_row = 0

    async def _answer(self, request: Request, sampling: SamplingParams) -> Completion:
        """One answer, whatever it takes within the retries."""
        name, messages = request.id, request.messages
        tokens = sum(len(m.content.encode()) + TEMPLATE_TOKENS for m in messages)
        if self._chat is not None:
            tokens = len(self._chat.prompt_ids(messages))
            if self._limit is not None and tokens + sampling.max_new_tokens > self._limit:
                return Completion(name, "", PROMPT_TOO_LONG, tokens, 0)
            messages = tuple(self._chat.folded(messages))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [m.to_dict() for m in messages],
            "seed": request.seed & 0x7FFFFFFF,  # 31 bits: some servers keep a seed in an int32
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        tries = 0
        while True:
            try:
                reply = await self._try(body, tokens + sampling.max_new_tokens)
                break
            except Fault as fault:
                if fault.stop:
                    raise self._refused(fault.said) from None
                if self._server is not None:
                    self._server.check()
                if not fault.again or tries == self.settings.retries:
                    return self._failed(name, fault, tries)
                await self._wait(fault, tries)
                tries += 1
                self.usage.retried += 1
        self._failed_in_a_row = 0
        (choice,) = reply.choices
        used = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
        if choice.finish_reason not in ("stop", "length"):
            reason = f"{REQUEST_FAILED}:{choice.finish_reason}"
            self.usage.failed[reason] += 1
            return Completion(name, "", reason, *used)
        text = (choice.message.content or "").strip()
        return Completion(name, text, choice.finish_reason, *used)

    async def _try(self, body: dict[str, Any], most_tokens: int) -> _Reply:
        """One request.

        Args:
            body: what to send.
            most_tokens: prompt and answer at most; held back from the budget until it is known.
        """
        import openai

        await self._admitted(most_tokens)
        usage = self.usage
        usage.requests += 1
        usage.under_way += most_tokens
        try:
            async with asyncio.timeout(self.settings.timeout):
                found = await self._client.chat.completions.with_raw_response.create(
                    **body, extra_body=self.settings.extra_body or None
                )
            reply = read_reply(found.http_response.content)
        except openai.APIStatusError as e:
            raise status_fault(e.status_code, e.message, e.code, e.response.headers) from None
        except (openai.APITimeoutError, TimeoutError):
            seconds = f"{self.settings.timeout:g} s"
            raise Fault("timeout", f"no answer within {seconds}") from None
        except openai.APIConnectionError as e:
            raise Fault("connection", _cause(e)) from None
        finally:
            usage.under_way -= most_tokens
            usage.save()
        usage.prompt_tokens += reply.usage.prompt_tokens
        usage.completion_tokens += reply.usage.completion_tokens
        return reply

    async def _admitted(self, tokens: int) -> None:
        """Waits until the next request may be sent; raises EngineError if it never may."""
        s, usage = self.settings, self.usage
        while True:
            pause = self._not_before - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
                continue
            if s.max_requests is not None and usage.requests >= s.max_requests:
                raise self._spent(f"max_requests {s.max_requests:,}")
            used = usage.prompt_tokens + usage.completion_tokens
            if s.max_tokens_total is None or used + usage.under_way + tokens <= s.max_tokens_total:
                return
            if not usage.under_way:
                raise self._spent(f"max_tokens_total {s.max_tokens_total:,}")
            await asyncio.sleep(0.02)  # what is under way may take less than it could

    async def _wait(self, fault: Fault, tries: int) -> None:
        if fault.pause is not None:
            if fault.pause > LONGEST_PAUSE:
                raise EngineError(
                    f"The server at {self.base_url} asks to wait {fault.pause:,.0f} s "
                    f"({self._hidden(fault.said)}). Finished shards are kept; run the same command "
                    "again then."
                )
            if fault.pause > 30:
                say(f"  the server asks for a pause of {fault.pause:.0f} s")
            self._not_before = max(self._not_before, time.monotonic() + fault.pause)
        # also behind a pause: all requests come back from it at once, and are refused again
        wait = min(self.settings.backoff * 2**tries, LONGEST_BACKOFF)
        await asyncio.sleep(wait * self._jitter.uniform(0.5, 1.0))

    def _failed(self, name: str, fault: Fault, tries: int) -> Completion:
        if fault.reason == PROMPT_TOO_LONG:
            self._failed_in_a_row = 0
            return Completion(name, "", PROMPT_TOO_LONG, 0, 0)
        reason = f"{REQUEST_FAILED}:{fault.reason}"
        self.usage.failed[reason] += 1
        self._failed_in_a_row += 1
        said = self._hidden(fault.said)
        if self._failed_in_a_row >= DEAD_AFTER:
            log = ""
            if self._server is not None:
                self._server.failed = True
                log = f" (its log: {self._server.log})"
            raise EngineError(
                f"The server at {self.base_url} gave no usable answer to request after request, "
                f"the last one after {tries + 1} tries ({fault.reason}: {said}). Finished "
                f"shards are kept; see to the server{log}, then run the same command again."
            )
        warn(f"a request failed for good after {tries + 1} tries ({fault.reason}: {said})")
        return Completion(name, "", reason, 0, 0)

    def _refused(self, said: str) -> EngineError:
        key = "is set" if self._key else "is not set"
        return EngineError(
            f"The server at {self.base_url} refuses model {self.model!r} ({self._hidden(said)}). "
            f"See to base_url, model and the key: the environment variable "
            f"{self.settings.api_key_env} {key}."
        )

    def _spent(self, limit: str) -> EngineError:
        u = self.usage
        return EngineError(
            f"The next request to {self.base_url} could pass {limit}: this run has sent "
            f"{u.requests:,} requests, {u.prompt_tokens:,} tokens in and {u.completion_tokens:,} "
            "out. Finished shards are kept; raise the limit and run the same command to go on."
        )

    def _hidden(self, text: str) -> str:
        """The text without the key: servers quote what they refuse."""
        return text.replace(self._key, "[key]") if self._key else text


def _cause(error: BaseException) -> str:
    """What lies under the client's ``Connection error.``."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
