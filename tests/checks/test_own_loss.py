"""A loss is taken if the loss of two samples is the sum of theirs; else it is refused with both numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch.nn import functional as F

from hf_hetero import UnsupportedModel
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.checks.own_loss import TOKENS, check
from hf_hetero.collators.sample import Sample
from hf_hetero.collators.spans import pack_spans
from hf_hetero.layout import contiguous

Loss = Callable[[Any, dict[str, Any], Any], Any]


def pack(numbers: Sequence[int]) -> dict[str, Any]:
    ids = [torch.arange(3, 3 + TOKENS), torch.arange(11, 11 + TOKENS)]
    layout = contiguous([TOKENS] * len(numbers), 1)
    context = AttentionContext(layout, (0,), 0, None, "ulysses", CPU, torch.device("cpu"))
    samples = [Sample(ids[number], ids[number]) for number in numbers]
    return {**pack_spans(layout.spans[0], samples, unshifted=True), "hetero": context}


CONFIG = tiny_model().config


def tried(loss: Loss) -> None:
    check(loss, pack, CONFIG, torch.device("cpu"), "Own.compute_loss")


def of_labels(outputs: Any, labels: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    return F.cross_entropy(outputs.logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction=reduction)


SUMS: dict[str, Loss] = {
    "the model's": lambda model, inputs, total: model(**inputs, num_items_in_batch=total).loss,
    "ten times": lambda model, inputs, total: 10 * model(**inputs, num_items_in_batch=total).loss,
    "its own shift": lambda model, inputs, total: of_labels(model(**inputs), inputs["labels"]) / total,
    "entropy, too": lambda model, inputs, total: (
        model(**inputs).logits[0, :-1][inputs["labels"][0, 1:] != -100].softmax(-1).square().sum() / total
    ),
}
OTHERS: dict[str, tuple[Loss, str]] = {
    "a mean": (lambda model, inputs, total: model(**inputs).loss, "for two samples together"),
    "a constant": (lambda model, inputs, total: of_labels(model(**inputs), inputs["labels"]) / total + 1, "together"),
    "the last row": (lambda model, inputs, total: model(**inputs).logits[:, -1].logsumexp(-1).sum(), "together"),
    "another input": (lambda model, inputs, total: inputs["rewards"].sum(), "could not be tried: KeyError"),
    "nothing finite": (lambda model, inputs, total: model(**inputs).loss * float("nan"), "together"),
    "dropped inputs": (
        lambda model, inputs, total: of_labels(model(inputs["input_ids"]), inputs["labels"]) / total,
        "does not hand all its inputs",
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_taken(name: str) -> None:
    """Whatever is added up token by token."""
    tried(SUMS[name])


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_refused(name: str) -> None:
    """With what was found, and a remedy that names what can be taken."""
    loss, message = OTHERS[name]
    with pytest.raises(UnsupportedModel, match=message) as caught:
        tried(loss)
    assert "Own.compute_loss" in str(caught.value)
    assert "compute_loss_func(outputs, labels, num_items_in_batch)" in str(caught.value)


def test_random_numbers_are_as_they_were() -> None:
    """A trial moves no generator that training draws from."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    tried(lambda model, inputs, total: model(**inputs, num_items_in_batch=total).loss + 0 * torch.rand(1))
    assert torch.equal(torch.random.get_rng_state(), before)
