"""This module knows how a run spreads its weights over ranks: what was asked for, what runs, and that both agree.

Accelerate ignores FSDP without a word where it does not apply (CPU, a single process), so nothing is taken on trust:
what was asked for is read from the arguments and the launcher's environment, and compared with the wrapper that
training is handed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_hetero.errors import HeteroError
from hf_hetero.ranks.mesh import FSDP2_LINES, check_mesh, mesh_asked_for, replica_problems, wrapping_problems

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

FSDP_GROUPS = ("shard_process_group", "replicate_process_group", "reduce_scatter_process_group")
"""Attributes in which FSDP2 keeps the process groups of a mesh."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """`Sharding` says how weights are spread.

    Args:
        is_sharded: each rank holds a part of every weight (FSDP2), and layers are gathered while they compute; else
            each rank holds them all.
        offloads: the parts wait in the host's memory.
        checkpointing: layers are computed again in backward, whether Trainer or FSDP arranges it.
        syncs_each: gradients are synchronised after every micro-batch; else they add up, whole, until the last one.
        replicas: groups of ranks that hold all weights each, in parts; 1: all ranks together hold them once.
        reduces_once: replicas add up their gradients in a step's last micro-batch; else in every one.
    """

    is_sharded: bool = False
    offloads: bool = False
    checkpointing: bool = False
    syncs_each: bool = False
    replicas: int = 1
    reduces_once: bool = False


def sharding_of(trainer: Trainer, sync_each_micro_batch: bool | None) -> Sharding:
    """Return what accelerate will do with this trainer's model, and how often gradients are synchronised."""
    # releases of transformers before 5.23 know only its first name
    names = ("activation_checkpointing", "gradient_checkpointing")
    recomputes = bool(getattr(trainer.args, next(name for name in names if hasattr(trainer.args, name))))
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        # DDP holds whole gradients anyway, so one reduction a step is less to send and costs no memory
        return Sharding(checkpointing=recomputes, syncs_each=bool(sync_each_micro_batch))
    asked, syncs_each = mesh_asked_for(trainer.args), sync_each_micro_batch is not False
    return Sharding(
        is_sharded=True,
        offloads=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        checkpointing=recomputes or bool(plugin.activation_checkpointing),
        syncs_each=syncs_each,
        replicas=1 if asked is None else asked.replicas,
        reduces_once=asked is not None and asked.replicas > 1 and not (syncs_each and _reduces_in_half(plugin)),
    )


def _reduces_in_half(plugin: Any) -> bool:
    """Return whether FSDP2 exchanges gradients in 16 bits, in which it would also add up what waits for replicas."""
    policy = plugin.mixed_precision_policy
    dtype: torch.dtype | None = policy and (policy.reduce_dtype or policy.param_dtype)
    return dtype is not None and dtype.itemsize < 4


def argument_problems(args: TrainingArguments) -> Iterator[str]:
    """Give the reasons to refuse what the arguments or the launcher ask for, in words."""
    if args.deepspeed or _launched_with("DEEPSPEED"):
        yield (
            "DeepSpeed's engine reduces and steps by a number of micro-batches fixed at start, and plans vary it; "
            f"use FSDP2: {FSDP2_LINES}."
        )
    yield from replica_problems(args, asks_for_fsdp(args))
    if not asks_for_fsdp(args):
        return
    asked: Any = args.fsdp_config if args.fsdp else {}
    version = int((asked or {}).get("version", 2)) if args.fsdp else int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        yield f"FSDP version {version} is not supported; use FSDP2: {FSDP2_LINES}."
    if (asked or {}).get("xla"):
        yield "FSDP over XLA is not supported; use a CUDA device, or DDP."


def trainer_problems(trainer: Trainer) -> Iterator[str]:
    """Give the reasons to refuse what accelerate makes of the arguments, in words."""
    kind = getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type)
    if asks_for_fsdp(trainer.args) and kind != "FSDP":
        yield (
            f"FSDP was asked for, and accelerate runs {kind} here, as it does on CPU and with a single process; "
            "start several processes on GPUs, or take FSDP out of the configuration."
        )
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        yield from wrapping_problems(trainer.model, plugin.transformer_cls_names_to_wrap)


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Return whether the arguments or `accelerate launch` ask for FSDP."""
    return bool(args.fsdp) or _launched_with("FSDP")


def forget_evaluation(trainer: Trainer) -> None:
    """Let a model that was evaluated before it is trained be wrapped: accelerate takes it for one that has been."""
    model: Any = trainer.model
    is_bare = trainer.model_wrapped is model and not isinstance(model, FSDPModule)
    if is_bare and getattr(model, "_is_accelerate_prepared", False):
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes off what casts its outputs, too
        setattr(model, "_is_accelerate_prepared", False)  # noqa: B010


@contextmanager
def saying_why_not_again() -> Iterator[None]:
    """Return a context in which accelerate prepares a training: if it cannot shard a model again, say what can be done.

    A model under FSDP2 that was trained and then evaluated cannot be prepared for another training, by a plain Trainer
    neither: its weights are sharded already, and accelerate looks for the whole ones that the new optimizer was given.

    Raises:
        HeteroError: instead of accelerate's own error, on every rank.
    """
    try:
        yield
    except KeyError as error:
        if "switched to its sharded version" not in str(error):
            raise
        raise HeteroError(
            "accelerate cannot prepare a model for training that FSDP2 has sharded before, as it does once a trainer "
            "has trained and evaluated it; a plain Trainer ends so, too. Save it (save_model), and train it on in a "
            "new trainer, with a model that is loaded from there."
        ) from error


def check_wrapper(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Refuse a wrapper that training runs in, if it is not the one that was asked for.

    Raises:
        HeteroError: it is another one; gradients would not be synchronised, or memory not shared.
    """
    inside: Any = getattr(model, "_orig_mod", model)  # torch.compile wraps DDP; FSDP2 wraps what was compiled
    expected = FSDPModule if asks_for_fsdp(args) else DistributedDataParallel if args.world_size > 1 else None
    if expected is not None and not isinstance(model, expected) and not isinstance(inside, expected):
        raise HeteroError(
            f"Training on {args.world_size} ranks should run in {expected.__name__} and runs in "
            f"{type(inside).__name__}. Leave wrapping to accelerate: pass the bare model to the trainer."
        )
    check_mesh(model, args)


def groups_of(model: torch.nn.Module) -> list[ProcessGroup]:
    """Return the process groups among whose ranks a model's weights are spread, each once; for whole weights, none."""
    meshes = dict.fromkeys(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    return list(dict.fromkeys(group for mesh in meshes for group in mesh.get_all_groups()))


@dataclass(frozen=True, slots=True)
class Exchange:
    """An `Exchange` is a place where a wrapper keeps the group over which it exchanges gradients, or weights.

    Args:
        ranks: of the group.
        set: puts another one of the same ranks there. The wrapper then is in no step.
        put_back: puts the first one back.
    """

    ranks: tuple[int, ...]
    set: Callable[[ProcessGroup], None]
    put_back: Callable[[], None]


def exchanges_of(model: torch.nn.Module) -> list[Exchange]:
    """Return the exchanges of a wrapper, in a step."""
    model = inside_of(model)
    places: list[tuple[Any, Callable[[ProcessGroup], None], Callable[[], None]]] = []
    if isinstance(model, DistributedDataParallel):
        # torch's own way to other groups; it also forgets a reduction that has begun
        move = model._update_process_group  # pyright: ignore[reportPrivateUsage]
        places.append((model.process_group, move, partial(_put_back, model, model.process_group)))
    for mesh, name in _places(model):
        group, move = getattr(mesh, name), partial(setattr, mesh, name)
        places.append((group, move, partial(move, group)))
    found = [Exchange(tuple(dist.get_process_group_ranks(group)), move, back) for group, move, back in places]
    return [exchange for exchange in found if len(exchange.ranks) > 1]


def _put_back(model: Any, group: Any) -> None:
    """Give DDP its first group back, and nothing of another one left."""
    model._update_process_group(group)
    if model.find_unused_parameters:
        # its reducer keeps the last exchange of which parameters were used, and with it that group's connections: make
        # another, as DDP itself does when it comes out of a pickle
        model.reducer._remove_autograd_hooks()
        parameters, is_sparse = model._build_params_for_reducer()
        names = model._build_debug_param_to_name_mapping(parameters)
        model._ddp_init_helper(parameters, is_sparse, names, model.static_graph)


def can_begin_anew(model: torch.nn.Module) -> bool:
    """Return whether a step can be left in its middle: FSDP2 learned how with torch 2.13."""
    model = inside_of(model)
    return not isinstance(model, FSDPModule) or hasattr(model, "reset_iter_state")


def leave_step(model: torch.nn.Module) -> None:
    """Have a wrapper forget a pass that came to no end; DDP does the rest as its exchanges are moved."""
    model = inside_of(model)
    if isinstance(model, DistributedDataParallel):
        # as after a whole step: ranks that left in different micro-batches would not agree to share buffers in the next
        model.require_forward_param_sync = True
    if not isinstance(model, FSDPModule):
        return
    for group in param_groups(model):
        group._all_gather_result = None  # it would wait for an exchange that has failed
    forget_gradients(model)
    if _states(model)[0]._is_root is not None:  # its first forward pass has begun
        model.reset_iter_state()


def forget_gradients(model: torch.nn.Module) -> None:
    """Have FSDP2 forget what adds up until gradients are synchronised: `zero_grad` knows nothing of it."""
    for group in param_groups(inside_of(model)):
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def inside_of(model: torch.nn.Module) -> Any:
    """Return a wrapped model out of what torch.compile puts around DDP; FSDP2 is around what was compiled."""
    return model if isinstance(model, FSDPModule) else getattr(model, "_orig_mod", model)


def _states(model: torch.nn.Module) -> list[Any]:
    """Return what FSDP2 keeps of a model's modules, the outermost first."""
    return [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]  # pyright: ignore[reportPrivateUsage]


def param_groups(model: torch.nn.Module) -> list[Any]:
    """Return the groups of parameters that FSDP2 gathers together."""
    return [group for state in _states(model) for group in _groups_of(state)]


def _groups_of(state: Any) -> list[Any]:
    """Return the groups of one module, which until torch 2.11 is one at most."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _places(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """Return where FSDP2 keeps the process groups of its exchanges: objects, and names of their attributes."""
    meshes = [mesh for group in param_groups(model) for mesh in (group.mesh_info, group.post_forward_mesh_info)]
    known = {id(mesh): mesh for mesh in meshes if mesh is not None}.values()
    return [(mesh, name) for mesh in known for name in FSDP_GROUPS if getattr(mesh, name, None) is not None]


def _launched_with(name: str) -> bool:
    """Return whether `accelerate launch` was told to use something."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"  # set by accelerate launch
