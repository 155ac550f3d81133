"""A rank that ends leaves word of why in the job's store, where those that will miss it look."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from hf_hetero.errors import CollectiveFailed

PATIENCE_S = 2.0
"""How long those who miss a rank look for its last words."""
LOOK_S = 0.05
"""How often."""
MOST_WORDS = 2000
NUM_TOLD = "hf_hetero/why-ranks-ended"
"""The key under which ranks that leave word are counted."""


def tell(error: BaseException) -> None:
    """Leave word of why this rank ends, for those that will miss it."""
    is_known = isinstance(error, CollectiveFailed) or getattr(error, "is_known_to_all", False)
    if dist.is_initialized() and not is_known:
        with suppress(Exception):  # the store lives on a rank that may have gone
            words, store, rank = f"{type(error).__name__}: {error}"[:MOST_WORDS], job_store(), dist.get_rank()
            store.set(_key(rank), words)
            store.set(_turn(store.add(NUM_TOLD, 1)), str(rank))


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
            # who has told, not each rank in turn: all that are left look, and they all ask the same store
            for number in range(1, store.add(NUM_TOLD, 0) + 1):
                if not store.check([_turn(number)]):  # about to be written
                    continue
                rank = int(store.get(_turn(number)))
                if store.check([_key(rank)]):
                    return f"Rank {rank} had ended with {store.get(_key(rank)).decode(errors='replace')}"
            time.sleep(LOOK_S)
    return "A rank has gone: look for its first error, or for what killed it (out of host memory, for one)."


def job_store() -> Any:
    """Return the store in which the ranks of a job have found each other."""
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def _turn(number: int) -> str:
    """Return the key that says which rank was the first to leave word, the second, and so on."""
    return f"{NUM_TOLD}-{number}"


def _key(rank: int) -> str:
    """Return the key under which a rank leaves word of why it ends."""
    return f"hf_hetero/why-rank-{rank}-ended"
