"""Shards and those who answer them: one shard after the other, or many at once.

The work on a shard is a generator. It yields an `Ask`, is sent the answers, may ask again, and
returns what it made. So the same work runs in process, where each ask is answered on the spot, and
on engines that answer many asks at once (`ShardEngine`), where shards wait for each other's
answers; what they make does not depend on which.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from selfsteer.data.records import Message
from selfsteer.engines.base import Advance, Completion, Engine, SamplingParams, no_news

T = TypeVar("T")

#: Shards that wait for answers at once, at most: their records are in memory.
AT_ONCE = 256


@dataclass(frozen=True)
class Ask:
    """What a shard asks of an engine; see `Engine.generate`."""

    engine: Engine
    conversations: Sequence[Sequence[Message]]
    sampling: SamplingParams
    seed: int
    advance: Advance = no_news


#: What is done with one shard.
Work = Generator[Ask, list[Completion], T]


@runtime_checkable
class ShardEngine(Engine, Protocol):
    """An engine that answers many asks at once."""

    def generate_shards(self, asks: Sequence[Ask]) -> Iterator[tuple[int, list[Completion]]]:
        """The answers to each ask with its place among them, as they come.

        Each ask is answered as `Engine.generate` would answer it alone.
        """
        ...


def do(work: Work[T]) -> T:
    """One shard by itself."""
    (made,) = (made for _, made in at_once(lambda number, part: work, [(0, ())]))
    return made


def at_once(
    work: Callable[[int, Sequence[Any]], Work[T]],
    shards: Iterable[tuple[int, Sequence[Any]]],
) -> Iterator[tuple[int, T]]:
    """The number of each shard and what the work on it made, as shards are finished.

    Args:
        work: (number, items) → the work.
        shards: number and items; the next is taken when the one before is finished, or waits for
            an engine that answers many at once.
    """
    waiting: list[tuple[int, Work[T], Ask]] = []

    def go(number: int, todo: Work[T], answers: list[Completion] | None) -> Iterator[tuple[int, T]]:
        try:
            while True:
                ask = next(todo) if answers is None else todo.send(answers)
                if isinstance(ask.engine, ShardEngine):
                    waiting.append((number, todo, ask))
                    return
                answers = ask.engine.generate(
                    ask.conversations, ask.sampling, ask.seed, ask.advance
                )
        except StopIteration as end:
            yield number, end.value

    def answer_waiting() -> Iterator[tuple[int, T]]:
        while waiting:
            engine = waiting[0][2].engine
            asked = [w for w in waiting if w[2].engine is engine]
            waiting[:] = [w for w in waiting if w[2].engine is not engine]
            assert isinstance(engine, ShardEngine)
            for place, answers in engine.generate_shards([ask for *_, ask in asked]):
                number, todo, _ = asked[place]
                yield from go(number, todo, answers)

    for number, part in shards:
        yield from go(number, work(number, part), None)
        if len(waiting) >= AT_ONCE:
            yield from answer_waiting()
    yield from answer_waiting()
