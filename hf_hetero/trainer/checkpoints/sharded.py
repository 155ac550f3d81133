"""Under FSDP2, each rank has copied its shards: they are written as shards, or put together on rank 0, beside training.

Files are those of accelerate (`save_fsdp_model`, `save_fsdp_optimizer`), which reads them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a rank's part of a tensor begins, and its shape."""
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def kind_of(trainer: Any) -> str:
    """Return how a trainer that shards its weights has them saved: the name of accelerate's `state_dict_type`."""
    return trainer.accelerator.state.fsdp_plugin.state_dict_type.name


def shards_of_model(model: torch.nn.Module, adapters_only: bool, is_full: bool) -> dict[str, Any]:
    """Return this rank's shards of the weights that a checkpoint holds, as they are.

    Args:
        model: in its wrapper.
        adapters_only: it holds no more than what peft has added.
        is_full: shards will be put together, for which accelerate takes other names for those of adapters.
    """
    if adapters_only and not is_full:
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, adapter_name=cast("Any", model).active_adapter)
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=adapters_only))


def shards_of_optimizer(model: torch.nn.Module, optimizer: Any) -> Mapping[str, Any]:
    """Return this rank's shards of the optimizer's state, as they are."""
    return get_optimizer_state_dict(model, optimizer)


def write(what: str, shards: Any, folder: Path, is_full: bool, group: dist.ProcessGroup) -> None:
    """Write shards, from a thread of each rank; a collective of all ranks.

    Args:
        what: "model" | "optimizer".
        shards: copies of this rank's.
        folder: of the checkpoint.
        is_full: into one file, of rank 0.
        group: of all ranks, in which nobody else talks.
    """
    name = FSDP_MODEL_NAME if what == "model" else OPTIMIZER_NAME
    if is_full:
        whole = gathered(shards, group)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{name}.bin")
        return
    writer = FileSystemWriter(folder / f"{name}_0")
    save({what: shards}, storage_writer=writer, planner=DefaultSavePlanner(), process_group=group)


def gathered(tree: Any, group: dist.ProcessGroup) -> Any:
    """Put all sharded tensors of dicts, lists and tuples together, on rank 0; other ranks get an empty dict.

    A collective of all ranks, which hold trees of the same form. One tensor after the other is sent, and of parts that
    several ranks hold the first rank's, so that no more than whole tensors of rank 0 take memory.
    """
    parts = list(_parts(tree))
    places: list[list[Place]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(places, [_place(part) for part in parts], group=group)
    whole = [_joined(part, [of_rank[index] for of_rank in places], group) for index, part in enumerate(parts)]
    return {} if dist.get_rank() else _replaced(tree, iter(whole))


def _parts(tree: Any) -> Iterator[DTensor]:
    if isinstance(tree, DTensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in cast("Mapping[Any, Any]", tree).values():
            yield from _parts(value)
    elif type(tree) in (list, tuple):
        for value in tree:
            yield from _parts(value)


def _replaced(tree: Any, others: Iterator[Any]) -> Any:
    """Return the tree with others in the place of its sharded tensors, which come in the order of `_parts`."""
    if isinstance(tree, DTensor):
        return next(others)
    if isinstance(tree, Mapping):
        return {name: _replaced(value, others) for name, value in cast("Mapping[Any, Any]", tree).items()}
    if type(tree) in (list, tuple):
        return type(tree)([_replaced(value, others) for value in tree])
    return tree


def _place(part: DTensor) -> Place:
    shape, start = compute_local_shape_and_global_offset(part.shape, part.device_mesh, part.placements)
    return tuple(start), tuple(shape)


def _joined(part: DTensor, places: list[Place], group: dist.ProcessGroup) -> torch.Tensor | None:
    """Send this rank's part of a tensor to rank 0, which returns the whole.

    Args:
        part: this rank's.
        places: of the parts of all ranks.
        group: of all ranks.
    """
    rank, own = dist.get_rank(), part.to_local().cpu().contiguous()
    # of equal parts the first, and none of nothing
    senders = {place: sender for sender, place in reversed(list(enumerate(places))) if all(place[1])}
    if rank:
        if senders.get(places[rank]) == rank:
            dist.send(own, dst=0, group=group)
        return None
    whole = torch.empty(part.shape, dtype=own.dtype)
    for (start, shape), sender in sorted(senders.items(), key=lambda item: item[1]):
        piece = own if sender == 0 else torch.empty(shape, dtype=own.dtype)
        if sender:
            dist.recv(piece, src=sender, group=group)
        whole[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))] = piece
    return whole
