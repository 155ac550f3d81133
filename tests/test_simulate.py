"""What-if totals: every way trains each sample once, within memory; ours is never slower than one degree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost_model import a_cost_model

from hf_hetero import Planner
from hf_hetero.errors import BadSample
from hf_hetero.simulate import busy_seconds, dynamic_cp, simulate

BATCHES = [[150, 20, 30, 40, 7, 90, 1], [10] * 30, [99, 98, 97, 96, 3, 3, 3], [390, 5]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.sampled_from([4, 5, 8]))
def test_dynamic_cp_is_a_valid_plan(lengths: list[int], num_ranks: int) -> None:
    """Each sample once (checked by Plan), and no group above its memory."""
    cost = a_cost_model()
    plan = dynamic_cp(lengths, cost, num_ranks, Planner(cost, num_ranks=num_ranks).degrees)
    assert plan.num_samples == len(lengths)
    for group in plan.groups:
        assert sum(lengths[sample] for sample in group.samples) <= group.degree * cost.capacity_tokens


def test_order_of_the_ways() -> None:
    """Bound <= adaptive <= one degree a batch <= one degree a run, and adaptive <= padded where it fits."""
    result = simulate(BATCHES, a_cost_model(), 4)
    seconds = {name: sum(way.seconds) for name, way in result.ways.items()}
    assert sum(result.bound_s) <= seconds["adaptive"] * (1 + 1e-9)
    assert seconds["adaptive"] <= seconds["batch-static"] <= seconds["static"]
    assert result.ways["static"].note == "degree 4"  # 390 tokens need all four ranks
    assert "padded" not in result.ways
    short = simulate([BATCHES[1]], a_cost_model(), 4)
    assert sum(short.ways["adaptive"].seconds) <= sum(short.ways["padded"].seconds)


def test_padding_costs_what_it_pads() -> None:
    """One long and three short samples on four ranks: padded, each rank takes as long as the long one."""
    cost = a_cost_model()
    result = simulate([[80, 10, 10, 10]], cost, 4)
    assert result.ways["padded"].seconds == [pytest.approx(cost.seconds([80], 1))]
    assert result.ways["padded"].num_micro_batches == 1


def test_json() -> None:
    """The JSON holds totals, speed-ups and ratios that agree with each other."""
    data = simulate(BATCHES, a_cost_model(), 4).to_dict()
    assert (data["format"], data["num_steps"], data["num_samples"]) == ("hf-hetero-simulation/1", 4, 46)
    for way in data["ways"].values():
        assert way["seconds"] == pytest.approx(sum(way["step_s"]))
        assert way["ratio_to_bound"] == pytest.approx(way["seconds"] / data["lower_bound_s"])
        assert way["speedup_of_adaptive"] == pytest.approx(way["seconds"] / data["ways"]["adaptive"]["seconds"])
        assert 0 <= way["idle_share"] < 1


def test_busy_seconds() -> None:
    """A rank is busy as long as its group; the slowest rank makes the plan's seconds."""
    cost, lengths = a_cost_model(), BATCHES[0]
    plan = Planner(cost, num_ranks=4).plan(lengths)
    busy = busy_seconds(plan, lengths, cost)
    assert sum(max(ranks) for ranks in busy) == pytest.approx(plan.seconds)
    assert all(len(ranks) == 4 for ranks in busy)


def test_nothing_to_simulate() -> None:
    """No steps, or a step without samples, is refused."""
    for batches in ([], [[]]):
        with pytest.raises(BadSample, match="nothing to simulate"):
            simulate(batches, a_cost_model(), 4)
