"""Gradients are exchanged in a step's last micro-batch, or in each, and all of them are, before anything is learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_hetero.errors import HeteroError
from hf_hetero.ranks.sharding import Sharding, inside_of, param_groups

UNFINISHED = "Expected to have finished reduction"
"""Words of DDP's error."""


@contextmanager
def synchronising(trainer: Trainer, model: torch.nn.Module, sharding: Sharding, is_last: bool) -> Iterator[None]:
    """Return a context in which backward synchronises gradients, or only adds them up, whatever Trainer asks for.

    Args:
        trainer, model, sharding: whose gradients, and how they are spread.
        is_last: this is the last micro-batch of a step.

    Raises:
        HeteroError: a step ends, and gradients of some weights were not added up over replicas, or over ranks.
    """
    inside = inside_of(model)
    if not (sharding.syncs_each or is_last):
        with trainer.accelerator.no_sync(model=model):
            yield
    elif isinstance(inside, DistributedDataParallel):
        # Trainer's loop accumulates over its own batches, and has turned this off for all but the last of them
        before, inside.require_backward_grad_sync = inside.require_backward_grad_sync, True
        try:
            yield
        finally:
            inside.require_backward_grad_sync = before
        _check_exchanged(inside)
    else:
        if hasattr(inside, "set_requires_gradient_sync"):
            inside.set_requires_gradient_sync(True)
            if sharding.reduces_once:
                inside.set_requires_all_reduce(is_last)
        yield
        if is_last and sharding.reduces_once:
            _check_reduced(inside)


def _check_exchanged(model: DistributedDataParallel) -> None:
    """Refuse a step whose gradients DDP has not all exchanged, because it waits for those of weights that got none.

    It would say so in the next step's forward pass: by then the optimizer has gone by gradients of single ranks.
    """
    try:
        model._check_reducer_finalized()  # pyright: ignore[reportPrivateUsage]
    except RuntimeError as error:
        if UNFINISHED not in str(error):
            raise
        names = [name for name, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
        raise HeteroError(
            f"{len(names)} weights got no gradient ({', '.join(names[:3])}, ...), and DDP waits for theirs: what it "
            "exchanges together with them is not exchanged. Set ddp_find_unused_parameters=True (with activation "
            "checkpointing also activation_checkpointing_kwargs={'use_reentrant': False}), or freeze them by "
            "requires_grad_(False)."
        ) from error


def _check_reduced(model: torch.nn.Module) -> None:
    """Refuse a step in which FSDP2 still keeps gradients for its replicas: it adds them up when more of them come."""
    if any(group._partial_reduce_output is not None for group in param_groups(model)):
        raise HeteroError(
            "Some weights got gradients in a step's first micro-batches and none in its last one, so that replicas "
            "have not added them up. Set HeteroConfig.sync_each_micro_batch=False."
        )
