"""This module has the processes that read data end with the rank that started them, however that ends.

A process that was forked holds every connection of its rank. If the rank is killed, the other ranks see these
connections closed only when the last process that holds them has gone. Torch's readers look for their rank every five
seconds, and not at all while they read a row, or wait for room in a pipe that nobody empties any more.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from hf_hetero.errors import HeteroError

PR_SET_PDEATHSIG = 1
"""Of Linux' `prctl`: the signal that a process gets when the thread that started it ends."""


def end_with_this_process(loader: DataLoader[Any]) -> None:
    """Let the workers of a loader be killed when this process ends. Call it before the loader is iterated."""
    reader: Any = getattr(loader, "base_dataloader", loader)  # accelerate's loaders have another one do the reading
    init: Any = reader.worker_init_fn
    if not (isinstance(init, partial) and init.func is _begin):
        reader.worker_init_fn = partial(_begin, init)


def named_loss(error: Exception) -> Exception:
    """Return what a loader with workers raised; in words, where a worker that was killed took its tensors with it.

    What a dataset raises in a worker comes with torch's words, which say where it was caught.
    """
    if not isinstance(error, EOFError | ConnectionError) or "DataLoader worker" in str(error):
        return error
    lost = HeteroError(
        f"A DataLoader worker has gone with what it had read ({type(error).__name__}: {error}): look for what killed "
        "it (out of host memory, for one), or set dataloader_num_workers lower."
    )
    lost.__cause__ = error
    return lost


def _begin(then: Callable[[int], None] | None, worker: int) -> None:
    """Tie a new worker to its rank, then have it do what it was asked to do first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # the signal is sent for what ends from now on; who has ended before is looked for
        owner = multiprocessing.parent_process()
        if owner is not None and not owner.is_alive():
            os._exit(1)
    if then is not None:
        then(worker)
