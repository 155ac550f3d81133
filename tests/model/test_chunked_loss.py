"""The loss in chunks is `cross_entropy` of whole logits, and its gradients are that one's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_hetero.model.chunked_loss import chunked_log_probs, chunked_loss


def chunked(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    targets: torch.Tensor,
    chunk_tokens: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    changes = (lambda x: torch.tanh(x / 2), lambda x: x * 2)
    chunk_bytes = 4 * head.out_features * chunk_tokens
    return chunked_loss(hidden, head.weight, head.bias, targets, changes, chunk_bytes=chunk_bytes, weights=weights)


@pytest.mark.parametrize("chunk_tokens", [0, 1, 6, 7, 8, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_chunks(chunk_tokens: int, bias: bool, weighed: bool) -> None:
    """Whether a chunk holds one target, exactly all (7), one fewer or more: the same; with weights of any sign, too."""
    torch.manual_seed(0)
    weights = torch.randn(10, dtype=torch.float64) if weighed else None
    head = torch.nn.Linear(5, 13, bias=bias, dtype=torch.float64)
    targets = torch.tensor([-100, 3, 4, -100, 12, 0, -100, 5, 5, 1])
    found = []
    for lean in (False, True):
        hidden = torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(1, 10, 5).requires_grad_()
        if lean:
            loss = chunked(hidden, head, targets, chunk_tokens, weights)
        else:
            logits = torch.tanh(head(hidden) / 2) * 2
            terms = F.cross_entropy(logits[0], targets, ignore_index=-100, reduction="none")
            loss = (terms if weights is None else terms * weights).sum()
        loss.backward()
        found.append([loss.detach(), hidden.grad, *(p.grad for p in head.parameters())])
        head.zero_grad()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_scale_is_not_rounded() -> None:
    """A factor that bf16 cannot hold scales bf16 gradients as it is: 0.875 x 257 / 256, not 0.875 x 1."""
    head = torch.nn.Linear(4, 8, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(head.weight)  # so each class has a probability of 1 / 8
    hidden = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    (257 / 256 * chunked_loss(hidden, head.weight, None, torch.tensor([2]))).backward()
    assert head.weight.grad is not None
    assert head.weight.grad[2, 0] == torch.tensor(-0.875 * 257 / 256).bfloat16() != -0.875


def test_only_what_trains_gets_a_gradient() -> None:
    """Hidden states, weight and bias may each be frozen; those that are not get what they get when all train."""
    torch.manual_seed(0)
    tensors = [torch.randn(size, dtype=torch.float64) for size in ((6, 4), (9, 4), (9,))]
    targets = torch.tensor([1, -100, 8, 0, 3, 3])
    leaves = [x.clone().requires_grad_() for x in tensors]
    F.cross_entropy(F.linear(*leaves), targets, reduction="sum").backward()
    for number in range(3):
        some = [x.clone().requires_grad_(position == number) for position, x in enumerate(tensors)]
        chunked_loss(*some, targets, chunk_bytes=4 * 9 * 2).backward()
        assert [x.grad is not None for x in some] == [position == number for position in range(3)]
        torch.testing.assert_close(some[number].grad, leaves[number].grad, rtol=1e-12, atol=1e-14)


def test_it_is_differentiated_once() -> None:
    """A gradient of its gradient, which it does not know, is refused instead of being zero."""
    hidden = torch.randn(2, 4, requires_grad=True)
    loss = chunked_loss(hidden, torch.randn(9, 4), None, torch.tensor([1, 2]))
    [gradient] = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_log_probs(chunk_tokens: int, bias: bool) -> None:
    """Each is `log_softmax` at its target, under any loss, and zero where there is none; so is what is watched."""
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 13, bias=bias, dtype=torch.float64)
    targets = torch.tensor([-100, 3, 4, -100, 12, 0, -100, 5, 5, 1])
    is_target = targets != -100
    found = []
    for lean in (False, True):
        hidden = torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(1, 10, 5).requires_grad_()
        if lean:
            changes = (lambda x: torch.tanh(x / 2), lambda x: x * 2)
            chunk_bytes = 4 * head.out_features * chunk_tokens
            given = chunked_log_probs(hidden, head.weight, head.bias, targets, changes, chunk_bytes=chunk_bytes)
            log_probs, watched = given[0], given[1:]
        else:
            logits = torch.tanh(head(hidden) / 2)[0] * 2
            log_softmax = F.log_softmax(logits, -1)
            log_probs = log_softmax.gather(1, targets.clamp(min=0)[:, None])[:, 0] * is_target
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            watched = torch.stack([entropy, logits.mean(-1), (logits.argmax(-1) == targets).double()]) * is_target
        torch.sigmoid(log_probs.cumsum(0) / 3).square().sum().backward()
        found.append([log_probs.detach(), watched.detach(), hidden.grad, *(p.grad for p in head.parameters())])
        head.zero_grad()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_log_probs_of_nothing_have_a_gradient() -> None:
    """Without a target there is nothing to learn, and the graph is whole: a wrapper meets every weight."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    chunked_log_probs(hidden, weight, None, torch.full((3,), -100)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_bf16_log_probs() -> None:
    """Those of a bf16 head are in fp32, and as near to the exact ones as whole logits in bf16 bring them."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(64, 32).bfloat16(), (torch.randn(500, 32) / 6).bfloat16()
    targets = torch.randint(0, 500, (64,))
    given = chunked_log_probs(hidden, weight, None, targets, chunk_bytes=4 * 500 * 10)[0]
    exact = F.log_softmax(F.linear(hidden.double(), weight.double()), -1).gather(1, targets[:, None])[:, 0]
    whole = F.log_softmax(F.linear(hidden, weight).float(), -1).gather(1, targets[:, None])[:, 0]
    assert given.dtype == torch.float32
    assert (given - exact).abs().max() <= 1.01 * (whole - exact).abs().max()
