"""Laws of packing samples into micro-batches of given durations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.reference import batches, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.planner.draft import micro_batch_seconds
from hf_hetero.planner.problem import make_problem
from hf_hetero.planner.search.packing import longest_samples, pack


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 6), st.floats(1.0, 500.0))
def test_what_is_packed_keeps_time_memory_and_ranks(
    batch: tuple[list[int], int, CostModel], num_micro_batches: int, duration_s: float
) -> None:
    """Each sample once; no group above its memory or its duration; no more ranks than there are."""
    lengths, num_ranks, cost = batch
    problem = make_problem(cost, num_ranks, None, lengths)
    durations = sorted((duration_s / (1 + m) for m in range(num_micro_batches)), reverse=True)
    packing = pack(problem, durations)
    if packing is None:
        return
    listed = packing.listed(problem)
    assert sorted(s for groups in listed for _, samples in groups for s in samples) == list(range(len(lengths)))
    for duration, groups in zip(durations, listed, strict=True):
        assert sum(degree for degree, _ in groups) <= num_ranks
        assert all(problem.group_seconds(degree, held) <= duration * (1 + 1e-9) + 1e-9 for degree, held in groups)
        for degree, held in groups:
            assert sum(problem.lengths[s] for s in held) <= problem.capacity * degree
    spans = [micro_batch_seconds(problem, groups) for groups in listed if groups]
    assert packing.makespans(problem) == pytest.approx(spans, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(batches(max_samples=30))
def test_a_sample_fits_its_own_seconds(batch: tuple[list[int], int, CostModel]) -> None:
    """A duration equal to the seconds of a sample holds that sample: rounding does not shut it out."""
    lengths, num_ranks, cost = batch
    problem = make_problem(cost, num_ranks, None, lengths)
    for index, degree in enumerate(problem.degrees):
        length = min(problem.lengths[0], problem.capacity * degree)
        assert longest_samples(problem, cost.seconds([length], degree))[index] >= length * (1 - 1e-9) - 1


def test_small_groups_are_joined_where_memory_is_lost_at_their_ends() -> None:
    """Samples of 0.66 of a rank: 24 of them fill 16 ranks only in groups of more than one."""
    problem = make_problem(small_cost(100), 8, None, [66] * 24)
    packing = pack(problem, [1e6, 1e6])
    assert packing is not None
    assert max(degree for groups in packing.draft(problem) for degree, _ in groups) > 1


def test_what_cannot_fit_is_told() -> None:
    """Too little memory, or too little time, is None."""
    problem = make_problem(small_cost(100), 2, None, [90, 80, 70])
    assert pack(problem, [1e6]) is None
    assert pack(problem, [60.0, 60.0]) is None
    assert pack(problem, [1e6, 1e6]) is not None
