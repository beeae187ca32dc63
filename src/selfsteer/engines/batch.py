"""Asking a server in batches: files of requests that it answers within a day, at a lower price.

The shape is OpenAI's. A file of requests, one a line, goes to ``/files``; ``/batches`` makes a
batch of it, which is looked at until it is over; its answers and its errors are two more files,
with lines in any order.

The run folder keeps each batch in a file, which is written before the batch is made, with the mark
that the server keeps in its metadata, and again with its id. So a run that is killed at any moment
finds its batches: by id, or by mark in the server's list if it was killed in between. Requests are
known by what they ask, so the batches of a killed stage answer those that are still open. The files
stay, as what was paid for; a request that failed is asked again in another batch. A batch counts
when it is over, also where its answers are no longer needed.
"""

import asyncio
import io
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import digest
from selfsteer.data.jsonl import write_atomic
from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    Advance,
    Completion,
    Request,
    SamplingParams,
    no_news,
)
from selfsteer.engines.openai import (
    BUDGET,
    LONGEST_FILE,
    LONGEST_PAUSE,
    LOOK_S,
    NEW_BUDGET,
    Fault,
    OpenAIEngine,
    Reply,
    status_fault,
)
from selfsteer.errors import EngineError, clip
from selfsteer.terminal import say, warn

T = TypeVar("T")

#: What a file of requests may hold (OpenAI's guide to its Batch API).
MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000

#: Seconds between two looks at a batch, at first and at most; each time half as long again.
FIRST_LOOK, LAST_LOOK = 5.0, 300.0

#: Seconds after which a batch that is not over is given up; OpenAI's are over after a day.
LONGEST_BATCH = 48 * 3600.0

#: Pages of 100 batches that are searched for one whose id was lost; the newest come first.
PAGES = 100

#: What a batch is over with; it may have answers with any of them but ``failed``.
OVER = frozenset({"completed", "failed", "expired", "cancelled"})

#: Bytes of a token in a file of answers at most, on average, and of all else in an answer's line.
TOKEN_BYTES, LINE_BYTES = 16, 2048

#: Bytes a second of the slowest link that files may come and go by.
SLOWEST = 100_000

#: Ids of files and batches, which become part of addresses.
ID = re.compile(r"[\w:=-][\w.:=-]{0,199}", re.ASCII)

#: The code of a batch that waits for too many tokens beside those that wait already.
QUEUE_FULL = "token_limit_exceeded"


@dataclass
class Batch:
    """A batch as the run folder keeps it.

    Args:
        number: of its file.
        mark: in its metadata at the server.
        asked: keys of its requests.
        most: tokens of their prompts and answers at most.
        id: the server's; None: not known, nor whether it was made.
    """

    number: int
    mark: str
    asked: list[str]
    most: tuple[int, int]
    id: str | None = None


@dataclass
class Asked:
    """A request without an answer, what is sent of it, its prompt's most tokens, and its tries."""

    request: Request
    body: dict[str, Any]
    tokens: int
    tries: int = 0


class BatchEngine(OpenAIEngine):
    """Answers through batches; only the first open questions are sent one by one.

    Args:
        folder: where the batches are kept.
        args: as of `OpenAIEngine`.
        more: likewise.
    """

    def __init__(self, folder: Path, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._folder = folder
        #: file → inode and time when it was read, and what it said
        self._read_at = dict[Path, tuple[tuple[int, int], Batch]]()
        self._waiting = set[str]()

    @override
    def check(self) -> None:
        super().check()

        async def look() -> None:
            async with asyncio.timeout(LOOK_S):
                await self._listed()

        try:
            self._start(look()).result()
        except TimeoutError:
            raise self._slow("its batches") from None

    @override
    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance = no_news
    ) -> Iterator[Completion]:
        self._prepare(requests, sampling)
        try:
            yield from self._as_they_come(
                lambda put: self._in_batches(requests, sampling, put), advance
            )
        except KeyboardInterrupt:
            if names := sorted(self._waiting.copy()):
                say(
                    f"  {self.who} goes on with {', '.join(names)} and charges for it; the same "
                    "command waits for the answers again"
                )
            raise

    async def _in_batches(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        put: Callable[[Completion], None],
    ) -> None:
        open_: dict[str, Asked] = {}
        for request in requests:
            made = self._body(request, sampling)
            if isinstance(made, Completion):
                put(made)
                continue
            named = {k: v for k, v in made[0].items() if k not in (BUDGET, NEW_BUDGET)}
            key = digest([request.id, named, sampling.max_new_tokens, self._extra])
            open_[key] = Asked(request, *made)
        kept = self._read_kept()
        earlier = await self._earlier(open_, kept)
        # what is no longer open was answered
        answered = any(
            b.asked != keys for b in kept if (keys := [k for k in b.asked if k in open_])
        )
        most = MOST_REQUESTS
        try:
            while open_:
                known = {key for _, keys in earlier for key in keys}
                new = await self._submit(
                    [k for k in open_ if k not in known], open_, kept, sampling, most
                )
                faults: dict[str, Fault] = {}
                refused = list[tuple[Batch, EngineError]]()
                for batch, keys in [*earlier, *new]:
                    fresh, over = batch.mark not in self.usage.batches, await self._over(batch)
                    if over["status"] == "failed":
                        refused.append((batch, self._objection(batch, over, kept)))
                        continue
                    for key, said in (await self._results(batch, over, keys)).items():
                        if isinstance(said, Reply):
                            put(self._answered(open_.pop(key).request.id, said))
                            answered = True
                        elif fresh or said.reason == PROMPT_TOO_LONG:
                            faults[key] = said
                    if fresh and over["status"] == "cancelled":
                        raise EngineError(
                            f"Batch {batch.id} was cancelled at {self.base_url}. Its finished "
                            "answers are kept; run the same command again to ask for the others."
                        )
                if refused and len(refused) == len(earlier) + len(new):
                    most = await self._ask_fewer(refused, kept, most)
                elif refused:
                    say("  the server's queue was full; what it refused is sent again")
                for key, fault in faults.items():
                    if failed := self._lost(open_[key], fault, sampling, answered):
                        put(failed)
                        del open_[key]
                earlier = []
        finally:
            self.usage.save(now=True)

    def _lost(
        self, asked: Asked, fault: Fault, sampling: SamplingParams, answered: bool
    ) -> Completion | None:
        """What a request failed with, where it is not asked again.

        The server is not dead if others were ``answered``.
        """
        if fault.renamed and BUDGET in asked.body:
            self._budget = NEW_BUDGET
            return None
        if fault.stop:
            raise self._stopped(fault, sampling)
        if fault.again and asked.tries < self.settings.retries:
            asked.tries += 1
            self.usage.counts["retried"] += 1
            return None
        if answered:
            self._failed_in_a_row = 0
        return self._failed(asked.request.id, fault, asked.tries)

    async def _earlier(
        self, open_: Mapping[str, Asked], kept: list[Batch]
    ) -> list[tuple[Batch, list[str]]]:
        """Batches that were made for open requests, and for which: each one's last.

        Counts those that are over and were made for others, and the tries of the open requests: a
        request that failed as often as it may is asked anew.
        """
        found, left = [], set(open_)
        for batch in reversed(kept.copy()):
            if batch.id is None and (name := await self._listed(batch.mark)):
                self._made(batch, name)
            if batch.id is None:  # it was never made
                self._remove(batch, kept)
                continue
            counted = batch.mark in self.usage.batches
            for key in left.intersection(batch.asked):
                open_[key].tries -= not counted  # it is not over
            for key in open_.keys() & set(batch.asked):
                open_[key].tries += 1
            if keys := [key for key in batch.asked if key in left]:
                left -= set(keys)
                found.append((batch, keys))
                if not counted:
                    self._waiting.add(batch.id)
            elif not counted:
                await self._left_behind(batch, kept)
        for asked in open_.values():
            asked.tries %= self.settings.retries + 1
        return found[::-1]

    async def _left_behind(self, batch: Batch, kept: list[Batch]) -> None:
        """Counts a batch whose answers are no longer needed, if it is over."""
        over = await self._look(batch)
        if over["status"] == "failed":
            self._remove(batch, kept)
        elif over["status"] in OVER:
            await self._results(batch, over, [])
        else:
            warn(
                f"batch {batch.id} goes on at {self.base_url}, which charges for it; it was made "
                "for other requests than those of now: of another part of the run or other settings"
            )

    async def _submit(
        self,
        keys: Sequence[str],
        open_: Mapping[str, Asked],
        kept: list[Batch],
        sampling: SamplingParams,
        most: int,
    ) -> list[tuple[Batch, list[str]]]:
        """New batches of so many requests at most; only the first where that is for the queue.

        Raises:
            EngineError: with all that is open they could pass a limit.
        """
        if not keys:
            return []
        budget = sampling.max_new_tokens
        waiting = [b for b in kept if b.mark not in self.usage.batches]
        self._admit([open_[k].tokens for k in keys], budget, waiting)
        fits = max(1, LONGEST_FILE // (TOKEN_BYTES * budget + LINE_BYTES))
        made = []
        for part, lines in self._files(keys, open_, min(most, fits)):
            number = kept[-1].number + 1 if kept else 0
            tokens = sum(open_[key].tokens for key in part), len(part) * budget
            batch = Batch(number, digest([time.time_ns(), part]), part, tokens)
            self._save(batch)
            kept.append(batch)
            await self._create(batch, lines)
            made.append((batch, part))
            if most < MOST_REQUESTS:
                break
        return made

    def _files(
        self, keys: Sequence[str], open_: Mapping[str, Asked], most: int
    ) -> Iterator[tuple[list[str], bytes]]:
        """So many requests at most, and the files that ask them."""
        part, lines = list[str](), bytearray()
        for key in keys:
            body = open_[key].body
            if BUDGET in body:
                body[self._budget] = body.pop(BUDGET)
            line = json.dumps(
                {
                    "custom_id": key,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {**body, **self._extra},
                }
            ).encode()
            if part and (len(part) == most or len(lines) + len(line) >= MOST_BYTES):
                yield part, bytes(lines)
                part, lines = [], bytearray()
            part.append(key)
            lines += line + b"\n"
        yield part, bytes(lines)

    def _admit(self, prompts: Sequence[int], budget: int, waiting: Sequence[Batch]) -> None:
        """Fails if more requests could pass a limit, each at its longest.

        Args:
            prompts: most tokens of each request's prompt.
            budget: tokens of each answer.
            waiting: batches that are not counted yet.
        """
        s, count = self.settings, len(prompts)
        most = self.usage.counts + _used(count, sum(prompts), count * budget)
        for batch in waiting:
            most += _used(len(batch.asked), *batch.most)
        reaches = {
            "max_requests": most["requests"],
            "max_tokens_total": most["prompt_tokens"] + most["completion_tokens"],
            "max_cost": s.price.of(most) if s.price else 0.0,
        }
        for name, reached in reaches.items():
            limit = getattr(s, name)
            if limit is not None and reached > limit:
                raise EngineError(
                    f"{count:,} requests in batches to {self.base_url} could pass {name} "
                    f"{limit:,}: with them the run would come to {reached:,.6g} if every answer "
                    f"took all of its {budget:,} tokens. They were not sent, and finished answers "
                    "are kept. Raise the limit or lower max_new_tokens; without batch, requests "
                    "are sent one by one for as long as the limit allows."
                )

    async def _create(self, batch: Batch, lines: bytes) -> None:
        """Uploads requests and makes a batch of them, once."""
        client, again = self._client, False
        lacks = "has no batch endpoint; remove batch from its engine, which then asks one by one"

        async def upload() -> str:
            name = f"selfsteer-{batch.mark}.jsonl"
            found = await client.files.with_raw_response.create(
                file=(name, lines, "application/jsonl"), purpose="batch"
            )
            return self._id(_object(found))

        async def create() -> str:
            nonlocal again
            if again and (made := await self._listed(batch.mark)):  # only the reply was lost
                return made
            again = True
            found = await client.batches.with_raw_response.create(
                completion_window="24h",
                endpoint="/v1/chat/completions",
                input_file_id=file,
                metadata={"selfsteer": batch.mark},
            )
            return self._id(_object(found))

        file = await self._tried(upload, lacks, transfer=len(lines))
        self._made(batch, await self._tried(create, lacks))
        say(f"  batch {batch.id}: {len(batch.asked):,} requests, to be answered within 24 h")

    def _made(self, batch: Batch, name: str) -> None:
        batch.id = name
        self._save(batch)
        self._waiting.add(name)

    async def _listed(self, mark: str | None = None) -> str | None:
        """The id of the batch with this mark in the server's list; without one, a look at it."""
        after: Any = {}

        async def page() -> dict[str, Any]:
            return _object(await self._client.batches.with_raw_response.list(limit=100, **after))

        for _ in range(PAGES):
            found = await self._tried(
                page, "does not list its batches; remove batch from its engine"
            )
            match found.get("data"):
                case [*_, {"id": str(last)}] as listed:
                    for one in listed:
                        match one:
                            case {"id": str(), "metadata": {"selfsteer": str(own)}} if own == mark:
                                return self._id(one)
                    after["after"] = last
            if mark is None or not after or found.get("has_more") is not True:
                break
        return None

    async def _results(
        self, batch: Batch, over: Mapping[str, Any], keys: Sequence[str]
    ) -> dict[str, Reply | Fault]:
        """What became of these requests of a batch that is over; counts it once, in one write."""
        found, wanted, used = dict[str, Reply | Fault](), set(keys), [0, 0]
        again = set[str]()
        for name in ("output_file_id", "error_file_id"):
            if over.get(name) is None:
                continue
            for key, said in await self._lines(batch, self._id(over, name)):
                used = [n + took for n, took in zip(used, said.used, strict=True)]
                if isinstance(found.get(key), Reply):
                    again.add(key)
                elif key in wanted:
                    found[key] = said
        if again:
            warn(
                f"{self.who} answers {len(again):,} of the {len(batch.asked):,} requests of batch "
                f"{batch.id} more than once; the first answer of each is used"
            )
        if batch.mark not in self.usage.batches:
            self.usage.counts.update(_used(len(batch.asked), *used))
            self.usage.batches.add(batch.mark)
            self.usage.save(now=True)
        reason = "batch_expired" if over["status"] == "expired" else "no_line"
        lost = Fault(reason, f"the files of batch {batch.id} hold nothing of it")
        return {key: found.get(key, lost) for key in keys}

    async def _look(self, batch: Batch) -> dict[str, Any]:
        """What the server says of a batch."""
        assert batch.id is not None
        name = batch.id

        async def look() -> dict[str, Any]:
            found = _object(await self._client.batches.with_raw_response.retrieve(name))
            if not isinstance(found.get("status"), str):
                raise Fault("malformed_batch", "it says nothing of its status")
            return found

        return await self._tried(look, self._gone(batch), patience=LONGEST_PAUSE)

    async def _over(self, batch: Batch) -> dict[str, Any]:
        """What the server says of a batch that is over."""
        assert batch.id is not None
        name, pause, told, began = batch.id, FIRST_LOOK, "", time.monotonic()
        while True:
            found = await self._look(batch)
            match found.get("request_counts"):
                case {"completed": int(done), "total": int(total)} if total:
                    line = f"  batch {name}: {done:,} of {total:,} answered"
                    if line != told:
                        say(line)
                        told = line
            if found["status"] in OVER:
                self._waiting.discard(name)
                return found
            if time.monotonic() - began > LONGEST_BATCH:
                raise EngineError(
                    f"Batch {name} at {self.base_url} is not over after {LONGEST_BATCH / 3600:g} "
                    "hours. Run the same command again to wait for it, or cancel it there."
                )
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, LAST_LOOK)

    def _objection(self, batch: Batch, over: Mapping[str, Any], kept: list[Batch]) -> EngineError:
        """Why a batch was refused that is too long for the server's queue; it is forgotten.

        Raises:
            EngineError: it was refused for another reason.
        """
        self._remove(batch, kept)
        code = message = None
        match over.get("errors"):
            case {"data": [{"code": code, "message": message}, *_]}:
                pass
        said = clip(self._hidden(str(message)), 300)
        error = EngineError(
            f"{self.who} refuses batch {batch.id} of {len(batch.asked):,} requests: {said}. "
            "Nothing of it was asked; change what it objects to, then run the same command again."
        )
        if code != QUEUE_FULL:
            raise error
        return error

    async def _ask_fewer(
        self, refused: Sequence[tuple[Batch, EngineError]], kept: list[Batch], most: int
    ) -> int:
        """Most requests of a batch, after batches that were refused while none of these waited.

        Raises:
            EngineError: there is no room for a single request.
        """
        for batch in kept:
            if batch.mark not in self.usage.batches:  # one that was left behind takes the room
                await self._over(batch)
                await self._left_behind(batch, kept)
                return most
        batch, error = max(refused, key=lambda one: len(one[0].asked))
        if len(batch.asked) == 1:
            raise error
        most = len(batch.asked) // 2
        say(f"  too much for the server's queue; now {most:,} requests at a time")
        return most

    async def _lines(self, batch: Batch, file: str) -> list[tuple[str, Reply | Fault]]:
        """The lines of a file of answers or errors: keys, and what became of their requests."""

        async def download() -> bytes:
            found = await self._client.files.with_raw_response.content(file)
            return found.http_response.content

        data = io.BytesIO(await self._tried(download, self._gone(batch), transfer=LONGEST_FILE))
        return [row for line in data if (row := self._row(line)) is not None]

    def _row(self, line: bytes) -> tuple[str, Reply | Fault] | None:
        """One line; None where it names no request."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(key := value.get("custom_id"), str):
            return None
        status, error, response = None, value.get("error"), value.get("response")
        if isinstance(response, dict):
            status, error = response.get("status_code"), response.get("body")
            if status == 200:
                try:
                    return key, self._read(json.dumps(error).encode())
                except Fault as fault:
                    return key, fault
            error = error.get("error", error) if isinstance(error, dict) else error
        found = error if isinstance(error, dict) else {"message": error}
        said, code = self._hidden(str(found.get("message"))), found.get("code")
        if type(status) is int:
            return key, status_fault(status, said, code if isinstance(code, str) else None, {})
        reason = "batch_expired" if code == "batch_expired" else "batch_error"
        return key, Fault(reason, clip(said, 300))

    async def _tried(
        self,
        send: Callable[[], Awaitable[T]],
        missing: str,
        patience: float = 0.0,
        transfer: int = 0,
    ) -> T:
        """What a call gives, whatever it takes within the retries.

        Args:
            send: the call.
            missing: what it means that there is nothing at its address.
            patience: seconds in which there is no end to the retries.
            transfer: bytes of a file that the call may take with it.
        """
        tries, began = 0, time.monotonic()
        timeout = self.settings.timeout + transfer / SLOWEST
        while True:
            try:
                await self._allowed()
                with self._faults():
                    async with asyncio.timeout(timeout):
                        return await send()
            except Fault as fault:
                if fault.reason in ("http_404", "http_405"):
                    raise EngineError(f"{self.who} {missing} ({fault.said}).") from None
                if fault.stop:
                    raise self._refused(fault.said) from None
                spent = time.monotonic() - began
                if not fault.again or (tries >= self.settings.retries and spent >= patience):
                    raise EngineError(
                        f"{self.who} does not do its part of a batch ({fault.reason}: "
                        f"{fault.said}). Nothing that was asked is lost; check the server, then "
                        "run the same command again."
                    ) from None
                await self._wait(fault, tries)
                tries += 1

    def _gone(self, batch: Batch) -> str:
        return (
            f"does not have batch {batch.id} or its files: the key may be of another project, or "
            f"they were deleted. Set the right key, or remove {self._path(batch)} to pay for its "
            "requests again"
        )

    def _id(self, value: Mapping[str, Any], name: str = "id") -> str:
        found = value.get(name)
        if isinstance(found, str) and ID.fullmatch(found) and self._hidden(found) == found:
            return found
        raise Fault("malformed_batch", f"its {name} is none")

    def _read_kept(self) -> list[Batch]:
        """As `kept_in`, but a file that has not changed since is not read again."""
        found = {}
        for path in sorted(self._folder.glob("[0-9]*.json")):
            stat = path.stat()
            now = stat.st_ino, stat.st_mtime_ns
            then, batch = self._read_at.get(path, (None, None))
            found[path] = now, batch if batch and then == now else read_json(Batch, path)
        self._read_at = found
        return [batch for _, batch in found.values()]

    def _path(self, batch: Batch) -> Path:
        return self._folder / f"{batch.number:05d}.json"

    def _save(self, batch: Batch) -> None:
        write_atomic(self._path(batch), json.dumps(asdict(batch)) + "\n")

    def _remove(self, batch: Batch, kept: list[Batch]) -> None:
        """Forgets a batch of which nothing was asked."""
        self._path(batch).unlink()
        kept.remove(batch)


def kept_in(folder: Path) -> list[Batch]:
    """The batches of a run, in their order."""
    return [read_json(Batch, path) for path in sorted(folder.glob("[0-9]*.json"))]


def _used(requests: int, prompts: int, answers: int) -> Counter[str]:
    """Counts of so many requests and tokens, as `Usage` has them."""
    used = {"prompt_tokens": prompts, "completion_tokens": answers}
    batched = {f"batch_{name}": n for name, n in used.items()}
    return Counter({"requests": requests, **used, **batched})


def _object(found: Any) -> dict[str, Any]:
    """The JSON object of a raw reply."""
    try:
        value = json.loads(found.http_response.content)
    except (ValueError, RecursionError) as e:
        raise Fault("malformed_json", str(e)) from None
    if not isinstance(value, dict):
        raise Fault("malformed_answer", "it is no object")
    return value
