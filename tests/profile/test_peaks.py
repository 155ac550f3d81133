"""A micro-batch weighs what its tensors take when most of them are there."""

from __future__ import annotations

import pytest
import torch

from hf_hetero.profile.peaks import num_bytes, states_of, weighed

MIB = 2**20
CPU = torch.device("cpu")


def test_the_most_at_a_time_counts() -> None:
    """Of tensors that come and go, those that were there together are counted, and those of the start once."""
    kept = torch.zeros(MIB)
    with weighed([kept, kept.view(-1)], CPU) as peak:
        first, second = torch.zeros(MIB), torch.ones(MIB)
        del first
        third = second + kept
        fourth = third + kept
        del third
    assert peak == [pytest.approx(4 * 4 * MIB, rel=1e-3)]
    assert fourth.numel() == MIB
    with weighed([], CPU) as peak:
        pass
    assert peak == [0]


def test_what_waits_for_backward_counts(capfd: pytest.CaptureFixture[str]) -> None:
    """A chain of layers holds the input of each; without gradients one at a time. Nothing is written meanwhile."""
    layers = torch.nn.Sequential(*(torch.nn.Tanh() for _ in range(8)))
    found: list[int] = []
    for keeps in (True, False):
        given = torch.randn(MIB // 4, requires_grad=keeps)
        with weighed([given], CPU) as peak, torch.set_grad_enabled(keeps):
            out = layers(given).sum()
            if keeps:
                out.backward()
        found += peak
    assert found[0] == pytest.approx((1 + 8 + 2) * MIB, abs=1.1 * MIB)
    assert found[1] == pytest.approx(3 * MIB, rel=1e-3)
    assert "USDT" not in capfd.readouterr().err


def test_states_are_counted_once() -> None:
    """Weights, tied ones once, their gradients, and two moments of Adam."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    assert num_bytes(states_of(model, optimizer)) == 4 * 256
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    assert num_bytes(states_of(model, optimizer)) == pytest.approx(4 * 4 * 256, abs=64)  # and a count of steps
