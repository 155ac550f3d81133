"""Laws of splitting numbers by differencing."""

from __future__ import annotations

import random
from heapq import heapify, heappop, heappush

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero.what_if.differencing import split

numbers = st.lists(st.integers(0, 10_000), max_size=60)


def sums(values: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(values[i] for i in part) for part in parts]


@settings(max_examples=150, deadline=None)
@given(numbers, st.integers(1, 9), st.booleans())
def test_each_number_is_in_one_part(values: list[int], num_parts: int, equal_counts: bool) -> None:
    """No number is lost or taken twice, and there are as many parts as asked for, heaviest first."""
    parts = split(values, num_parts, equal_counts)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(range(len(values)))
    assert sums(values, parts) == sorted(sums(values, parts), reverse=True)
    if equal_counts:
        assert max(map(len, parts)) - min(map(len, parts)) <= (len(values) % num_parts > 0)


@settings(max_examples=150, deadline=None)
@given(numbers)
def test_two_parts_differ_as_the_method_says(values: list[int]) -> None:
    """Of two parts, the sums differ by what is left when the two largest numbers are replaced by their difference."""
    heap = [-value for value in values]
    heapify(heap)
    while len(heap) > 1:
        heappush(heap, heappop(heap) - heappop(heap))
    heavy, light = sums(values, split(values, 2))
    assert heavy - light == (-heap[0] if heap else 0)


def test_an_example() -> None:
    """The textbook's: 8, 7, 6, 5 and 4 are split into 16 and 14, though 15 and 15 would be possible."""
    assert sums([8, 7, 6, 5, 4], split([8, 7, 6, 5, 4], 2)) == [16, 14]


@pytest.mark.parametrize("num_parts", [3, 8])
def test_parts_are_close(num_parts: int) -> None:
    """On long-tailed numbers, sums are closer than when numbers are dealt out in turn, longest first."""
    chance = random.Random(0)
    values = [int(chance.lognormvariate(5, 1)) for _ in range(200)]
    in_turn = sums(values, [list(range(part, 200, num_parts)) for part in range(num_parts)])
    close = sums(values, split(values, num_parts))
    assert close[0] - close[-1] < 0.1 * (max(in_turn) - min(in_turn))
