"""Sampling from a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, hosted ones.

Requests that can succeed on another try are repeated: 408, 409, 429, 5xx, time-outs, lost
connections and answers that cannot be read, with exponential backoff and jitter, and not before
the server allows it. The client's own retries would not do: they repeat no unreadable answer, wait
for one request at a time and at most a minute, and cannot be counted against ``max_requests``. A
request that fails for good becomes a `Completion` whose finish reason names the cause, for its
stage to drop and count; several in a row stop the stage.
"""

import asyncio
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import openai

from selfsteer.data.digests import digest_path
from selfsteer.data.records import Message
from selfsteer.engines.base import (
    PROBE_TOKENS,
    PROBES,
    PROMPT_TOO_LONG,
    REQUEST_FAILED,
    Advance,
    Completion,
    ProbedEngine,
    Request,
    SamplingParams,
    refusals,
)
from selfsteer.engines.launch import LaunchedServer
from selfsteer.engines.pace import BUSY, Pace
from selfsteer.engines.usage import SAVE_EVERY_S, Usage
from selfsteer.errors import ConfigError, EngineError, clip, short
from selfsteer.models.chat import ChatFormat
from selfsteer.models.reasoning import bare_thoughts, split
from selfsteer.recipe import secrets
from selfsteer.recipe.sections import EngineSettings
from selfsteer.terminal import say, warn

T = TypeVar("T")

#: Requests in a row, each failed for good, after which a server counts as dead.
DEAD_AFTER = 5

#: Longest wait of our own, and the longest that a server may ask for, in seconds.
LONGEST_BACKOFF, LONGEST_PAUSE = 60.0, 3600.0

#: Bytes of a reply at most: a thousand times what the longest answers take; and of a file of
#: answers, which batches are cut to.
LONGEST_REPLY, LONGEST_FILE = 64 << 20, 512 << 20

#: Tokens that a reply may say it took: what JSON carries exactly.
MOST_TOKENS = 1 << 53

#: Seconds that a server has to list its models and answer once, before anything is asked of it.
LOOK_S = 30.0

#: Characters of a key from which on it is a secret that no answer repeats by chance, as it could
#: repeat ``EMPTY``.
SECRET = 16

#: Why an answer ended that is none; what else a server says here may be anything.
NO_ANSWER = frozenset({"content_filter", "tool_calls", "function_call", "abort", "error"})

#: What servers may call the budget of an answer; the old name is the one that more of them know.
BUDGET, NEW_BUDGET = "max_tokens", "max_completion_tokens"

#: How servers say that prompt and answer, or the prompt alone, are too long for the model.
TOO_LONG = re.compile(
    "context.(length|size|window)|prompt is too long|input token count"
    r"|inputs.? (must have less than|tokens \+)",
    re.IGNORECASE,
)

#: Reason of a request whose budget the server refuses.
NO_SUCH_BUDGET = "budget_refused"

#: How servers say so: the setting and what is wrong with it. Validation errors echo the request,
#: whose settings and texts say nothing.
_REFUSED = r"too (large|big|high|long)|at most|less than|exceed|maximum|must be|no more than"
BUDGET_REFUSED = re.compile(
    rf"max_(completion_)?tokens\W.{{0,80}}?({_REFUSED})|({_REFUSED}).{{0,80}}?max_(completion_)?tokens",
    re.IGNORECASE | re.DOTALL,
)
ECHO = re.compile(r"""["'](input|body)["']\s*:.*""", re.DOTALL)

#: Of waits; a generator of its own, so that no result depends on how often one was needed.
JITTER = random.Random()

#: Tokens that a chat template adds to a message at most, where there is no tokenizer to ask.
TEMPLATE_TOKENS = 64


@dataclass(eq=False)
class Fault(Exception):
    """One try of a request that gave no answer.

    Args:
        reason: for counts, such as ``http_500``.
        said: what the server or the connection said, without the key.
        again: whether another try may help.
        stop: whether no request at all can succeed.
        pause: seconds that the server asks all requests to wait.
        renamed: whether the server wants the budget under its new name.
        used: tokens in and out that it took, as far as the server says so.
    """

    reason: str
    said: str
    again: bool = True
    stop: bool = False
    pause: float | None = None
    renamed: bool = False
    used: tuple[int, int] = (0, 0)


class Reply(NamedTuple):
    """What counts of a chat completion."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning: str

    @property
    def used(self) -> tuple[int, int]:
        """Tokens in and out."""
        return self.prompt_tokens, self.completion_tokens


def read_reply(
    body: bytes, chat: "ChatFormat | None" = None, hide: Callable[[str], str] = str
) -> Reply:
    """A chat completion with exactly one choice.

    Args:
        body: of the response.
        chat: the model's own; it knows the marks of thoughts, and whether a prompt opens a block.
        hide: takes the key out of what is shown of a body that cannot be read.

    Raises:
        Fault: it is none, or has neither answer nor thoughts; worth another try.
    """
    try:
        value = json.loads(body.decode("utf-8"))
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")  # half a surrogate pair is no text
    except UnicodeError as e:
        raise Fault("invalid_utf8", str(e)) from None
    except (ValueError, RecursionError) as e:
        begin = hide(body.decode("utf-8", "replace"))[:80]
        raise Fault("malformed_json", f"{e}: {short(begin)}") from None
    used = (0, 0)
    match value:
        case {"usage": {"prompt_tokens": int(asked), "completion_tokens": int(said)}}:
            used = (asked, said) if all(map(_is_count, (asked, said))) else used
    match value:
        case {
            "choices": [{"message": {**message}, "finish_reason": str(reason)}],
            "usage": {"prompt_tokens": int(asked), "completion_tokens": int(said)},
        } if isinstance(message.get("content"), str | None) and all(map(_is_count, (asked, said))):
            content, thoughts = message.get("content"), message.get("reasoning_content")
            thoughts = thoughts or message.get("reasoning")  # servers have one name or the other
            answer = str(content or "")
            if isinstance(thoughts, str) and thoughts.strip():
                marked = chat.thoughts if chat else bare_thoughts
                reasoning = marked(thoughts.strip())
            elif content is None and reason == "stop":
                raise Fault("no_answer", "it stopped, and content is null", used=used)
            else:
                # where no prompt opens a block, a closing mark alone is a word of the answer
                unknown = chat is None or chat.opens_reasoning
                reasoning, rest = split(answer, begun=None if unknown else False)
                answer = rest or ""
            return Reply(answer.strip(), reason, asked, said, reasoning)
        case {"choices": [*choices]} if len(choices) != 1:
            raise Fault(f"{len(choices)}_choices", "one choice was asked for", used=used)
    raise Fault("malformed_answer", f"{_lacking(value)}: {short(hide(text)[:80])}", used=used)


def _lacking(value: Any) -> str:
    """What a reply lacks."""
    match value:
        case {"choices": [{"message": {**message}, "finish_reason": reason}]}:
            if not isinstance(message.get("content"), str | None):
                return "content is no text"
            if not isinstance(reason, str):
                return f"finish_reason is {short(reason)}, so it is unknown whether it was cut off"
            return "no usage with prompt_tokens and completion_tokens"
        case {"choices": [{"message": {}}]}:
            return "no finish_reason, so it is unknown whether it was cut off"
    return "no choice with a message"


def _is_count(tokens: int) -> bool:
    return type(tokens) is int and 0 <= tokens <= MOST_TOKENS


def status_fault(status: int, said: str, code: str | None, headers: Mapping[str, str]) -> Fault:
    """What an HTTP error means for its request."""
    reason, text = f"http_{status}", f"{status}: {' '.join(said.split())[:300]}"
    if 300 <= status < 400:
        text = f"{status}: it sends requests on to {clip(headers.get('location', ''), 200)}"
    if status < 400 or status in (401, 403, 404) or code == "insufficient_quota":
        return Fault(reason, text, again=False, stop=True)
    if status in (408, 409, 429) or status >= 500:
        return Fault(reason, text, pause=retry_after(headers))
    if TOO_LONG.search(f"{said} {code}"):
        return Fault(PROMPT_TOO_LONG, text, again=False)
    own = ECHO.sub("", said)
    if status in (400, 422) and BUDGET in own and NEW_BUDGET in own:
        return Fault(reason, text, again=False, renamed=True)
    if status in (400, 422) and BUDGET_REFUSED.search(own):
        return Fault(NO_SUCH_BUDGET, text, again=False, stop=True)
    return Fault(reason, text, again=False)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or a date (RFC 9110, §10.2.3)."""
    value = headers.get("retry-after", "")
    readers: Sequence[Callable[[], float]] = (
        lambda: float(headers.get("retry-after-ms", "")) / 1000,
        lambda: float(value),
        lambda: parsedate_to_datetime(value).timestamp() - time.time(),
    )
    for read in readers:
        with suppress(ValueError, OverflowError):
            if not math.isnan(found := read()):
                return max(found, 0.0)
    return None


class OpenAIEngine(ProbedEngine):
    """Answers through chat completions, many at once.

    Args:
        settings: of kind ``openai``.
        model: what the server calls its model.
        base_url: where it is, up to ``/v1``.
        usage: counts of all that is asked under these settings.
        chat: the model's own template where the model is at hand: prompts are then counted, and
            folded where it knows no system role, exactly as training will.
        template: variables of the chat template that each request brings; the server renders.
        context_length: of the model; longer prompts are not sent.
        server: set if it was launched for this engine.
    """

    remedy = (
        "Let it sample; transformers serve does so if the model's generation_config.json has "
        "do_sample: true."
    )

    def __init__(
        self,
        settings: EngineSettings,
        model: str,
        base_url: str,
        usage: Usage,
        *,
        chat: ChatFormat | None = None,
        template: Mapping[str, Any] | None = None,
        context_length: int | None = None,
        server: LaunchedServer | None = None,
    ) -> None:
        self.settings, self.model, self.base_url, self.usage = settings, model, base_url, usage
        self._chat, self._limit, self._server = chat, context_length, server
        more = {"chat_template_kwargs": dict(template)} if template else {}
        self._extra = {**settings.extra_body, **more}
        self._key = "" if server else os.environ.get(settings.api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"The key in {settings.api_key_env} holds a character that no HTTP header can "
                "have: one that is not ASCII, or is invisible, as a copied text may begin or end "
                f"with. Copy the key again, and set {settings.api_key_env} to that."
            )
        # one that was launched may have a token of the hub, and it could find more than it got
        told = secrets.values_of(secrets.KEYS | secrets.HUB_TOKENS).values()
        own = told if server else [self._key, *secrets.header_values()]
        self._spelled = secrets.spellings(own)
        self._spelled_long = secrets.spellings(k for k in own if len(k) >= SECRET)
        host = urlsplit(base_url).hostname or ""
        here = host in ("localhost", "::1") or host.startswith("127.")
        # organisation, project and headers of the environment go where its own key goes
        default = type(settings).model_fields["api_key_env"].default
        with_account = not server and settings.api_key_env == default
        with nullcontext() if with_account else secrets.without_account():
            self._client = openai.AsyncOpenAI(
                api_key=self._key or "none",
                base_url=base_url,
                max_retries=0,
                timeout=settings.timeout,
                http_client=openai.DefaultAsyncHttpxClient(
                    trust_env=not here,  # a proxy would look for its own loopback
                    follow_redirects=False,  # prompts go to the server that was named
                    event_hooks={"response": [_bound]},
                ),
                # what is packed could be longer than it looks
                default_headers={"Accept-Encoding": "identity"},
            )
        self.who = f"The server at {base_url}"
        self._failed_in_a_row, self._not_before = 0, 0.0
        self._budget, self._adapter = BUDGET, False
        self._pace, self._free = Pace(settings.concurrency), asyncio.Condition()
        self._under_way, self._told, self._told_reason = 0, "", False
        # in a thread of its own, so that requests go on while answers are used, also in notebooks
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the connections; a second time it does nothing."""
        if self._loop.is_closed():
            return
        if self._adapter:
            with suppress(Fault):  # a server that is gone has none
                self._change_adapters("unload", self.model)
        self._start(self._client.close()).result()
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
        names: list[str] = []

        async def look() -> None:
            client = self._client.with_options(timeout=LOOK_S)
            async with asyncio.timeout(LOOK_S):  # the client's own is for each read
                names.extend([m.id async for m in client.models.list() if isinstance(m.id, str)])
                if self.model not in names:  # some answer to names that they do not list
                    await client.chat.completions.create(
                        model=self.model, messages=[{"role": "user", "content": "Hi"}], max_tokens=1
                    )

        try:
            self._start(look()).result()
        except openai.APIStatusError as e:
            fault = self._status_fault(e)
            if e.status_code in (401, 403):
                raise self._refused(fault.said) from None
            if names and not fault.renamed:
                # not every server lists its models
                served = ", ".join(clip(self._hidden(name), 200) for name in names[:5])
                raise ConfigError(
                    f"{self.base_url} does not serve {self.model!r} but {served}"
                    f"{' …' if len(names) > 5 else ''} ({fault.said}). Set model to one of those."
                ) from None
        except (openai.APITimeoutError, TimeoutError):
            raise self._slow("its models and for one word") from None
        except openai.APIConnectionError as e:
            raise EngineError(
                f"Nothing answers at {self.base_url} ({self._hidden(_cause(e))}). Start the "
                "server, or correct base_url."
            ) from None
        except Fault as e:
            raise EngineError(
                f"{self.who} gave no usable answer when asked for its models: {e.said}. Correct "
                "base_url, or change the server."
            ) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            pass  # what it lists cannot be read; its answers may be

    def check_adapters(self) -> None:
        """Fails if the server loads no adapters; one that does misses those that are not there.

        Raises:
            EngineError: it loads none.
        """
        try:
            self._change_adapters("load", "selfsteer-check", lora_path="/selfsteer-check")
        except Fault as e:
            if "selfsteer-check" not in e.said:
                raise self._no_adapters("any adapters", e) from None

    def take_adapter(self, folder: Path) -> None:
        """From now on LoRA adapters answer, which vLLM loads and `close` has it unload.

        They are named by their content, as vLLM finds what it has computed of prompts by the name.

        Args:
            folder: of the adapters, at this path for the server, too.

        Raises:
            EngineError: the server does not load them.
        """
        self.model = f"selfsteer-{digest_path(folder)}"
        with suppress(Fault):  # what a run that was killed left there, maybe at another path
            self._change_adapters("unload", self.model)
        try:
            self._change_adapters("load", self.model, lora_path=str(folder.absolute()))
        except Fault as e:
            raise self._no_adapters(f"the adapters {folder}", e) from None
        self._adapter = True

    def _no_adapters(self, what: str, fault: Fault) -> EngineError:
        return EngineError(
            f"{self.who} does not load {what} ({fault.said}). It must be a vLLM that sees the run "
            "folder at the same path, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
            "environment, --enable-lora, and --max-lora-rank of policy.lora.rank or more. What is "
            "finished is kept; restart it, then run the same command again."
        )

    def _change_adapters(self, how: str, name: str, **more: str) -> None:
        asked = self._client.post(
            f"/{how}_lora_adapter", cast_to=str, body={"lora_name": name, **more}
        )
        with self._faults():
            self._start(asked).result()

    def _slow(self, what: str) -> EngineError:
        return EngineError(
            f"{self.who} is too slow: asked for {what}, it was not done within {LOOK_S:g} s. Wait "
            "until it has started or has less to do, or correct base_url; then run the same "
            "command again."
        )

    def _answer(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance
    ) -> Iterator[Completion]:
        yield from self._as_they_come(lambda put: self._ask_all(requests, sampling, put), advance)

    def _as_they_come(
        self,
        ask: Callable[[Callable[[Completion], None]], Coroutine[Any, Any, None]],
        advance: Advance,
    ) -> Iterator[Completion]:
        """What ``ask`` puts, while it goes on."""
        answered: SimpleQueue[Completion | None] = SimpleQueue()

        async def work() -> None:
            counting = asyncio.create_task(self._keep_counts())
            try:
                await ask(answered.put)
            finally:
                counting.cancel()

        asking = self._start(work())
        asking.add_done_callback(lambda _: answered.put(None))
        try:
            while (answer := answered.get()) is not None:
                advance(1, answer.completion_tokens)
                yield answer
            asking.result()
        finally:
            asking.cancel()

    async def _keep_counts(self) -> None:
        """Writes the counts of answers that came together, after which none came for long."""
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            self.usage.save(now=True)

    async def _ask_all(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        put: Callable[[Completion], None],
    ) -> None:
        todo = iter(requests)
        failed: list[tuple[Request, Completion]] = []

        async def work() -> None:
            for request in todo:
                answer = await self._ask(request, sampling)
                if not self._failed_in_a_row:  # the server lives: these failed by themselves
                    for _, earlier in failed:
                        put(earlier)
                    failed.clear()
                if self._failed_in_a_row and answer.finish_reason.startswith(REQUEST_FAILED):
                    failed.append((request, answer))
                else:
                    put(answer)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.concurrency, len(requests))):
                    group.create_task(work())
            if failed:
                # a server that dies with the last requests of a call must not cost their records
                self._failed_in_a_row = DEAD_AFTER - 1
                alive = Request("alive", (Message("user", PROBES[0]),), 0)
                await self._ask(alive, SamplingParams(0.0, 1.0, PROBE_TOKENS))
                self._failed_in_a_row = 0
            for request, answer in failed:
                self.usage.counts[answer.finish_reason] -= 1
                put(await self._ask(request, sampling))
        except ExceptionGroup as e:
            raise e.exceptions[0] from None
        finally:
            self.usage.save(now=True)
            self._tell_pace()

    def _tell_pace(self) -> None:
        """Says how many requests at a time the server gets, where that was found out anew."""
        pace = self._pace
        told = f"{pace.limit} requests at a time; {pace.why}"
        if pace.why and told != self._told:
            self._told = told
            say(f"  {self.base_url} gets {told}")

    def _body(
        self, request: Request, sampling: SamplingParams
    ) -> tuple[dict[str, Any], int] | Completion:
        """What to send, and tokens of the prompt at most; or that the prompt is too long."""
        name, messages = request.id, request.messages
        tokens = sum(len(m.content.encode()) + TEMPLATE_TOKENS for m in messages)
        if self._chat is not None:
            for refused in refusals(self._chat, [request]).values():
                self.usage.counts[refused.finish_reason] += 1
                return refused
            tokens = len(self._chat.prompt_ids(messages))
            if self._limit is not None and tokens + sampling.max_new_tokens > self._limit:
                return Completion(name, "", PROMPT_TOO_LONG, tokens, 0)
            messages = tuple(self._chat.folded(messages))
        body = {
            "model": self.model,
            "messages": [m.to_dict() for m in messages],
            "seed": request.seed & 0x7FFFFFFF,  # 31 bits: some servers keep a seed in an int32
            self._budget: sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        return body, tokens

    async def _ask(self, request: Request, sampling: SamplingParams) -> Completion:
        """One answer, whatever it takes within the retries."""
        name, made = request.id, self._body(request, sampling)
        if isinstance(made, Completion):
            return made
        body, tokens = made
        tries = 0
        while True:
            try:
                reply = await self._try(body, tokens + sampling.max_new_tokens)
                break
            except Fault as fault:
                if fault.renamed and BUDGET in body:
                    self._budget = NEW_BUDGET  # of all requests from now on
                    body[NEW_BUDGET] = body.pop(BUDGET)
                    continue
                if fault.stop:
                    raise self._stopped(fault, sampling) from None
                if self._server is not None:
                    self._server.check()
                if not fault.again or tries == self.settings.retries:
                    return self._failed(name, fault, tries)
                await self._wait(fault, tries)
                self.usage.counts["retried"] += 1
                tries += 1
        return self._answered(name, reply)

    def _answered(self, name: str, reply: Reply) -> Completion:
        self._failed_in_a_row = 0
        if reply.finish_reason not in ("stop", "length"):
            known = reply.finish_reason in NO_ANSWER
            if not known and not self._told_reason:
                self._told_reason = True
                warn(
                    f"{self.who} ends answers with finish_reason "
                    f"{short(self._hidden(reply.finish_reason))}, which selfsteer does not know. "
                    "Such answers are left out"
                )
            reason = f"{REQUEST_FAILED}:{reply.finish_reason if known else 'finish_reason'}"
            reply = reply._replace(text="", finish_reason=reason, reasoning="")
            self.usage.counts[reply.finish_reason] += 1
        return Completion(name, *reply)

    async def _try(self, body: dict[str, Any], most_tokens: int) -> Reply:
        """One request, once it is its turn.

        Args:
            body: what to send.
            most_tokens: prompt and answer at most; held back from the budget until it is known.
        """
        async with self._turn():
            await self._admitted(most_tokens)
            sent, began = self._pace.sent(self._under_way), time.monotonic()
            try:
                reply = await self._send(body, most_tokens)
            except Fault as fault:
                if fault.reason in BUSY:
                    self._pace.refused(sent)
                raise
            self._pace.answered(sent, time.monotonic() - began)
            return reply

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A block that as many are in as the pace allows."""
        async with self._free:
            await self._free.wait_for(lambda: self._under_way < self._pace.limit)
            self._under_way += 1
        try:
            yield
        finally:
            async with self._free:
                self._under_way -= 1
                self._free.notify(max(0, self._pace.limit - self._under_way))

    async def _send(self, body: dict[str, Any], most_tokens: int) -> Reply:
        usage = self.usage
        usage.counts["requests"] += 1
        usage.under_way += most_tokens
        try:
            with self._faults():
                async with asyncio.timeout(self.settings.timeout):
                    found = await self._client.chat.completions.with_raw_response.create(
                        **body, extra_body=self._extra or None
                    )
            reply = self._read(found.http_response.content)
            usage.count(*reply.used)
        except Fault as fault:  # what cannot be used is paid for as well
            usage.count(*fault.used)
            raise
        finally:
            usage.under_way -= most_tokens
            usage.save()
        return reply

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """A block whose errors of the client become `Fault`."""
        try:
            yield
        except openai.APIStatusError as e:
            raise self._status_fault(e) from None
        except (openai.APITimeoutError, TimeoutError):
            seconds = f"{self.settings.timeout:g} s"
            raise Fault("timeout", f"no answer within {seconds}") from None
        except openai.APIConnectionError as e:
            raise Fault("connection", clip(self._hidden(_cause(e)), 300)) from None

    def _read(self, body: bytes) -> Reply:
        """`read_reply`, without the key."""
        reply = read_reply(body, self._chat, self._hidden)
        if not self._spelled_long:
            return reply
        text = secrets.without(reply.text, self._spelled_long)
        thoughts = secrets.without(reply.reasoning, self._spelled_long)
        return reply._replace(text=text, reasoning=thoughts)

    async def _admitted(self, tokens: int) -> None:
        """Waits until the next request may be sent; raises EngineError if it never may."""
        s, counts = self.settings, self.usage.counts
        while True:
            await self._allowed()
            if s.max_requests is not None and counts["requests"] >= s.max_requests:
                limit = f"max_requests {s.max_requests:,}"
            elif not (passed := self._passed(tokens)):
                return
            elif self.usage.under_way:
                await asyncio.sleep(0.02)  # what is under way may take less than it could
                continue
            else:
                limit = passed
            raise EngineError(
                f"The next request to {self.base_url} could pass {limit}: this run has sent "
                f"{counts['requests']:,} requests, {counts['prompt_tokens']:,} tokens in and "
                f"{counts['completion_tokens']:,} out. Finished answers are kept; raise the limit "
                "and run the same command to go on."
            )

    async def _allowed(self) -> None:
        """Waits until the pause that the server asked for is over."""
        while (pause := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    def _passed(self, tokens: int) -> str:
        """The limit that so many more tokens could pass; empty where none is.

        What is not known yet costs as much as it can.
        """
        s, counts = self.settings, self.usage.counts
        open_ = self.usage.under_way + tokens
        used = counts["prompt_tokens"] + counts["completion_tokens"] + open_
        if s.max_tokens_total is not None and used > s.max_tokens_total:
            return f"max_tokens_total {s.max_tokens_total:,}"
        if s.max_cost is not None and s.price is not None:
            most = s.price.of(counts) + open_ * max(s.price.input, s.price.output) / 1e6
            if most > s.max_cost:
                return f"max_cost {s.max_cost:g} ({s.price.of(counts):.4g} so far)"
        return ""

    async def _wait(self, fault: Fault, tries: int) -> None:
        pause = fault.pause or 0.0
        if pause > LONGEST_PAUSE:
            raise EngineError(
                f"{self.who} asks to wait {pause:,.0f} s ({fault.said}). Finished answers are "
                "kept; run the same command again then."
            )
        if pause > 30:
            say(f"  the server asks for a pause of {pause:.0f} s")
        self._not_before = max(self._not_before, time.monotonic() + pause)
        # also after a pause: all requests come back from it at once, and are refused again
        wait = min(self.settings.backoff * 2.0 ** min(tries, 99), LONGEST_BACKOFF)
        await asyncio.sleep(wait * JITTER.uniform(0.5, 1.0))

    def _failed(self, name: str, fault: Fault, tries: int) -> Completion:
        if fault.reason == PROMPT_TOO_LONG:
            self._failed_in_a_row = 0
            return Completion(name, "", PROMPT_TOO_LONG, 0, 0)
        reason = f"{REQUEST_FAILED}:{fault.reason}"
        self.usage.counts[reason] += 1
        self._failed_in_a_row += 1
        what = f"after {tries + 1} tries ({fault.reason}: {fault.said})"
        if self._failed_in_a_row >= DEAD_AFTER:
            log = ""
            if self._server is not None:
                self._server.failed, log = True, f" (its log: {self._server.log})"
            if not fault.again:
                raise EngineError(
                    f"{self.who} refuses one request after the other, the last one for this: "
                    f"{fault.said}. Finished answers are kept; change what it objects to (its "
                    "engine's extra_body, the temperature, the queries), then run the same command "
                    "again."
                )
            raise EngineError(
                f"{self.who} gave no usable answer to several requests in a row, "
                f"the last one {what}. Finished answers are kept; check the server{log}, then run "
                "the same command again."
            )
        warn(f"a request failed for good {what}")
        return Completion(name, "", reason, 0, 0)

    def _stopped(self, fault: Fault, sampling: SamplingParams) -> EngineError:
        """What a fault means after which no request at all can succeed."""
        if fault.reason == NO_SUCH_BUDGET:
            return EngineError(
                f"{self.who} refuses answers of up to {sampling.max_new_tokens:,} tokens "
                f"({fault.said}). Lower max_new_tokens of what asks it, such as sampling "
                "or principles, then run the same command again."
            )
        return self._refused(fault.said)

    def _refused(self, said: str) -> EngineError:
        return EngineError(
            f"{self.who} refuses model {self.model!r} ({said}). Check base_url, model "
            "and the key: the environment variable "
            f"{self.settings.api_key_env} {'is set' if self._key else 'is not set'}."
        )

    def _status_fault(self, error: openai.APIStatusError) -> Fault:
        headers = {name: self._hidden(text) for name, text in error.response.headers.items()}
        return status_fault(error.status_code, self._hidden(error.message), error.code, headers)

    def _hidden(self, text: str) -> str:
        """The text without the key: servers quote what they refuse."""
        return secrets.without(text, self._spelled)


async def _bound(response: Any) -> None:
    """Makes a reply that is packed, or longer than it may be, a `Fault`."""
    if response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise Fault("packed_reply", "its Content-Encoding is not identity, which was asked for")
    stream, read = response.stream, 0
    is_file = response.url.path.endswith("/content")
    longest = LONGEST_FILE if is_file else LONGEST_REPLY

    class Bounded(type(stream)):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal read
            async for chunk in stream:
                read += len(chunk)
                if read > longest:
                    said = f"it is longer than {longest:,} bytes"
                    raise Fault("long_reply", said, again=not is_file)
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()


def _cause(error: BaseException) -> str:
    """What lies under the client's ``Connection error.``."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
