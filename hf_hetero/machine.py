"""Cost model and process groups of a run, the same on all ranks."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from hf_hetero import estimate
from hf_hetero.agreement import broadcast
from hf_hetero.config import HeteroConfig
from hf_hetero.cost_model import CostModel
from hf_hetero.exactness import base_model
from hf_hetero.groups import GroupPool
from hf_hetero.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """What planning and attention stand on.

    Args:
        cost_model: what groups cost, under the user's limits.
        groups: the process groups of every degree the cost model offers.
    """

    cost_model: CostModel
    groups: GroupPool


def set_up(model: torch.nn.Module, args: TrainingArguments, hetero: HeteroConfig, dtype: torch.dtype) -> Machine:
    """Read or estimate the cost model, agree on it, make the groups. A collective of all ranks.

    Raises:
        ConfigError: the cost model cannot be read, or leaves room for no token; raised on every rank.
    """
    world = args.world_size
    ranks_per_node = _ranks_per_node()
    topology = Topology(world, ranks_per_node, estimate.free_memory_bytes(args.device, ranks_per_node or world))
    heads = getattr(base_model(model).config, "num_attention_heads", world)
    # timed on all ranks at once, as training will run
    speed = None if hetero.cost_model else _speed(args.device, dtype)

    def make() -> CostModel:
        if speed is None:
            return restricted(CostModel.load(hetero.cost_model or ""), hetero, world, heads)
        shape = estimate.shape_of(model, _text_config(model), dtype.itemsize, bool(args.activation_checkpointing))
        return restricted(estimate.estimate_cost_model(shape, speed, topology, topology.degrees), hetero, world, heads)

    # the degrees of the cost model decide which groups exist, so it travels in a pool of its own
    messengers = GroupPool((), hetero.group_timeout_s, args.ddp_timeout)
    cost = broadcast(make, messengers.control)
    messengers.close()
    if args.process_index == 0:
        degrees = ", ".join(map(str, cost.degrees(world)))
        logger.warning(
            "Cost model %r: %d tokens a rank, degrees %s. %s", cost.name, cost.capacity_tokens, degrees, cost.source
        )
        if uneven := [degree for degree in cost.degrees(world) if heads % degree]:
            logger.warning("%d heads do not divide by degree %s: some ranks will compute more.", heads, uneven)
    return Machine(cost, GroupPool(cost.degrees(world), hetero.group_timeout_s, args.ddp_timeout))


def restricted(cost: CostModel, hetero: HeteroConfig, num_ranks: int, num_heads: int) -> CostModel:
    """A cost model under the user's limits and the model's heads: a rank without a head would have nothing to do."""
    most = min(hetero.max_degree or num_ranks, num_heads)
    cost = cost.with_degrees(degree for degree in cost.degrees(num_ranks) if degree <= most)
    return cost.with_capacity(hetero.max_tokens_per_rank) if hetero.max_tokens_per_rank else cost


def _speed(device: torch.device, dtype: torch.dtype) -> estimate.Device:
    return estimate.cuda_device(device, dtype) if device.type == "cuda" else estimate.cpu_device(dtype)


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = base_model(model).config
    return config.get_text_config()


def _ranks_per_node() -> int | None:
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) if local and dist.is_initialized() else None
