"""The solver we compare with is FlexSP's: its parts are optimal where the paper says so, and its plans are valid."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.flexsp import Settings, blast, bucket, fewest_micro_batches, least_degree, solve, virtual_groups
from planner.reference import optimal_seconds, small_cost

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def cuts(num_things: int, num_parts: int) -> list[list[range]]:
    """Every way to cut a row into parts, none of them empty."""
    bounds = [(0, *inner, num_things) for inner in combinations(range(1, num_things), num_parts - 1)]
    return [[range(a, b) for a, b in pairwise(b)] for b in bounds]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_blasting_is_optimal(lengths: list[int], num_chunks: int) -> None:
    """Of all cuts of the sorted samples, one whose largest chunk is smallest; each sample once."""
    if num_chunks > len(lengths):
        return
    chunks = blast(lengths, num_chunks)
    assert sorted(sample for chunk in chunks for sample in chunk) == list(range(len(lengths)))
    ordered = sorted(lengths, reverse=True)
    best = min(max(sum(ordered[i] for i in part) for part in parts) for parts in cuts(len(lengths), num_chunks))
    assert max(sum(lengths[sample] for sample in chunk) for chunk in chunks) == best


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_bucketing_is_optimal(lengths: list[int], num_buckets: int) -> None:
    """Of all cuts of the sorted samples, one that adds the fewest tokens."""
    found = bucket(lengths, range(len(lengths)), num_buckets)
    ordered, num_buckets = sorted(lengths), min(num_buckets, len(lengths))
    best = min(sum(len(part) * ordered[part[-1]] for part in parts) for parts in cuts(len(lengths), num_buckets))
    assert sum(len(b.samples) * b.bound_tokens for b in found) == best
    assert all(lengths[sample] <= b.bound_tokens for b in found for sample in b.samples)


def test_groups_that_may_open() -> None:
    """As many of each degree as the ranks have room for, beside those that the longest samples are sure to take."""
    cost = small_cost()
    longest = 4 * cost.capacity_tokens
    assert least_degree(longest, cost) == 4
    assert virtual_groups([longest, 1], cost, 8).count(4) == 2
    assert virtual_groups([longest, 1], cost, 8).count(1) == 4  # four ranks are taken
    assert 1 not in virtual_groups([longest, 1], cost, 8, min_degree=2)


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_valid_and_near_the_optimum(seed: int) -> None:
    """With SCIP: each sample once, within memory, no faster than brute force finds, and rarely much slower."""
    pytest.importorskip("pyscipopt")
    cost, chance = small_cost(), random.Random(seed)
    lengths = [chance.randint(1, 2 * cost.capacity_tokens) for _ in range(4)]
    found = solve(lengths, cost, 4, Settings(limit_s=5.0, num_counts=4))
    assert found.plan is not None
    assert found.plan.num_samples == len(lengths)
    for group in found.plan.groups:
        assert sum(lengths[sample] for sample in group.samples) <= group.degree * cost.capacity_tokens
    optimal_s = optimal_seconds(lengths, 4, cost)
    assert optimal_s * (1 - 1e-9) <= found.plan.seconds <= 1.5 * optimal_s
    assert min(found.seconds_by_count) == fewest_micro_batches(lengths, cost, 4)
    assert found.cpu_s >= max(program.cpu_s for program in found.programs) > 0
