"""Sums of a sample's tokens on one rank: what is held of it, and no other sample's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hf_hetero.layout import Layout, Span
from hf_hetero.trainer.pairs.sums import at_starts, by_sample, counted_once, over_group

LAYOUT = Layout((4, 3, 2), ((Span(0, 2, 4), Span(1, 0, 3)), (Span(2, 0, 2), Span(0, 0, 2))))


def context(rank: int) -> Any:
    spans = LAYOUT.spans[rank]
    tokens = sum(span.num_tokens for span in spans)
    return SimpleNamespace(
        layout=LAYOUT, group_rank=rank, num_tokens=tokens, peers=SimpleNamespace(group=None), waits=None
    )


def test_tokens_go_to_their_samples() -> None:
    """Each rank's part, without the token that stands in; the parts of all ranks add up to the whole."""
    first, second = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 99.0]), torch.tensor([[32.0, 64.0, 128.0, 256.0]])
    parts = by_sample(context(0), first), by_sample(context(1), second)[0]
    assert parts[0].tolist() == [3, 28, 0]
    assert parts[1].tolist() == [384, 0, 96]
    assert at_starts(context(0), first).tolist() == [0, 4, 0]
    assert at_starts(context(1), second[0]).tolist() == [128, 0, 32]


def test_gradients_are_of_own_tokens() -> None:
    """A sum has a gradient of 1 by each of its terms; a loss whose value ranks share has its whole gradient on each."""
    values = torch.arange(5, dtype=torch.float64, requires_grad=True)
    sums = over_group(context(0), by_sample(context(0), values))
    loss = counted_once(context(0), (sums * torch.tensor([2.0, 3.0, 5.0])).sum())
    loss.backward()
    assert loss.item() == (2 * 1 + 3 * 9) / 2
    assert values.grad is not None
    assert values.grad.tolist() == [2, 2, 3, 3, 3]
