"""How much a piece of Python does, counted instead of timed: instructions, and bytes held at its worst moment."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Work:
    """Instructions of the interpreter; what is done inside C is not counted."""

    instructions: int = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Count the instructions of this thread."""
    work, before = Work(), sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        work.instructions += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        yield work
    finally:
        sys.settrace(before)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that a call holds beyond what there was, its result included."""
    gc.collect()
    tracemalloc.start()
    try:
        result = function()
        peak = tracemalloc.get_traced_memory()[1]
        del result
    finally:
        tracemalloc.stop()
    return peak
