"""Work that takes every rank its own time: ranks meet every second, so that none waits for another for longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

import torch.distributed as dist
from tqdm.auto import tqdm

from hf_hetero.errors import HeteroError
from hf_hetero.ranks.agreement import gather, gather_objects, raise_together

T = TypeVar("T")
Work = Generator[int, None, T]
"""Gives, after each stretch of work, how many rows it has dealt with; returns what it found."""

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
    result, is_done, mine, shown = None, False, 0, 0
    is_shown = control is None or dist.get_rank() == 0
    with tqdm(total=num_rows, desc="Counting tokens", unit=" rows", leave=False, delay=1, disable=not is_shown) as bar:
        while True:
            end = time.monotonic() + ROUND_S
            try:
                while not is_done and time.monotonic() < end:
                    mine += next(work)
            except StopIteration as stop:
                result, is_done = stop.value, True
            except Exception as raised:
                error = _named(raised, control)
            said = gather([int(error is not None), int(is_done), mine], control)
            if any(failed for failed, _, _ in said):
                raise_together(error, control)
            bar.update(sum(counted for _, _, counted in said) - shown)
            shown = sum(counted for _, _, counted in said)
            if all(done for _, done, _ in said):
                return result  # type: ignore[return-value]


def each(make: Callable[[], T], control: dist.ProcessGroup | None) -> list[T]:
    """What every rank makes; what goes wrong on one is raised on all."""
    made: list[T] = []
    error: Exception | None = None
    try:
        made.append(make())
    except Exception as raised:
        error = _named(raised, control)
    raise_together(error, control)
    return gather_objects(made[0], control)


def _named(error: Exception, control: dist.ProcessGroup | None) -> Exception:
    """An error that other ranks understand, too; a single process keeps what the user's own code raised."""
    if control is None or isinstance(error, HeteroError):
        return error
    named = HeteroError(f"Reading the dataset failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named
