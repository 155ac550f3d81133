"""Losses of classes and numbers are torch's own, summed over the tokens that have a label."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_hetero.model.classes.class_loss import MANY_CLASSES, REGRESSION, class_loss, has_label, numbers_of, problem_of
from hf_hetero.model.loss import IGNORE_INDEX, carried_weights

NUMBERS = torch.tensor([[0.25, 1.0], [0.0, -3.5], [1e300, 1.0]], dtype=torch.float64)


def labels_of(numbers: torch.Tensor, places: list[int], num_tokens: int) -> torch.Tensor:
    labels = torch.full((1, num_tokens, numbers.shape[1]), IGNORE_INDEX)
    labels[0, places] = carried_weights(numbers)
    return labels


def test_numbers_travel_whole() -> None:
    """Numbers come back bit for bit, and what stands for no label is none of them."""
    labels = labels_of(NUMBERS, [0, 3, 4], 6)
    assert has_label(labels).tolist() == [[True, False, False, True, True, False]]
    assert torch.equal(numbers_of(labels)[0, [0, 3, 4]], NUMBERS)
    assert bool(numbers_of(labels)[0, 1].isnan().all())


@pytest.mark.parametrize("problem", [REGRESSION, MANY_CLASSES])
def test_numbers_have_the_mean_over_labels(problem: str) -> None:
    """Each labelled token adds torch's mean over its numbers; the others have no gradient, and none is nan."""
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    numbers = (NUMBERS[:2] > 0).double()
    loss = class_loss(logits, labels_of(numbers, [1, 4], 6), problem)
    function = F.mse_loss if problem == REGRESSION else F.binary_cross_entropy_with_logits
    expected = sum(function(logits[0, place], number) for place, number in zip((1, 4), numbers, strict=True))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, [0, 2, 3, 5]].abs().max() == 0
    assert gradient.isfinite().all()


def test_classes_have_cross_entropies() -> None:
    """One class a token: cross-entropies, each times its weight; in fp32 where logits are bf16."""
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 5, 3), torch.tensor([[0, IGNORE_INDEX, 2, 1, IGNORE_INDEX]])
    expected = F.cross_entropy(logits[0], labels[0], reduction="sum")
    torch.testing.assert_close(class_loss(logits, labels, problem_of(labels, 3)), expected)
    weights = torch.tensor([[2.0, 5.0, 0.0, 0.0, 7.0]])
    weighed = class_loss(logits, labels, problem_of(labels, 3), carried_weights(weights))
    torch.testing.assert_close(weighed, 2 * F.cross_entropy(logits[0, :1], labels[0, :1]))
    assert class_loss(logits.bfloat16(), labels, problem_of(labels, 3)).dtype == torch.float32


def test_a_rank_without_labels_has_a_gradient() -> None:
    """Its loss is 0 and leads to its logits all the same, so that it joins every exchange of gradients."""
    logits = torch.randn(1, 1, 3, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX]])
    loss = class_loss(logits, labels, problem_of(labels, 3))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (loss.item(), gradient.abs().max().item()) == (0, 0)
