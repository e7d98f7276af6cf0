"""The choice under a budget, against all choices there are."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearplane.run.mix import allocate

# Few distinct numbers, so that ties and equal sums are common; or many, and of every size.
NUMBERS = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1), st.floats(1e-9, 1e-6), st.just(0.0))
COSTS = st.one_of(st.integers(0, 5), st.integers(0, 10**12), st.integers(1, 8).map(lambda k: 13824 * k))
ITEMS = st.lists(st.lists(st.tuples(COSTS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=6)


def value(items: list[list[tuple[int, float]]], picks: tuple[int, ...] | list[int]) -> tuple[int, float]:
    chosen = [item[pick] for item, pick in zip(items, picks, strict=True)]
    return sum(cost for cost, _ in chosen), sum(error for _, error in chosen)


@settings(max_examples=150, deadline=None)
@given(ITEMS, st.floats(0, 1.1))
def test_no_choice_within_the_budget_is_better(items: list[list[tuple[int, float]]], share: float) -> None:
    low, high = (sum(end(cost for cost, _ in item) for item in items) for end in (min, max))
    budget = low + int(share * (high - low))
    picks = allocate([[c for c, _ in item] for item in items], [[e for _, e in item] for item in items], budget)
    every = [value(items, some) for some in itertools.product(*(range(len(item)) for item in items))]
    best = min(error for cost, error in every if cost <= budget)
    cost, error = value(items, picks)
    assert cost <= budget
    assert error == pytest.approx(best, rel=1e-12, abs=0)


def test_greedy_would_fail_here() -> None:
    """The steepest step first leaves no room for the two that are better together."""
    costs, errors = [[0, 6], [0, 5], [0, 5]], [[7.0, 0.0], [5.5, 0.0], [5.5, 0.0]]
    assert allocate(costs, errors, 10) == [0, 1, 1]


def test_less_than_the_cheapest_is_refused() -> None:
    with pytest.raises(ValueError, match="costs 5, more than 4"):
        allocate([[2, 9], [3]], [[1.0, 0.0], [1.0]], 4)
    assert allocate([], [], 0) == []


def made_up(items: int) -> tuple[list[list[int]], list[list[float]], int]:
    """Items whose costs share no divisor worth the name, and a budget between three and four bits."""
    dice = random.Random(items)
    costs, errors = [], []
    for _ in range(items):
        size, worth = dice.randint(10**6, 10**8), dice.uniform(0.1, 3)
        costs.append([size * bits + dice.randint(0, 3) for bits in (2, 3, 4, 8)])
        errors.append([worth * 4.0**-bits * dice.uniform(0.5, 2) for bits in (2, 3, 4, 8)])
    return costs, errors, sum(int(0.4 * (some[0] + some[2])) for some in costs) + sum(some[0] for some in costs) // 3


@pytest.mark.parametrize("items", [100, 1000])
def test_no_exchange_of_two_items_helps_a_large_model(items: int) -> None:
    costs, errors, budget = made_up(items)
    picks = allocate(costs, errors, budget)
    assert picks == allocate(costs, errors, budget)
    left = budget - sum(some[k] for some, k in zip(costs, picks, strict=True))
    assert left >= 0
    moves = [
        (item, cost[other] - cost[k], error[other] - error[k])
        for item, (cost, error, k) in enumerate(zip(costs, errors, picks, strict=True))
        for other in range(len(cost))
        if other != k
    ]
    assert not any(cost <= left and error < 0 for _, cost, error in moves)
    for a, b in itertools.combinations(moves[:300], 2):
        assert a[0] == b[0] or a[1] + b[1] > left or a[2] + b[2] > -1e-9


def test_the_budget_is_kept_to_the_byte() -> None:
    """Eight bytes in 10^12 are within the solver's tolerance, and beyond the budget."""
    step = 10**12
    costs = [[0, step + 8], [0, step]]
    errors = [[1.0, 0.0], [1.0, 1e-3]]
    assert allocate(costs, errors, step + 7) == [0, 1]
    assert allocate(costs, errors, step + 8) == [1, 0]
