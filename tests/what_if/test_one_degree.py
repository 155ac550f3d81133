"""Plans with one degree keep memory and count every sample, and follow the rules that they are named after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from costs.test_cost_model import a_cost_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero import CostModel, Plan, Planner
from hf_hetero.what_if.one_degree import first_come, in_rows, verl, wlb_llm

COST = a_cost_model()
"""A rank holds 100 tokens."""


def rows_of_50(lengths: Sequence[int], cost: CostModel, num_ranks: int, degree: int) -> Plan:
    return in_rows(lengths, cost, num_ranks, degree, 50)[0]


def samples(plan: Plan) -> list[list[list[int]]]:
    """The samples of each group that has any, by micro-batch."""
    return [[list(group.samples) for group in m.groups if group.samples] for m in plan.micro_batches]


@pytest.mark.parametrize("way", [verl, wlb_llm, first_come, rows_of_50])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.sampled_from([(4, 1), (4, 2), (4, 4), (5, 2), (8, 4)]))
def test_a_valid_plan(
    way: Callable[[Sequence[int], CostModel, int, int], Plan], lengths: list[int], run: tuple[int, int]
) -> None:
    """Each sample once, one degree, no group above its memory, and never below the certified bound."""
    num_ranks, degree = run
    plan = way(lengths, COST, num_ranks, degree)
    assert sorted(s for m in samples(plan) for held in m for s in held) == list(range(len(lengths)))
    for group in plan.groups:
        assert group.degree == (degree if group.samples else 1)
        assert sum(lengths[sample] for sample in group.samples) <= degree * COST.capacity_tokens
    assert COST.plan_seconds(plan, lengths) >= Planner(COST, num_ranks).plan(lengths).lower_bound_s * (1 - 1e-9)


def test_first_come() -> None:
    """Packs are filled in order; a sample that does not fit begins the next, though an earlier one has room for it."""
    assert samples(first_come([60, 50, 40, 10, 90], COST, 2, 1)) == [[[0], [1, 2, 3]], [[4]]]


def test_rows() -> None:
    """With a context of 50, two rows fit; each is padded to the longer of both, however short all are."""
    plan, padded = in_rows([10, 30, 5, 5, 50], COST, 2, 1, 50)
    assert samples(plan) == [[[0, 1], [2, 3]], [[4]]]
    assert padded == [30, 30, 5, 5, 50]
    assert COST.plan_seconds(plan, padded) == pytest.approx(COST.seconds([30, 30], 1) + COST.seconds([50], 1))


def test_wlb_llm_takes_the_pack_with_least_work() -> None:
    """Longest first: 60, 50, then 40 beside the 50, 30 beside the 60, and 10 where less work is."""
    (packs,) = samples(wlb_llm([10, 60, 30, 50, 40], COST, 2, 1))
    assert sorted(map(sorted, packs)) == [[0, 3, 4], [1, 2]]
    assert len(samples(wlb_llm([60, 60, 60], COST, 2, 1))) == 2


def test_verl_gives_groups_as_many_samples() -> None:
    """Each group gets as many samples over all micro-batches, and all have as many micro-batches."""
    lengths = [90, 80, 10, 10, 10, 10, 10, 10]
    plan = verl(lengths, COST, 2, 1)
    assert len(plan.micro_batches) == 2
    held = [[s for m in plan.micro_batches for s in m.groups[rank].samples] for rank in range(2)]
    assert [len(group) for group in held] == [4, 4]
    assert sorted(max(lengths[s] for s in group) for group in held) == [80, 90]


def test_verl_keeps_memory() -> None:
    """Two micro-batches hold 60 + 60 + 60 tokens by their sum, but not these samples: there is a third."""
    assert samples(verl([60, 60, 60], COST, 1, 1)) == [[[0]], [[1]], [[2]]]
