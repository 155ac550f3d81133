"""After a step that came to no end, all that forward and backward may change is as it was before."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import torch

from hf_hetero.model.rewind import Before


class Counts(torch.nn.Module):
    """It changes one buffer in place, and puts another in the place of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x.detach().repeat(2)
        return (torch.nn.functional.dropout(x * self.weight, 0.5) * random.random() * np.random.rand()).sum()


def test_all_is_as_before() -> None:
    """A second pass gives what the first one gave, gradients and counts included, as often as it is begun anew."""
    model, trainer = Counts(), SimpleNamespace(_metrics={"train": {"loss": [1.0]}})
    before = Before.now(trainer, model, torch.device("cpu"))
    assert not before.has_gradients
    found = []
    for _ in range(3):
        loss = model(torch.arange(2.0) + 1)
        loss.backward()
        trainer._metrics["train"]["loss"].append(loss.item())
        assert model.weight.grad is not None
        counts = trainer._metrics["train"]["loss"], model.calls.tolist()
        found.append((loss.item(), model.weight.grad.tolist(), *counts))
        before.restore()
        assert model.weight.grad is None
        assert (model.calls.tolist(), model.last.tolist()) == ([0.0], [0.0, 0.0])
        assert trainer._metrics == {"train": {"loss": [1.0]}}
    assert found[0] == found[1] == found[2]
    assert list(model.state_dict()) == ["weight", "calls", "last"]


def test_gradients_of_before_are_seen() -> None:
    """What was there already is noticed, because it could not be told from what is added."""
    model = Counts()
    model.weight.grad = torch.zeros(2)
    assert Before.now(SimpleNamespace(), model, torch.device("cpu")).has_gradients
