import random

import pytest

from selfsteer.training.batches import StepSampler, deal_steps, fill_rows


@pytest.mark.parametrize(("count", "size"), [(64, 8), (61, 8), (5, 8), (8, 8), (9, 1)])
def test_every_query_is_dealt_once_and_steps_are_exact(count: int, size: int) -> None:
    costs = [(7 * i) % 53 + 1 for i in range(count)]
    steps = deal_steps(costs, size, random.Random(0))
    assert sorted(i for step in steps for i in step) == list(range(count))
    rest = [count % size] if count % size else []
    assert [len(s) for s in steps] == [size] * (count // size) + rest


def test_steps_get_nearly_equal_work() -> None:
    rng = random.Random(1)
    costs = [round(rng.lognormvariate(5, 0.7)) for _ in range(640)]
    dealt = [sum(costs[i] for i in step) for step in deal_steps(costs, 32, random.Random(0))]
    order = list(range(640))
    random.Random(0).shuffle(order)
    plain = [sum(costs[i] for i in order[k : k + 32]) for k in range(0, 640, 32)]

    def spread(values: list[int]) -> float:
        mean = sum(values) / len(values)
        return float((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 / mean)

    assert spread(plain) > 0.1
    assert spread(dealt) < spread(plain) / 2


def test_another_epoch_is_another_order_and_the_same_seed_the_same() -> None:
    sampler = StepSampler(list(range(1, 41)), 8, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert len(sampler) == len(first) == 5
    assert first == again
    assert first != second
    assert list(StepSampler(list(range(1, 41)), 8, seed=4)) != first


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("row_tokens", [1, 100, 400, 10_000])
def test_rows_hold_every_query_once_within_the_budget(ranks: int, row_tokens: int) -> None:
    rng = random.Random(2)
    costs = [rng.randint(5, 300) for _ in range(23)]
    shares = fill_rows(costs, ranks, row_tokens)
    assert len(shares) == ranks
    assert len({len(rows) for rows in shares}) == 1, "ranks must walk in step"
    rows = [row for share in shares for row in share]
    assert sorted(i for row in rows for i in row) == list(range(23))
    assert len(rows) < 23 + ranks, "an empty row costs a forward all the same"
    assert all(len(row) == 1 or sum(costs[i] for i in row) <= row_tokens for row in rows if row)
    work = [sum(costs[i] for row in share for i in row) for share in shares]
    if row_tokens == 10_000:
        assert len(rows) == ranks
        assert max(work) - min(work) <= max(costs) / 4


def test_rows_by_number_of_queries() -> None:
    shares = fill_rows([9, 1, 1, 1, 1, 1], ranks=1, row_tokens=10_000, row_queries=2)
    assert sorted(map(len, shares[0])) == [2, 2, 2]


def test_fewer_queries_than_ranks_leave_empty_rows() -> None:
    shares = fill_rows([5], ranks=3, row_tokens=100)
    assert sorted(shares) == [[[]], [[]], [[0]]]
