"""A rank's own seconds stop when its last gradient is there, not when the others have theirs."""

from __future__ import annotations

import time
from typing import Any

import torch

from hf_hetero.timing import StepClock


class SlowEnd(torch.autograd.Function):
    """Its backward runs before that of the layers below it; after them nothing is left to do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return grads[0]


def test_stops_at_the_first_parameters_gradient() -> None:
    """Time inside backward counts; time after the last gradient, where ranks wait for each other, does not."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    clock = StepClock(model, torch.device("cpu"))
    elapsed: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        with clock.micro_batch():
            SlowEnd.apply(model(torch.randn(2, 4))).sum().backward()  # pyright: ignore
            time.sleep(0.2)
        elapsed.append(time.perf_counter() - start)
    seconds = clock.read()
    assert len(seconds) == 2
    assert all(0.05 <= s <= whole - 0.19 for s, whole in zip(seconds, elapsed, strict=True))
    assert clock.read() == []
    clock.close()


def test_without_a_gradient_the_whole_block_counts() -> None:
    """A frozen model, or one that got no gradient, is timed to the end."""
    clock = StepClock(torch.nn.Linear(2, 2).requires_grad_(False), torch.device("cpu"))
    with clock.micro_batch():
        time.sleep(0.05)
    assert clock.read()[0] >= 0.05
    clock.close()
