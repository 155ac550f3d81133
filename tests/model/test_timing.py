"""A rank's own seconds stop when its last gradient is there, not when the others have theirs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from hf_hetero.model.timing import StepClock


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


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None: ...
    def record(self) -> None: ...
    def elapsed_time(self, other: object) -> float:
        return 1.0


@pytest.mark.parametrize("resets_peak", [True, False])
def test_a_steps_peak_is_its_own(monkeypatch: pytest.MonkeyPatch, resets_peak: bool) -> None:
    """On CUDA, a step's first micro-batch starts the peak anew and its others do not; unless somebody else needs it."""
    peak = {"now": 0}
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: peak.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: peak["now"])
    clock, found = StepClock(torch.nn.Linear(2, 2), torch.device("cuda"), resets_peak), []
    for step in ((9, 4), (3, 5)):
        for num_bytes in step:
            with clock.micro_batch():
                peak["now"] = max(peak["now"], num_bytes)
        clock.read()
        found.append(clock.peak_bytes())
    assert found == ([9, 5] if resets_peak else [9, 9])


def test_nothing_is_left_on_the_model() -> None:
    """Clocks of one trainer after the other do not pile up: a closed one is not there, however often it is closed."""
    model = torch.nn.Linear(2, 2)
    clocks = [StepClock(model, torch.device("cpu")) for _ in range(3)]
    assert len(model.weight._post_accumulate_grad_hooks) == 3  # type: ignore[attr-defined]
    for clock in (*clocks, clocks[0]):
        clock.close()
    assert not model.weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]
