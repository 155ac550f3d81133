"""A rank that ends leaves word of why in the job's store, where those that will miss it look."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from hf_hetero.errors import CollectiveFailed

PATIENCE_S = 2.0
"""How long those who miss a rank look for its last words."""
MOST_WORDS = 2000


def tell(error: BaseException) -> None:
    """Leave word of why this rank ends, for those that will miss it."""
    is_known = isinstance(error, CollectiveFailed) or getattr(error, "is_known_to_all", False)
    if dist.is_initialized() and not is_known:
        with suppress(Exception):  # the store lives on a rank that may have gone
            words = f"{type(error).__name__}: {error}"[:MOST_WORDS]
            job_store().set(_key(dist.get_rank()), words)


def forget_errors() -> None:
    """Take back what this rank left word of, in a run before."""
    if dist.is_initialized():
        with suppress(Exception):
            job_store().delete_key(_key(dist.get_rank()))


def why_gone() -> str:
    """Return what the rank that has gone left word of; it may still be about to."""
    until = time.monotonic() + PATIENCE_S
    with suppress(Exception):
        store = job_store()
        while time.monotonic() < until:
            for rank in range(dist.get_world_size()):
                if store.check([_key(rank)]):
                    return f"Rank {rank} had ended with {store.get(_key(rank)).decode(errors='replace')}"
            time.sleep(0.05)
    return "A rank has gone: look for its first error, or for what killed it (out of host memory, for one)."


def job_store() -> Any:
    """Return the store in which the ranks of a job have found each other."""
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def _key(rank: int) -> str:
    """Return the key under which a rank leaves word of why it ends."""
    return f"hf_hetero/why-rank-{rank}-ended"
