"""This module warns of waits that take long, from a thread that looks: who waits inside a model cannot do so itself.

An exchange of attention blocks its thread until all ranks of its group have come to it, in gloo's code, where a limit
that runs out ends the group's connections. So it is not asked to wait for a shorter time first, as control messages
are. It leaves a note of what it waits for, which costs no more than an entry of a dict.

On a GPU an exchange is only put into a stream, and the host goes on: what is waited for is then the device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

logger = logging.getLogger(__name__)

WORD_AFTER_S = 10.0
"""Who waits longer for other ranks says so."""
LOOKS_PER_WORD = 4


class Waits:
    """`Waits` is what this rank waits for now, and a thread that says so once that takes long, ever more rarely.

    Args:
        rank: for the words.
        limit: the setting that says how long it may take.
        word_after_s: when it is said first.
    """

    def __init__(self, rank: int, limit: str, word_after_s: float = WORD_AFTER_S) -> None:
        self._rank, self._limit, self._word_after_s = rank, limit, word_after_s
        self._notes: dict[int, tuple[float, str, str]] = {}  # by thread: backward has one of its own on a GPU
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="waits", daemon=True)
        self._thread.start()

    @contextmanager
    def noted(self, operation: str, where: str) -> Iterator[None]:
        """Return a context in which this thread waits for other ranks."""
        thread = threading.get_ident()
        self._notes[thread] = time.monotonic(), operation, where
        try:
            yield
        finally:
            del self._notes[thread]

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        """Look at the notes a few times in the time after which a word is due."""
        words: dict[int, tuple[tuple[float, str, str], float]] = {}  # by thread: the wait, and when it is said again
        while not self._ended.wait(self._word_after_s / LOOKS_PER_WORD):
            for thread, note in self._notes.copy().items():  # others add and remove notes meanwhile
                last, after_s = words.get(thread, (None, 0.0))
                after_s = after_s if last is note else self._word_after_s
                waited_s = time.monotonic() - note[0]
                if waited_s >= after_s:
                    logger.warning(
                        "Rank %d has waited %.3g s in %s of %s, and waits on, as long as %s allows.",
                        self._rank,
                        waited_s,
                        *note[1:],
                        self._limit,
                    )
                    after_s = 2 * waited_s
                words[thread] = note, after_s


def noted(waits: Waits | None, operation: str, where: str) -> Any:
    """Return a context in which a wait is noted; None: nobody says so."""
    return nullcontext() if waits is None else waits.noted(operation, where)
