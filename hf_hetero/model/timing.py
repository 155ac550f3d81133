"""A clock tells the seconds that a rank computes from those it waits for the other groups; and the memory it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """A `StepClock` times each micro-batch of a step, up to the moment its last gradient is there.

    The backward pass of the last micro-batch also waits for the gradients of all other ranks. So the clock stops not at
    its end but when the parameter nearest to the input has its gradient, which is the last to come. On CUDA the
    moments are events in the stream, read once when the step is over.

    On CUDA it also starts torch's peak of allocated memory anew with each step. That peak is one for the whole process;
    so where somebody else needs it, this clock can leave it alone.

    Args:
        model: its first trainable parameter is watched.
        device: where it computes.
        resets_peak: a step's peak is its own, not that of all that came before.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, resets_peak: bool = True) -> None:
        self._device, self._resets_peak = device, resets_peak and device.type == "cuda"
        self._last_gradient: Any = None
        self._spans: list[tuple[Any, Any]] = []
        first = next((p for p in model.parameters() if p.requires_grad), None)
        self._hook = None if first is None else first.register_post_accumulate_grad_hook(self._note)

    def _note(self, _: torch.Tensor) -> None:
        self._last_gradient = self._now()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Time what is done inside."""
        if self._resets_peak and not self._spans:  # the first of a step
            torch.cuda.reset_peak_memory_stats(self._device)
        self._last_gradient = None
        start = self._now()
        yield
        self._spans.append((start, self._last_gradient or self._now()))

    def read(self) -> list[float]:
        """Return the seconds of each micro-batch since the last reading; this waits for the device."""
        if self._device.type != "cuda":
            seconds = [end - start for start, end in self._spans]
        else:
            torch.cuda.synchronize(self._device)
            seconds = [start.elapsed_time(end) / 1000 for start, end in self._spans]
        self._spans = []
        return seconds

    def forget(self) -> None:
        """Forget the micro-batches since the last reading: the step begins again."""
        self._spans = []

    def peak_bytes(self) -> int:
        """Return the most bytes allocated at a time since the step began; 0 where they are not counted."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def unused_bytes(self) -> int:
        """Return the bytes that torch's allocator held at its peak beyond those of its peak of tensors; 0 as above."""
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_reserved(self._device) - torch.cuda.max_memory_allocated(self._device)

    def close(self) -> None:
        """Stop watching; the model is as before."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
