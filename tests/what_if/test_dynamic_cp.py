"""The baseline is a valid plan within memory, follows the published rule, and is no straw man."""

from __future__ import annotations

import pytest
from costs.test_cost_model import a_cost_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero import CostModel, Plan, Planner
from hf_hetero.plan_in_words import describe_degrees
from hf_hetero.what_if.dynamic_cp import dynamic_cp
from hf_hetero.what_if.sources import global_batches, read_source


def planned(lengths: list[int], num_ranks: int = 4) -> Plan:
    cost = a_cost_model()
    return dynamic_cp(lengths, cost, num_ranks, Planner(cost, num_ranks=num_ranks).degrees)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.sampled_from([4, 5, 8]))
def test_a_valid_plan(lengths: list[int], num_ranks: int) -> None:
    """Each sample once (checked by Plan), no group above its memory, and never below the certified bound."""
    cost = a_cost_model()
    plan = planned(lengths, num_ranks)
    assert plan.num_samples == len(lengths)
    for group in plan.groups:
        assert sum(lengths[sample] for sample in group.samples) <= group.degree * cost.capacity_tokens
    assert cost.plan_seconds(plan, lengths) >= Planner(cost, num_ranks).plan(lengths).lower_bound_s * (1 - 1e-9)


def test_degrees_by_length() -> None:
    """One rank holds 100 tokens: 90 tokens take one rank, 150 take two, 300 take four, and nothing is idle."""
    assert describe_degrees(planned([90, 150, 90])) == "[2 1x2]"
    assert describe_degrees(planned([390])) == "[4]"
    assert describe_degrees(planned([390, 150, 140])) == "[4] [2x2]"


def test_free_ranks_double_the_smallest_groups() -> None:
    """Two samples on four ranks: both groups grow; three: one does not."""
    assert describe_degrees(planned([50, 50])) == "[2x2]"
    assert describe_degrees(planned([90, 90, 90])) == "[2 1x2]"


def test_balanced_where_it_can_be() -> None:
    """Equal samples of one degree give equal ranks: as fast as one degree, whatever their number of micro-batches."""
    cost, lengths = a_cost_model(), [25] * 16
    assert cost.plan_seconds(planned(lengths), lengths) == pytest.approx(Planner(cost, 4).static(lengths).seconds)


@pytest.mark.parametrize(
    ("mix", "batch_size", "setting"),
    [("long-sft", 64, "LIMITS"), ("web", 32, "MORE_MICRO_BATCHES")],
    ids=["limit", "micro-batches"],
)
def test_tuned(mix: str, batch_size: int, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of tokens a rank, and the number of micro-batches, are chosen: without the choice it is slower."""
    cost = CostModel.load("llama-8b_8xa100_nvlink")
    (lengths,) = global_batches(read_source(mix, batch_size, max_tokens=65000), batch_size, 1)

    def seconds() -> float:
        return cost.plan_seconds(dynamic_cp(lengths, cost, 8, cost.degrees(8)), lengths)

    tuned = seconds()
    monkeypatch.setattr(f"hf_hetero.what_if.dynamic_cp.{setting}", {"LIMITS": (1,), "MORE_MICRO_BATCHES": 1}[setting])
    assert seconds() > 1.02 * tuned
