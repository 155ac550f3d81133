"""The loss is transformers' own, except that fp64 stays fp64."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_hetero.model.loss import install, num_targets, shift_labels, token_loss, uninstall


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_transformers(dtype: torch.dtype, count: int | None, shifted: bool) -> None:
    """Bit-equal to ForCausalLMLoss in the types it supports, given labels or shifted labels."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, 11).to(dtype), torch.randint(0, 11, (2, 9))
    labels[0, :4] = -100
    targets = {"shift_labels": torch.roll(labels, -1, 1)} if shifted else {}
    ours = token_loss(logits, labels, 11, num_items_in_batch=count, **targets)
    theirs = ForCausalLMLoss(logits, labels, 11, num_items_in_batch=count, **targets)
    assert torch.equal(ours, theirs)


def test_keeps_float64() -> None:
    """In fp64 it equals the definition to fp64's own rounding."""
    logits, targets = torch.randn(1, 5, 11, dtype=torch.float64), torch.tensor([[1, -100, 3, 4, -100]])
    loss = token_loss(logits, targets, 11, num_items_in_batch=torch.tensor(2), shift_labels=targets)
    expected = -sum(logits[0, t].log_softmax(-1)[targets[0, t]] for t in (0, 2, 3)) / 2
    assert loss.dtype == torch.float64
    assert abs(float(loss - expected)) < 1e-15


def test_shift_stays_inside_the_sample() -> None:
    """The last token of a sample predicts nothing."""
    assert shift_labels(torch.tensor([5, 6, 7])).tolist() == [6, 7, -100]
    assert shift_labels(torch.tensor([5])).tolist() == [-100]
    assert num_targets(torch.tensor([6, -100, 7])) == 2


def test_no_targets_is_zero_with_a_gradient() -> None:
    """A rank whose tokens have no target still has a graph, and a gradient of zero."""
    logits = torch.randn(1, 3, 4, requires_grad=True)
    targets = torch.full((1, 3), -100)
    loss = token_loss(logits, targets, 4, num_items_in_batch=5, shift_labels=targets)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_model_gets_its_loss_back() -> None:
    """What it had set, or nothing where it had nothing set, when the last of those who used it is done."""
    for before in ({}, {"_loss_function": ForCausalLMLoss}):
        model = tiny_model()
        vars(model).update(before)
        state = dict(vars(model))
        for _ in range(2):
            install(model, ForCausalLMLoss)
        uninstall(model)
        assert model.loss_function is token_loss
        for _ in range(2):
            uninstall(model)
            assert vars(model) == state
        assert model.loss_function is ForCausalLMLoss


def test_a_loss_of_the_users_stays() -> None:
    """One that was there before is never replaced; one that was set since is never taken away."""

    def own(*args: object, **kwargs: object) -> None: ...

    model = tiny_model()
    model.loss_function = own
    install(model, ForCausalLMLoss)
    assert model.loss_function is own
    uninstall(model)
    model.loss_function = ForCausalLMLoss
    install(model, ForCausalLMLoss)
    model.loss_function = own
    uninstall(model)
    assert model.loss_function is own
