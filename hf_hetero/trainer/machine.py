"""A machine is the cost model and the process groups of a run, the same on all ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.estimate import estimate, memory
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.model.activations import Activations
from hf_hetero.model.lm_head import LeanHead
from hf_hetero.model.wrapped import base_model
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.ranks.sharding import Sharding
from hf_hetero.topology import Topology
from hf_hetero.trainer.checkpoint import kept_cost_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """A `Machine` is what planning and attention stand on.

    Args:
        cost_model: what groups cost, under the user's limits.
        groups: the process groups of every degree the cost model offers.
        checkpoint: where a cost model was looked for; None: nowhere.
    """

    cost_model: CostModel
    groups: GroupPool
    checkpoint: str | None = None

    def serves(self, checkpoint: str | None) -> bool:
        """Return whether a run that goes on from a checkpoint may keep it; None: a run that starts anew."""
        return checkpoint in (None, self.checkpoint)


def set_up(
    model: torch.nn.Module,
    args: TrainingArguments,
    hetero: HeteroConfig,
    dtype: torch.dtype,
    sharding: Sharding,
    activations: Activations,
    checkpoint: str | None = None,
) -> Machine:
    """Read or estimate the cost model, agree on it, make the groups. A collective of all ranks.

    The cost model is the user's file; without one, that of the checkpoint, if it was made on as many ranks; else an
    estimate.

    Raises:
        ConfigError: the cost model cannot be read, or leaves room for no token; raised on every rank.
    """
    world = args.world_size
    topology = _topology(args.device, world)
    heads = getattr(base_model(model).config, "num_attention_heads", world)
    head = base_model(model).get_output_embeddings()  # none where tokens are not predicted, so that there are no logits
    # timed on all ranks at once, as training will run
    checkpointing = sharding.checkpointing
    shape = shape_of(
        model,
        _text_config(model),
        dtype.itemsize,
        checkpointing,
        keeps_exchanged=hetero.keep_exchanged,
        chunked_loss=args.use_liger_kernel or head is None or isinstance(head, LeanHead),
        chunked_mlp=activations.chunked_mlps,
    )
    policies = [policy for policy in activations.policies if policy in hetero.activation_policies]
    speed = _speed(shape, args.device, dtype)

    def make() -> CostModel:
        if hetero.cost_model:
            return restricted(CostModel.load(hetero.cost_model), hetero, world, heads, policies)
        if (resumed := kept_cost_model(checkpoint, world)) is not None:
            return restricted(resumed, hetero, world, heads, policies)
        spread = None
        if sharding.is_sharded:
            spread = memory.Shards(offloaded=sharding.offloads, whole_gradients=not sharding.syncs_each)
        # without a GPU offloading copies from host memory to host memory: there is none to gain
        gained = [policy for policy in policies if policy != "offload" or args.device.type == "cuda"]
        cost = estimate.estimate_cost_model(shape, speed, topology, topology.degrees, spread, gained)
        return restricted(cost, hetero, world, heads, policies)

    # the degrees of the cost model decide which groups exist, so it travels in a pool of its own
    messengers = GroupPool((), hetero.group_timeout_s, args.ddp_timeout)
    # of rank 0 for all: by its own times and memory each rank would estimate another, and offer other degrees
    cost = broadcast(make, messengers.control)
    messengers.close()
    if args.process_index == 0:
        _log_cost_model(cost, world, heads)
    groups = GroupPool(cost.degrees(world), hetero.group_timeout_s, args.ddp_timeout, args.device)
    return Machine(cost, groups, checkpoint)


def _log_cost_model(cost: CostModel, num_ranks: int, num_heads: int) -> None:
    """Log which cost model plans are made by, as a warning: all of them stand on it, and it may be an estimate."""
    degrees = ", ".join(map(str, cost.degrees(num_ranks)))
    extra = ", ".join(f"{model.capacity_tokens} with {name}" for name, model in cost.by_activations.items() if name)
    tokens = f"{cost.capacity_tokens} tokens a rank{f' ({extra})' if extra else ''}"
    logger.warning("Cost model %r: %s, degrees %s. %s", cost.name, tokens, degrees, cost.source)
    if uneven := [degree for degree in cost.degrees(num_ranks) if num_heads % degree]:
        logger.warning("%d heads do not divide by degree %s: some ranks compute more by Ulysses.", num_heads, uneven)


def restricted(
    cost: CostModel, hetero: HeteroConfig, num_ranks: int, num_heads: int, policies: Collection[str] = ()
) -> CostModel:
    """Restrict a cost model to the user's limits, the model's heads, and what its layers can do to hold more.

    Where only heads can be exchanged, a rank without one would have nothing to do; other methods may go further.
    """
    cost = replace(cost, activation_policies={n: p for n, p in cost.activation_policies.items() if n in policies})
    most = hetero.max_degree or num_ranks
    if cost.kv_bytes_per_token is None or not {"gather", "ring"} & set(hetero.methods):
        most = min(most, num_heads)
    else:
        cost = replace(cost, num_heads=num_heads)
    cost = cost.with_degrees(degree for degree in cost.degrees(num_ranks) if degree <= most)
    return cost.with_capacity(hetero.max_tokens_per_rank) if hetero.max_tokens_per_rank else cost


def _speed(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> estimate.Device:
    """Look a GPU up, or time this rank's CPU."""
    return estimate.cuda_device(device, dtype) if device.type == "cuda" else estimate.cpu_device(shape, dtype)


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = base_model(model).config
    return config.get_text_config()


def _topology(device: torch.device, num_ranks: int) -> Topology:
    """Return how the ranks stand on nodes, and what memory each of them has."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    ranks_per_node = int(local) if local and dist.is_initialized() else None
    ranks, num_communicators = ranks_per_node or num_ranks, len(Topology(num_ranks).degrees)
    return Topology(
        num_ranks,
        ranks_per_node,
        memory.free_memory_bytes(device, ranks, num_communicators),
        memory.host_memory_bytes(device, ranks),
    )
