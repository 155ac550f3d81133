"""This module knows the mesh of a run: replicas, over whose ranks weights lie in parts (hybrid sharding, HSDP).

Accelerate lays ranks out by its `ParallelismConfig`, which comes with TrainingArguments or by the launcher's
environment. Replicas are the outer axis: of 2 x 4, ranks 0 to 3 hold the parts of one, ranks 4 to 7 those of the other.
Samples are dealt to all ranks alike. A mesh that cannot be is refused here, in words, because accelerate finds some of
them out late, and says nothing about others. So are layers that FSDP2 is to gather together and a model does not have.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from hf_hetero.errors import HeteroError

if TYPE_CHECKING:  # these bring `peft`
    from transformers import TrainingArguments

FSDP2_LINES = (
    "`distributed_type: FSDP` with `fsdp_config: {fsdp_version: 2}` in the accelerate config, or "
    "TrainingArguments(fsdp=True)"
)
LAUNCHER = "PARALLELISM_CONFIG"
"""What the launcher's variables for a mesh begin with."""
OTHER_AXES = ("tp", "cp", "sp")


class Mesh(NamedTuple):
    """A `Mesh` is how many replicas there are, and over how many ranks the weights of each lie in parts."""

    replicas: int
    shards: int


def mesh_asked_for(args: TrainingArguments) -> Mesh | None:
    """Return the mesh that arguments or the launcher ask for; None: they leave it to FSDP, or DDP, over all ranks."""
    if getattr(args, "parallelism_config", None) is None and not _launched_with_one():
        return None
    return Mesh(_size(args, "dp_replicate"), _size(args, "dp_shard"))


def replica_problems(args: TrainingArguments, fsdp: bool) -> Iterator[str]:
    """Give the reasons to refuse the mesh that is asked for, in words.

    Args:
        args: of training.
        fsdp: FSDP2 is asked for, too.
    """
    mesh = mesh_asked_for(args)
    # what splits samples has reasons of its own to be refused
    if mesh is None or any(_size(args, axis) > 1 for axis in OTHER_AXES):
        return
    said = f"dp_replicate_size={mesh.replicas} x dp_shard_size={mesh.shards} (parallelism_config)"
    if mesh.shards == 1 and fsdp and args.world_size > 1:
        yield (
            f"{said} leaves FSDP no ranks to spread weights over: set dp_shard_size to the ranks of a node, leave "
            "parallelism_config out to spread them over all ranks, or leave FSDP out for DDP, whose ranks are replicas."
        )
    elif mesh.shards > 1 and not fsdp:
        yield (
            f"{said} spreads weights by FSDP2 alone, and without it each rank would hold them all: ask for it, too, by "
            f"{FSDP2_LINES}, or leave parallelism_config out."
        )
    elif mesh != (1, 1) and mesh.replicas * mesh.shards != args.world_size:
        yield (
            f"{said} is a mesh of {mesh.replicas * mesh.shards} ranks, and there are {args.world_size}: choose sizes "
            "whose product is the number of ranks."
        )


def mesh_problems(mesh: Any) -> Iterator[str]:
    """Give the reasons to refuse a model that was spread over a mesh of ranks while loading, in words.

    Args:
        mesh: transformers' `DistributedConfig`, which has the number of ranks along each axis; None: it is not known.
    """
    tensor, pipeline, experts = (getattr(mesh, name, None) or 1 for name in ("tp_size", "pp_size", "ep_size"))
    if tensor > 1:
        yield (
            f"distributed_config.tp_size={tensor}: ranks with parts of the same products must hold the same tokens, "
            "and under a plan each rank holds its own; set it to 1, for a plan lets ranks share a sample instead."
        )
    if pipeline > 1:
        yield (
            f"distributed_config.pp_size={pipeline}: a rank with some of the layers waits for the tokens of others, "
            "and under a plan each rank goes through all layers with its own; set it to 1."
        )
    if experts > max(tensor, 1):
        # with as many as for tensors they are spread over the same ranks, which is refused above
        yield (
            f"distributed_config.ep_size={experts}: in each layer, and where it is recomputed, ranks with other "
            "experts send each other tokens; under a plan some groups recompute and others do not, so that they would "
            "wait for each other, and nobody could leave a step when memory runs out. Set it to 1: experts are then "
            "sharded, and gathered layer by layer, as all other weights."
        )
    if max(tensor, pipeline, experts) == 1:
        yield (
            "its weights were sharded while loading (distributed_config), and gradients of such a model are not "
            f"exchanged by accelerate; load it whole and let accelerate shard it: {FSDP2_LINES}."
        )
    else:
        yield f"Spread weights over all ranks, or over those of a node and their replicas, by FSDP2: {FSDP2_LINES}."


def check_mesh(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Refuse weights that lie otherwise than was asked for.

    Raises:
        HeteroError: they do; they, or their gradients, would be exchanged between other ranks.
    """
    asked, found = mesh_asked_for(args), mesh_of(model)
    if asked is not None and found is not None and asked != found:
        raise HeteroError(
            f"Weights should lie in {asked.replicas} replicas of {asked.shards} parts (parallelism_config), and lie in "
            f"{found.replicas} of {found.shards}. Leave wrapping to accelerate: pass the bare model to the trainer."
        )


def mesh_of(model: torch.nn.Module) -> Mesh | None:
    """Return how the weights of a model under FSDP2 really lie; None: it has no weights in parts."""
    parts = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if parts is None:
        return None
    sizes = {True: 1, False: 1}
    for size, placement in zip(parts.device_mesh.shape, parts.placements, strict=True):
        sizes[placement.is_shard()] *= size
    return Mesh(replicas=sizes[False], shards=sizes[True])


def _size(args: TrainingArguments, axis: str) -> int:
    """Return the number of ranks along an axis."""
    given: Any = getattr(args, "parallelism_config", None)
    if given is not None:
        return getattr(given, f"{axis}_size", 1)
    return int(os.environ.get(f"{LAUNCHER}_{axis.upper()}_SIZE", "1"))


def _launched_with_one() -> bool:
    return os.environ.get(f"ACCELERATE_USE_{LAUNCHER}", "").lower() == "true"


def wrapping_problems(model: Any, asked: Sequence[str] | None) -> Iterator[str]:
    """Say which of the classes of layers that FSDP2 is to wrap the model does not have; accelerate stops at the first.

    Args:
        model: not wrapped yet.
        asked: names of classes; None: those that its class names, which may be of towers or kinds that it has not.
    """
    names: Iterable[str] = (getattr(model, "_no_split_modules", None) or []) if asked is None else asked
    if missing := sorted(set(names) - {type(module).__name__ for module in model.modules()}):
        yield (
            f"FSDP2 is to wrap layers of class {', '.join(missing)}, which this {type(model).__name__} does not have"
            f"{' (its class names them)' if asked is None else ''}; set fsdp_config's transformer_layer_cls_to_wrap to "
            f"those that it has: {layer_classes(model)} (`fsdp_transformer_layer_cls_to_wrap: "
            f"{','.join(layer_classes(model))}` in an accelerate config)."
        )


def layer_classes(model: torch.nn.Module) -> list[str]:
    """Return the names of the classes of a model's layers: what its outermost lists of modules with weights hold."""
    found: dict[str, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, torch.nn.ModuleList):
            found |= dict.fromkeys(type(layer).__name__ for layer in module if any(True for _ in layer.parameters()))
        else:
            waiting += reversed(list(module.children()))
    return list(found)
