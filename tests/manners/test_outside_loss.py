"""A loss that is computed outside of a model is the model's own, divided by what a step has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from hf_hetero.checks.alone import learnt_alone
from hf_hetero.manners.outside_loss import OutsideLoss, keywords_of
from hf_hetero.model import lm_head
from hf_hetero.model.loss import IGNORE_INDEX, carried_weights, shift_labels

IDS = torch.randint(3, 97, (1, 19), generator=torch.Generator().manual_seed(0))
LABELS = IDS.roll(5, dims=1).masked_fill(torch.arange(19) % 4 == 0, IGNORE_INDEX)


def bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        init_std=0.3,
        dropout=0.0,
    )
    return transformers.BartForCausalLM(config).double().train()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lazy", [False, True], ids=["whole logits", "lazy logits"])
def test_it_is_the_models_own(lazy: bool) -> None:
    """Without a divisor; with one, times the targets. Its gradients, too. Afterwards the model is as it was."""
    model = bart()
    expected = model(IDS, labels=LABELS).loss
    of_expected = gradients(model, expected)
    outside = OutsideLoss(model, model, aligned=True)
    head: Any = lm_head.install(model) if lazy else None
    try:
        targets = int((LABELS != IGNORE_INDEX).sum())
        assert torch.allclose(model(input_ids=IDS, labels=LABELS).loss, expected, rtol=1e-12)
        with head.lazy() if lazy else nullcontext():
            found = model(input_ids=IDS, shift_labels=LABELS, num_items_in_batch=2 * targets)
        assert isinstance(found.logits, lm_head.LazyLogits) == lazy
        assert torch.allclose(2 * found.loss, expected, rtol=1e-12)
        for name, gradient in gradients(model, 2 * found.loss).items():
            assert torch.allclose(gradient, of_expected[name], rtol=1e-10, atol=1e-14), name
    finally:
        outside.remove()
        if lazy:
            lm_head.uninstall(model)
    assert torch.equal(model(IDS, labels=LABELS).loss, expected)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_labels_of_other_tokens_are_caught() -> None:
    """A loss of the next token's label is another; so the trial finds which one a model means."""
    model = bart()
    expected = model(IDS, labels=LABELS).loss
    outside = OutsideLoss(model, model, aligned=False)
    assert not torch.isclose(model(input_ids=IDS, labels=LABELS).loss, expected, rtol=1e-3)
    outside.remove()
    alone = learnt_alone(model, [IDS[0, :7], IDS[0, 7:8], IDS[0, 8:]])
    assert alone is not None
    assert (alone.manner.outside_loss, alone.manner.aligned, alone.num_targets) == (True, True, 19)


def test_weights_of_tokens() -> None:
    """Each target's term is multiplied by its weight; of a target that weighs nothing, nothing is learned."""
    model = bart()
    weights = torch.arange(19, dtype=torch.float64)
    outside = OutsideLoss(model, model, aligned=True)
    loss = model(input_ids=IDS, shift_labels=LABELS, loss_weights=carried_weights(weights)[None], num_items_in_batch=3)
    outside.remove()
    terms = F.cross_entropy(model(IDS).logits[0], LABELS[0], reduction="none")
    assert torch.allclose(loss.loss, (terms * weights).sum() / 3)


class Bare(torch.nn.Module):
    """A model that takes no keyword that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bart()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return self.inner(input_ids, labels=labels)


def test_unknown_keywords_are_kept_from_a_model() -> None:
    """What a plan hands to all models does not reach one that would not know it."""
    model = Bare()
    assert keywords_of(model) == {"self", "input_ids", "labels"}
    assert keywords_of(bart()) is None
    with pytest.raises(TypeError, match="hetero"):
        model(input_ids=IDS, hetero=None)
    outside = OutsideLoss(model, model, aligned=False)
    found = model(input_ids=IDS, hetero=None, position_ids=None, labels=LABELS).loss
    outside.remove()
    expected = F.cross_entropy(bart()(IDS).logits[0], shift_labels(LABELS[0]))
    assert torch.allclose(found, expected)


class Smoothed(transformers.BartForCausalLM):
    """A loss of its own that is no plain cross-entropy."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        if found.loss is not None:
            found.loss = found.loss + 1e-3 * found.logits.logsumexp(-1).mean()
        return found


def test_another_loss_is_not_taken_for_a_plain_one() -> None:
    """A small term beside the cross-entropy is noticed."""
    model: Any = Smoothed(bart().config).double().eval()
    assert learnt_alone(model, [IDS[0]]) is None
