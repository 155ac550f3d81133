"""This module weighs micro-batches: the most bytes that a rank's device held while one was computed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity

ALLOCATIONS = "[memory]"
"""Name of the events by which torch's profiler tells of each allocation, and of each tensor that is freed."""


@contextmanager
def weighed(kept: Iterable[torch.Tensor], device: torch.device) -> Iterator[list[int]]:
    """Weigh what is computed inside: once it is done, the list holds the most bytes of tensors there were at a time.

    A GPU's allocator counts them, at no cost. For a CPU nobody does, so torch's profiler tells of each allocation,
    which takes time: what is weighed there is not timed.

    Args:
        kept: tensors that are there at the start, of which a CPU knows nothing else: weights, gradients, states.
        device: where they are.
    """
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    before, told = num_bytes(kept), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _hushed():
        told.start()
    try:
        yield peak
    finally:
        with _hushed():
            told.stop()
    peak.append(before + _most(told))


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Count the bytes of tensors on this rank, those that share them once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(_storage, tensors)}
    return sum(storages.values())


def states_of(model: torch.nn.Module, optimizer: Any) -> list[torch.Tensor]:
    """List the weights of a model, their gradients, and what an optimizer keeps of them."""
    weights = [*model.parameters(), *model.buffers()]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    kept = [value for values in optimizer.state.values() for value in values.values()]
    return [*weights, *gradients, *(value for value in kept if isinstance(value, torch.Tensor))]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep from standard error what torch's profiler writes there, past Python, when it starts and when it stops."""
    sys.stderr.flush()
    shown = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def _most(told: torch.profiler.profile) -> int:
    """Return the most bytes that were there at a time, beyond those of the start."""
    events: list[Any] = told.profiler.kineto_results.events()  # pyright: ignore
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == ALLOCATIONS)
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
