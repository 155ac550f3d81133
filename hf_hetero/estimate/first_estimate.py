"""The first estimate is the cost model that a run without a file starts from: a trainer's, or a forecast's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.estimate.devices import Device
from hf_hetero.estimate.estimate import estimate_cost_model
from hf_hetero.estimate.memory import Shards
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.estimate.state_layers import StateShape, with_state_layers
from hf_hetero.topology import Topology


def first_estimate(
    shape: ModelShape,
    device: Device,
    topology: Topology,
    shards: Shards | None,
    policies: Collection[str],
    hetero: HeteroConfig,
    states: StateShape | None = None,
) -> CostModel:
    """Estimate a cost model, under the user's limits.

    Args:
        shape, device, topology: what is estimated; `topology.memory_bytes` must be known.
        shards: how model states are sharded over ranks; None: each rank holds them all.
        policies: what groups may do to hold more tokens, of `plan.ACTIVATIONS`.
        hetero: the user's limits.
        states: layers of the model that carry state; None: it has none.

    Raises:
        ConfigError: the memory leaves room for no token.
    """
    cost = estimate_cost_model(shape, device, topology, topology.degrees, shards, policies)
    most = hetero.max_degree or topology.num_ranks  # what layers with state keep is counted for the largest group
    cost = with_state_layers(cost.with_degrees(d for d in topology.degrees if 1 < d <= most), states, shape)
    return restricted(cost, hetero, topology.num_ranks, shape.heads, policies)


def restricted(
    cost: CostModel, hetero: HeteroConfig, num_ranks: int, num_heads: int, policies: Collection[str] = ()
) -> CostModel:
    """Restrict a cost model to the user's limits, the model's heads, and what its layers can do to hold more.

    Where only heads can be exchanged, a rank without one would have nothing to do; other methods may go further.
    """
    cost = replace(cost, activation_policies={n: p for n, p in cost.activation_policies.items() if n in policies})
    most = hetero.max_degree or num_ranks
    if cost.kv_bytes_per_token is None or not {"gather", "ring", "token_ring"} & set(hetero.methods):
        most = min(most, num_heads)
    else:
        cost = replace(cost, num_heads=num_heads)
    cost = cost.with_degrees(degree for degree in cost.degrees(num_ranks) if degree <= most)
    return cost.with_capacity(hetero.max_tokens_per_rank) if hetero.max_tokens_per_rank else cost
