"""A rank that ends leaves word of why in the job's store, where those that will miss it look.

The store lies on a rank, too, or beside one. Where that has gone, questions to it fail, in torch; where it stands still
(a frozen process, a node that hangs), they would wait for good, so here they are asked from a thread (`JobStore`).
"""

from __future__ import annotations

import math
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch.distributed as dist

from hf_hetero.errors import CollectiveFailed

PATIENCE_S = 2.0
"""How long those who miss a rank look for its last words."""
LOOK_S = 0.05
"""How often."""
MOST_WORDS = 2000
ANSWER_S = 10.0
"""How long an answer of the store may take, which is a matter of milliseconds."""
BEGIN_S = 1.0
"""How long a thread that asks may take to begin."""
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


T = TypeVar("T")


class JobStore:
    """A `JobStore` is the store in which the ranks of a job have found each other; no question to it waits for long.

    Torch's limit is for keys that are not there yet. For an answer itself torch waits as long as the connection stands.
    One question of each `JobStore` is open at a time; torch puts those of several threads in a row in any case.

    Args:
        store: torch's.

    Raises:
        DistStoreError: by each method, if there is no answer within `ANSWER_S` seconds.
        DistNetworkError: by each method, if the store has gone.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self._free, self._open_since_s = threading.Lock(), math.inf

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""
        return self._asked(lambda: self.store.check(keys))

    def get(self, key: str) -> bytes:
        """Return the value of a key that is there."""
        return self._asked(lambda: self.store.get(key))

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        self._asked(lambda: self.store.set(key, value))

    def add(self, key: str, amount: int) -> int:
        """Add to a count, and return what it is then."""
        return self._asked(lambda: self.store.add(key, amount))

    def delete_key(self, key: str) -> bool:
        """Remove a key; return whether it was there."""
        return self._asked(lambda: self.store.delete_key(key))

    def _asked(self, question: Callable[[], T]) -> T:
        # behind a question that has been open for too long nobody waits as long again
        now_s = time.monotonic()
        if not self._free.acquire(timeout=max(0.0, min(self._open_since_s, now_s) + ANSWER_S - now_s)):
            raise _silent()
        self._open_since_s, answer, whose = time.monotonic(), Future[T](), threading.Lock()

        def ask() -> None:
            if not whose.acquire(blocking=False):
                return
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)
            finally:
                self._open_since_s = math.inf
                self._free.release()

        # where a thread has no memory left for its first line, nobody hears of it, and `threading.Thread.start` would
        # wait for it for good; what cannot be asked from a thread is asked here
        with suppress(RuntimeError, MemoryError):
            start_new_thread(ask, ())
            with suppress(TimeoutError):
                answer.exception(BEGIN_S)
        ask()
        try:
            error = answer.exception(max(0.0, ANSWER_S - BEGIN_S))
        except TimeoutError:
            raise _silent() from None
        if error is not None:
            raise error
        return answer.result()


def _silent() -> dist.DistStoreError:
    text = f"The store of the job has not answered for {ANSWER_S:g} s: the process that holds it stands still."
    return dist.DistStoreError(text)


def job_store() -> Any:
    """Return the store of this job, as a `JobStore`; None where its ranks have found each other without one (MPI)."""
    store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    return None if store is None else JobStore(store)


def _turn(number: int) -> str:
    """Return the key that says which rank was the first to leave word, the second, and so on."""
    return f"{NUM_TOLD}-{number}"


def _key(rank: int) -> str:
    """Return the key under which a rank leaves word of why it ends."""
    return f"hf_hetero/why-rank-{rank}-ended"
