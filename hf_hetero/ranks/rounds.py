"""This module does work that takes every rank its own time: ranks meet every second, so that none waits for longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

import torch.distributed as dist

from hf_hetero.errors import HeteroError
from hf_hetero.progress import progress
from hf_hetero.ranks.agreement import gather, gather_objects, raise_together

T = TypeVar("T")
Work = Generator[int, None, T]
"""Gives, after each stretch of work, how many rows it has dealt with; returns its result."""

ROUND_S = 1.0


def in_rounds(work: Work[T], num_rows: int, control: dist.ProcessGroup | None) -> T:
    """Do some work on every rank; no rank leaves before all are done, or one has failed.

    Args:
        work: of this rank.
        num_rows: that all ranks together deal with, for the progress bar.
        control: group of all ranks; None for a single process.

    Raises:
        HeteroError: what went wrong on any rank, on every rank.
    """
    error: Exception | None = None
    result, is_done, num_done, shown = None, False, 0, 0
    is_shown = control is None or dist.get_rank() == 0
    with progress(num_rows, "Counting tokens", "rows", is_shown) as count:
        while True:
            end = time.monotonic() + ROUND_S
            try:
                while not is_done and time.monotonic() < end:
                    num_done += next(work)
            except StopIteration as stop:
                result, is_done = stop.value, True
            except Exception as raised:
                error = _named(raised, control)
            # who is done, or has failed, goes on meeting the others: all ranks decide by the same reports when to leave
            reports = gather([int(error is not None), int(is_done), num_done], control)
            if any(failed for failed, _, _ in reports):
                raise_together(error, control)
            count(sum(counted for _, _, counted in reports) - shown)
            shown = sum(counted for _, _, counted in reports)
            if all(finished for _, finished, _ in reports):
                return result  # type: ignore[return-value]


def each(make: Callable[[], T], control: dist.ProcessGroup | None) -> list[T]:
    """Return what every rank makes; what goes wrong on one is raised on all."""
    values: list[T] = []
    error: Exception | None = None
    try:
        values.append(make())
    except Exception as raised:
        error = _named(raised, control)
    raise_together(error, control)
    return gather_objects(values[0], control)


def _named(error: Exception, control: dist.ProcessGroup | None) -> Exception:
    """Return an error that other ranks understand, too; a single process keeps what the user's own code raised."""
    if control is None or isinstance(error, HeteroError):
        return error
    named = HeteroError(f"Reading the dataset failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named
