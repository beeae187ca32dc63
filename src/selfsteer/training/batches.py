"""Which queries an optimiser step takes, and how they fill its rows.

The number of queries in a step is exact. Lengths decide the rest: steps, ranks and rows get nearly
equal work, and no row holds more tokens than the budget unless a single query does.
"""

import heapq
import math
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from selfsteer.data.digests import derive_seed


def deal_steps(costs: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """One epoch: every query once, ``size`` a step, lengths spread evenly over the steps.

    Sorted by cost, each run of as many queries as there are steps is dealt out at random, one to
    a step: every step gets its share of long and short ones. Where the queries do not divide, the
    last step takes a random remainder.

    Args:
        costs: tokens of each query.
        size: queries per optimiser step.
        rng: the only source of chance.
    """
    order = list(range(len(costs)))
    rng.shuffle(order)
    rest = len(order) % size
    last, order = order[:rest], order[rest:]
    order.sort(key=lambda i: costs[i])  # stable: equal costs stay shuffled
    steps: list[list[int]] = [[] for _ in range(len(order) // size)]
    for start in range(0, len(order), max(len(steps), 1)):
        stratum = order[start : start + len(steps)]
        rng.shuffle(stratum)
        for step, i in zip(steps, stratum, strict=True):
            step.append(i)
    return [*steps, last] if last else steps


def fill_rows(
    costs: Sequence[int], ranks: int, row_tokens: int, row_queries: int | None = None
) -> list[list[list[int]]]:
    """Spreads the queries of a step over rows of nearly equal work.

    Longest first, each to the row with the least in it. Every rank gets equally many rows, since
    ranks that gather weights layer by layer must walk in step; a row may be empty.

    Args:
        costs: tokens of each query.
        ranks: how many processes share the step.
        row_tokens: most tokens of a row; a query that is longer has a row to itself.
        row_queries: most queries of a row.

    Returns:
        [rank][row] → indices into ``costs``.

    >>> fill_rows([50, 10, 30, 30], ranks=1, row_tokens=64)
    [[[0, 1], [2, 3]]]
    >>> fill_rows([50, 10, 30], ranks=2, row_tokens=1000)
    [[[0]], [[1, 2]]]
    """
    most = len(costs) if row_queries is None else row_queries
    # a row per query always holds: more would be empty, and an empty row costs its rank a forward
    count = min(math.ceil(sum(costs) / (ranks * row_tokens)), math.ceil(len(costs) / ranks))
    count = max(1, count, math.ceil(len(costs) / (ranks * most)))
    while True:
        rows = _balance(costs, ranks * count, most)
        if all(len(row) < 2 or sum(costs[i] for i in row) <= row_tokens for row in rows):
            return [rows[rank::ranks] for rank in range(ranks)]
        count += 1


def _balance(costs: Sequence[int], count: int, most: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, k) for k in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        work, k = heapq.heappop(heap)
        rows[k].append(i)
        if len(rows[k]) < most:
            heapq.heappush(heap, (work + costs[i], k))
    return [sorted(row) for row in rows]


class StepSampler(Sampler[list[int]]):
    """The queries of one optimiser step after another, those of all ranks."""

    def __init__(self, costs: Sequence[int], size: int, seed: int) -> None:
        self.costs, self.size, self.seed = list(costs), size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    @property
    def batch_sampler(self) -> "StepSampler":
        """Where transformers' Trainer looks for `set_epoch`."""
        return self

    def __len__(self) -> int:
        return math.ceil(len(self.costs) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(derive_seed(self.seed, "epoch", self.epoch))
        return iter(deal_steps(self.costs, self.size, rng))
