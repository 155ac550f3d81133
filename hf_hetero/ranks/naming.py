"""This module gives a failing collective a name: which operation, of which ranks, at which step, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from hf_hetero.errors import CollectiveFailed
from hf_hetero.ranks.last_words import why_gone

TOO_LATE = ("Timed out", "timed out", "timeout", "Socket Timeout")
LOST_PEER = ("gloo", "Gloo", "NCCL", "pair closure", "Connection closed", "Connection reset", "Broken pipe")
"""Words of torch's errors when another rank has gone or is late."""
TRACE = "Exception raised from"
"""With what torch begins to say where it was, in names of functions, of which some speak of a timeout."""
GROUP_LIMIT = "HeteroConfig.group_timeout_s"
JOB_LIMIT = "TrainingArguments.ddp_timeout"
"""The settings that say how long ranks may wait for each other."""


@contextmanager
def named(
    operation: str, where: Callable[[], str] | str, limit: Callable[[], str] | str = GROUP_LIMIT
) -> Iterator[None]:
    """Give a collective that fails inside a name.

    Any other error that is raised inside is left alone: memory that ran out, a reader of data that was killed.

    Args:
        operation: what was done together.
        where: step and ranks.
        limit: the setting that says how long it may wait.

    Raises:
        CollectiveFailed: instead of torch's own error, which says none of that.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_ranks(error):
            raise
        where = where if isinstance(where, str) else where()
        text = str(error).strip() or type(error).__name__
        if any(word in text.partition(TRACE)[0] for word in TOO_LATE):
            limit = limit if isinstance(limit, str) else limit()
            why = f"Look for the first error among these ranks; if they are only slow, raise {limit}."
        else:
            why = why_gone()
        raise CollectiveFailed(
            f"{operation} failed or waited too long at {where}: {text.splitlines()[0]} {why}"
        ) from error


def all_ranks() -> str:
    """Return the words for where all ranks of the job are."""
    return f"all {dist.get_world_size()} ranks" if dist.is_initialized() else "its only rank"


def is_of_ranks(error: RuntimeError) -> bool:
    """Return whether an error says that another rank has gone, or is late."""
    # the store of the job lies on a rank, too, and goes with it; torch says so in many words, by errors of its own kind
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error) for word in LOST_PEER) and not isinstance(error, torch.OutOfMemoryError)
