"""A machine is the cost model and the process groups of a run, the same on all ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.costs.out_of_memory import no_more_than
from hf_hetero.estimate import memory
from hf_hetero.estimate.devices import Device, cpu_device
from hf_hetero.estimate.first_estimate import first_estimate, restricted
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.estimate.shares import cuda_device
from hf_hetero.estimate.state_layers import StateShape, state_shape
from hf_hetero.estimate.subject import subject_of
from hf_hetero.model.activations import Activations
from hf_hetero.model.by_layer import fewest
from hf_hetero.model.lm_head import LeanHead
from hf_hetero.model.wrapped import base_model
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.ranks.sharding import Sharding
from hf_hetero.topology import Topology
from hf_hetero.trainer.checkpoints.kept_cost_model import Kept, digest_of, kept_cost_model
from hf_hetero.trainer.fitting import NOTHING_ASKED, Asked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ground:
    """A `Ground` is what an estimate stands on.

    Args:
        shape: of the model, and of how it is trained.
        speed: of one rank's device, by this rank.
        topology: how the ranks stand on nodes, and what memory each of them has.
        spread: how model states are sharded over ranks; None: each rank holds them all.
        policies: what groups may do to hold more tokens, and gain by it.
        hetero: the user's limits.
        states: layers of the model that carry state; None: it has none.
    """

    shape: ModelShape
    speed: Device
    topology: Topology
    spread: memory.Shards | None
    policies: Sequence[str]
    hetero: HeteroConfig
    states: StateShape | None

    @property
    def state_bytes(self) -> float:
        """Count the bytes of weights, gradients and optimizer on a rank's device."""
        return memory.state_bytes(self.shape, self.topology.num_ranks, self.spread)

    def estimated(self) -> CostModel:
        """Estimate the cost model."""
        where = self.speed, self.topology, self.spread
        return first_estimate(self.shape, *where, self.policies, self.hetero, self.states)


@dataclass(frozen=True, slots=True)
class Machine:
    """A `Machine` is what planning and attention stand on.

    Args:
        cost_model: what groups cost, under the user's limits.
        groups: the process groups of every degree the cost model offers.
        checkpoint: where a cost model was looked for; None: nowhere.
        given: digest of the user's cost model; None: there is none.
        is_estimate: the cost model is an estimate, or was one before it was refitted.
        is_kept: the cost model is the one that the checkpoint's run went by.
        ground: what an estimate stands on.
    """

    cost_model: CostModel
    groups: GroupPool
    ground: Ground
    checkpoint: str | None = None
    given: str | None = None
    is_estimate: bool = False
    is_kept: bool = False

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
    kernel: str = "torch_varlen",
    asked: Asked = NOTHING_ASKED,
) -> Machine:
    """Read or estimate the cost model, agree on it, make the groups. A collective of all ranks.

    The cost model is the user's file, or what the checkpoint's run has made of that file; without one, that of the
    checkpoint, if it was made on as many ranks; else an estimate.

    Args:
        model, args, hetero: what is trained, and how.
        dtype: that training computes in.
        sharding: of the weights.
        activations: what the layers can do to hold more tokens.
        checkpoint: folder that the run goes on from; None: it starts anew.
        kernel: of attention, by its name.
        asked: of a reference beside the model.

    Raises:
        ConfigError: the cost model cannot be read, or leaves room for no token; raised on every rank.
    """
    world = args.world_size
    heads = fewest(_text_config(model), "num_attention_heads", world)
    shape = _shape(model, args, hetero, dtype, sharding, activations)
    shape = replace(shape, reference_passes=asked.passes, reference_bytes=asked.num_bytes)
    subject = subject_of(shape, base_model(model).config.model_type, dtype)
    policies = [policy for policy in activations.policies if policy in hetero.activation_policies]
    shards = memory.Shards(sharding.offloads, not sharding.syncs_each, sharding.replicas, sharding.reduces_once)
    # without a GPU offloading copies from host memory to host memory: there is none to gain
    gained = [policy for policy in policies if policy != "offload" or args.device.type == "cuda"]
    # a CPU is timed on all ranks at once, as training will run
    speed = cuda_device(args.device, dtype, kernel) if args.device.type == "cuda" else cpu_device(shape, dtype)
    spread, states = shards if sharding.is_sharded else None, state_shape(base_model(model), _text_config(model))
    ground = Ground(shape, speed, _topology(args.device, world), spread, gained, hetero, states)

    def make() -> Found:
        found = _found(hetero, ground, subject, kept := kept_cost_model(checkpoint, world, sharding.replicas))
        cost = restricted(found.cost_model, hetero, world, heads, policies)
        # what has proven too much stays so, whatever a file or a setting says
        if kept is not None and kept.cost_model.ran_out:
            cost = no_more_than(cost, kept.cost_model)
        return found._replace(cost_model=cost)

    # the degrees of the cost model decide which groups exist, so it travels in a pool of its own
    messengers = GroupPool((), hetero.group_timeout_s, args.ddp_timeout)
    # of rank 0 for all: by its own times and memory each rank would estimate another, and offer other degrees
    found = broadcast(make, messengers.control)
    messengers.close()
    cost = found.cost_model
    if args.process_index == 0:
        _log_cost_model(cost, world, heads, subject, args.device, hetero.methods)
    groups = GroupPool(cost.degrees(world), hetero.group_timeout_s, args.ddp_timeout, args.device)
    return Machine(cost, groups, ground, checkpoint, found.given, found.is_estimate, found.is_kept)


def _shape(
    model: torch.nn.Module,
    args: TrainingArguments,
    hetero: HeteroConfig,
    dtype: torch.dtype,
    sharding: Sharding,
    activations: Activations,
) -> ModelShape:
    """Return what of a model, and of how it is trained, decides its cost."""
    head = base_model(model).get_output_embeddings()  # none where tokens are not predicted, so that there are no logits
    return shape_of(
        model,
        _text_config(model),
        dtype.itemsize,
        sharding.checkpointing,
        keeps_exchanged=hetero.keep_exchanged,
        chunked_loss=args.use_liger_kernel or head is None or isinstance(head, LeanHead),
        chunked_mlp=activations.chunked_mlps,
        compiled=args.torch_compile,
    )


class Found(NamedTuple):
    """A `Found` is a cost model, and where it was found: its other fields are those of `Machine`."""

    cost_model: CostModel
    given: str | None
    is_estimate: bool
    is_kept: bool = False


def _found(hetero: HeteroConfig, ground: Ground, subject: str, kept: Kept | None) -> Found:
    """Return the user's cost model, or that of a checkpoint, or else an estimate."""
    if hetero.cost_model:
        return _of_file(CostModel.load(hetero.cost_model), kept)
    if kept is not None:
        return Found(kept.cost_model, None, is_estimate=True, is_kept=True)
    return Found(replace(ground.estimated(), model=subject), None, is_estimate=True)


def _of_file(given: CostModel, kept: Kept | None) -> Found:
    """Return the user's cost model, or what the checkpoint's run has made of it."""
    digest, is_estimate = digest_of(given), given.provenance == "estimated"
    if kept is None or kept.given != digest:
        return Found(given, digest, is_estimate)
    is_refit = kept.cost_model.provenance == "refitted"  # else the file itself, which no limits have changed
    return Found(kept.cost_model if is_refit else given, digest, is_estimate, is_kept=True)


def _log_cost_model(
    cost: CostModel, num_ranks: int, num_heads: int, subject: str, device: torch.device, methods: Collection[str]
) -> None:
    """Log which cost model plans are made by, as a warning: all of them stand on it, and it may be an estimate."""
    if cost.model not in (None, subject):
        logger.warning(
            "Cost model %r was made for another model: %s. This run trains: %s. Plans stay exact, but may be slow, or "
            "too large for memory: make one with `hf-hetero profile`.",
            cost.name,
            cost.model,
            subject,
        )
    degrees = ", ".join(map(str, cost.degrees(num_ranks)))
    extra = ", ".join(f"{model.capacity_tokens} with {name}" for name, model in cost.by_activations.items() if name)
    tokens = f"{cost.capacity_tokens} tokens a rank{f' ({extra})' if extra else ''}"
    logger.warning("Cost model %r: %s, degrees %s. %s", cost.name, tokens, degrees, cost.source)
    if "token_ring" in methods and None in (cost.kv_bytes_per_token, cost.query_bytes_per_token):
        logger.warning(
            "Cost model %r says nothing of the bytes of keys or queries, so 'token_ring' is never planned. Make a file "
            "with `hf-hetero profile`, or add kv_bytes_per_token and query_bytes_per_token to this one.",
            cost.name,
        )
    if advice := memory.allocator_advice(device):
        logger.warning("%s", advice)
    if uneven := [degree for degree in cost.degrees(num_ranks) if num_heads % degree]:
        logger.warning("%d heads do not divide by degree %s: some ranks compute more by Ulysses.", num_heads, uneven)


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = base_model(model).config
    return config.get_text_config(decoder=True)


def _topology(device: torch.device, num_ranks: int) -> Topology:
    """Return how the ranks stand on nodes, and what memory each of them has."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    ranks_per_node = int(local) if local and dist.is_initialized() else None
    ranks = ranks_per_node or num_ranks
    return Topology(
        num_ranks,
        ranks_per_node,
        memory.free_memory_bytes(device, ranks, num_ranks),
        memory.host_memory_bytes(device, ranks),
    )
