"""What the ranks tell each other outside the model: plans, counts, and that something is wrong.

Everything here is a collective of the control group, which lives on the host. What goes wrong on one rank is raised on
all of them, with the same words, instead of leaving the others to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_hetero.errors import HeteroError, PlanMismatch
from hf_hetero.groups import named

T = TypeVar("T")


def broadcast(make: Callable[[], T], control: dist.ProcessGroup | None) -> T:
    """Call `make` on rank 0 and give its result to all ranks.

    Raises:
        HeteroError: what `make` raised, on every rank.
    """
    if control is None:
        return make()
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message = [make(), None]
        except HeteroError as error:
            message = [None, error]
        except Exception as error:
            message = [None, HeteroError(f"Rank 0: {type(error).__name__}: {error}")]
    with named("The broadcast from rank 0", f"all {dist.get_world_size()} ranks"):
        dist.broadcast_object_list(message, src=0, group=control)
    value, error = message
    if error is not None:
        raise error
    return value


def confirm_step(
    step: int,
    digest: int,
    num_targets: int,
    error: Exception | None,
    control: dist.ProcessGroup | None,
    asks_to_stop: bool = False,
) -> tuple[int, bool]:
    """Before a step's first group collective: do all ranks hold the same plan and good samples?

    Args:
        step: for messages.
        digest: fingerprint of this rank's step.
        num_targets: tokens of this rank that have something to predict.
        error: what went wrong while this rank read its samples.
        asks_to_stop: this rank was told to end.

    Returns:
        Target tokens of the whole step, and whether any rank was told to end.

    Raises:
        HeteroError: what went wrong, on every rank; `PlanMismatch` if plans differ.
    """
    if control is None:
        if error is not None:
            raise error
        return num_targets, asks_to_stop
    rows = gather([int(error is not None), digest, num_targets, int(asks_to_stop)], control)
    if any(row[0] for row in rows):
        _raise_together(error, control)
    digests = [row[1] for row in rows]
    if len(set(digests)) > 1:
        usual = max(set(digests), key=digests.count)
        others = [rank for rank, value in enumerate(digests) if value != usual]
        raise PlanMismatch(
            f"Step {step}: ranks {others} hold another plan than the rest. All ranks need the same dataset, seed and "
            "settings, and the plan must come from rank 0."
        )
    return sum(row[2] for row in rows), any(row[3] for row in rows)


def raise_together(error: Exception | None, control: dist.ProcessGroup | None) -> None:
    """Wait for all ranks, and raise on all of them what went wrong on any.

    Raises:
        HeteroError: what went wrong.
    """
    if control is None:
        if error is not None:
            raise error
    elif any(failed for [failed] in gather([int(error is not None)], control)):
        _raise_together(error, control)


def gather(values: Sequence[int], control: dist.ProcessGroup | None) -> list[list[int]]:
    """The integers of every rank; each rank gives as many."""
    if control is None:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.int64)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    with named("The exchange before a step", f"all {dist.get_world_size()} ranks"):
        dist.all_gather(found, mine, group=control)
    return [row.tolist() for row in found]


def gather_objects(value: T, control: dist.ProcessGroup | None) -> list[T]:
    """What every rank gives, in the order of the ranks."""
    if control is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    with named("The exchange of results", f"all {dist.get_world_size()} ranks"):
        dist.all_gather_object(found, value, group=control)
    return found


def scatter(values: Sequence[T] | None, control: dist.ProcessGroup | None) -> T:
    """Give each rank its own of rank 0's values."""
    if control is None:
        assert values is not None
        return values[0]
    mine: list[Any] = [None]
    with named("The dealing out of examples", f"all {dist.get_world_size()} ranks"):
        dist.scatter_object_list(mine, None if values is None else list(values), src=0, group=control)
    return mine[0]


def _raise_together(error: Exception | None, control: dist.ProcessGroup) -> None:
    messages: list[Any] = gather_objects(None if error is None else (type(error), str(error)), control)
    rank, (kind, text) = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    kind = kind if issubclass(kind, HeteroError) else HeteroError
    raise kind(text if text.startswith("Rank ") else f"Rank {rank}: {text}") from error
