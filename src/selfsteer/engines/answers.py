"""Answers by id, kept in a file as they come, so that no finished answer is asked for again."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from selfsteer.data.jsonl import disk_errors, dump_line
from selfsteer.engines.base import (
    REQUEST_FAILED,
    Advance,
    Completion,
    Engine,
    Request,
    SamplingParams,
    cut,
    no_news,
)


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
        store: JSONL file that gets each answer as it comes. What an earlier try with the same
            arguments left there is not asked for again: whole batches of an engine that computes
            in batches, single answers otherwise. Requests that failed are not stored.
        advance: receives (requests, new tokens) as they finish.

    Raises:
        ValueError: two requests have the same id.
    """
    if len({r.id for r in requests}) < len(requests):
        raise ValueError("two requests have the same id")
    found = {} if store is None else _stored(store, requests, engine.batch_size)
    if found:
        advance(len(found), 0)
    todo = [r for r in requests if r.id not in found]
    if todo:
        path = store or Path(os.devnull)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        with file:
            file.write("\n")  # ends a line that a kill cut short
            for answer in engine.generate(todo, sampling, advance):
                found[answer.id] = answer
                if not answer.finish_reason.startswith(REQUEST_FAILED):
                    with disk_errors(path):
                        file.write(dump_line(asdict(answer)))
    return {r.id: found[r.id] for r in requests}


def _stored(store: Path, requests: Sequence[Request], size: int | None) -> dict[str, Completion]:
    """The stored answers that count; lines cut short by a kill are ignored."""
    known: dict[str, Completion] = {}
    for line in store.read_bytes().splitlines() if store.exists() else ():
        with suppress(ValueError, TypeError):
            answer = Completion(**json.loads(line))
            known[answer.id] = answer
    whole = cut(requests, size) if size else [[r] for r in requests]
    return {
        r.id: known[r.id] for batch in whole if all(r.id in known for r in batch) for r in batch
    }
