"""The first estimate respects the user's limits, and can be planned on any number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from estimate.test_estimate import DEVICE
from estimate.test_operations import shape

from hf_hetero import HeteroConfig, Planner, Topology
from hf_hetero.estimate.estimate import estimate_cost_model
from hf_hetero.estimate.first_estimate import restricted


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 12])
def test_every_rank_count_can_be_planned(num_ranks: int) -> None:
    """On any number of ranks the estimate gives valid plans, up to a sample that needs all of them."""
    topology = Topology(num_ranks, None, 2**30)
    cost = estimate_cost_model(shape(), DEVICE, topology, topology.degrees)
    cost = restricted(cost, HeteroConfig(max_tokens_per_rank=100), num_ranks, num_heads=16)
    lengths = [100 * num_ranks, 3, 50, 99, 100, 1, 20]
    plan = Planner(cost, num_ranks=num_ranks).plan(lengths)
    assert plan.num_samples == len(lengths)
    for group in plan.groups:
        assert sum(lengths[s] for s in group.samples) <= 100 * group.degree


def test_limits() -> None:
    """max_degree, the number of heads and max_tokens_per_rank bind."""
    cost = estimate_cost_model(shape(), DEVICE, Topology(8, None, 2**30), (1, 2, 4, 8))
    assert restricted(cost, HeteroConfig(max_degree=2), 8, num_heads=32).degrees(8) == (1, 2)
    assert restricted(cost, HeteroConfig(), 8, num_heads=4).degrees(8) == (1, 2, 4, 8)
    assert restricted(cost, HeteroConfig(methods=["ulysses"]), 8, num_heads=4).degrees(8) == (1, 2, 4)
    assert restricted(replace(cost, kv_bytes_per_token=None), HeteroConfig(), 8, num_heads=4).degrees(8) == (1, 2, 4)
    assert restricted(cost, HeteroConfig(max_tokens_per_rank=77), 8, 32).capacity_tokens == 77
