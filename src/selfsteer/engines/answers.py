"""Answers by id, kept in a file as they come, so that no finished answer is asked for again."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfsteer import stopping
from selfsteer.data.digests import digest
from selfsteer.data.jsonl import disk_errors, dump_line
from selfsteer.engines.base import (
    REFUSED,
    REQUEST_FAILED,
    Advance,
    Completion,
    Engine,
    Request,
    SamplingParams,
    cut,
    no_news,
)

#: Begins the name of a store of one shard, or of all of a stage. Only these are of the same models
#: and settings as those beside them: a mark says nothing of who answered.
_OF_SHARDS = re.compile(r"answers-([0-9]{5,9}|all)\.")


def answers(
    engine: Engine,
    requests: Sequence[Request],
    sampling: SamplingParams,
    *,
    store: Path | None = None,
    advance: Advance = no_news,
) -> dict[str, Completion]:
    """All answers by request id, in the order of the requests.

    Args:
        engine: who answers.
        requests: with different ids.
        sampling: temperature, nucleus, budget.
        store: JSONL file that gets each answer as it comes. What an earlier try left there of the
            same requests, or in the stores of other shards beside it, is not asked for again: whole
            batches of an engine that computes in batches, single answers otherwise. Requests that
            failed are not stored, unless the chat template refuses them; one that is made from the
            answer to such a request may be another one in the next try.
        advance: receives (requests, new tokens) as they finish.

    Raises:
        ValueError: two requests have the same id.
        KeyboardInterrupt: the process was asked to stop; with a store, the batch in hand is in it.
    """
    marks = {r.id: _mark(r) for r in requests}
    if len(marks) < len(requests):
        raise ValueError("two requests have the same id")
    found = {} if store is None else _stored(store, requests, marks, engine.batch_size)
    if found:
        advance(len(found), 0)
    todo = [r for r in requests if r.id not in found]
    if todo:
        path = store or Path(os.devnull)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        # a batch counts as a whole or not at all, so that the one in hand is finished first
        size, before = engine.batch_size, len(found)
        with file, stopping.deferred() if store and size else nullcontext():
            file.write("\n")  # ends a line that a kill cut short
            for answer in engine.generate(todo, sampling, advance):
                found[answer.id] = answer
                reason = answer.finish_reason
                if reason == REFUSED or not reason.startswith(REQUEST_FAILED):
                    with disk_errors(path):
                        row = {**asdict(answer), "request": marks[answer.id]}
                        file.write(dump_line({**row, "sum": digest(row)}))
                if size and stopping.asked() and (len(found) - before) % size == 0:
                    raise KeyboardInterrupt
    return {r.id: found[r.id] for r in requests}


def _mark(request: Request) -> str:
    """What an answer depends on."""
    asked: list[Any] = [[m.to_dict() for m in request.messages], request.seed]
    if other := request.contrast:
        asked += [[m.to_dict() for m in other.messages], other.ratio]
    return digest(asked)


def _stored(
    store: Path, requests: Sequence[Request], marks: Mapping[str, str], size: int | None
) -> dict[str, Completion]:
    """The stored answers that count; lines that were cut short or changed are ignored."""
    known: dict[str, Completion] = {}
    paths = {store}
    if _OF_SHARDS.match(store.name):
        beside = store.parent.glob(f"answers-*{''.join(store.suffixes)}")
        paths.update(path for path in beside if _OF_SHARDS.match(path.name))
    for path in paths:
        for request, answer in filter(None, _lines(path)):
            if request == marks.get(answer.id):
                known[answer.id] = answer
    batches = cut(requests, size) if size else [[r] for r in requests]
    return {
        r.id: known[r.id] for batch in batches if all(r.id in known for r in batch) for r in batch
    }


def _lines(store: Path) -> Iterator[tuple[str, Completion] | None]:
    """Each line's mark and answer; None for one that was cut short or changed."""
    for line in filter(None, store.read_bytes().splitlines() if store.exists() else []):
        found = None
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            value = json.loads(line)
            if value.pop("sum") == digest(value):
                found = value.pop("request"), Completion(**value)
        yield found


def read_answers(store: Path) -> tuple[dict[str, Completion], int]:
    """The answers of a store that `answers` finished, by id; those that failed are not there.

    Returns:
        The answers, and how many lines were cut short or changed: `answers` may have asked for
        theirs again, or they were damaged later.
    """
    rows = list(_lines(store))
    return {row[1].id: row[1] for row in rows if row}, rows.count(None)
