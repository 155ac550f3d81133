"""Each loss of pairs is TRL's, to the last digits: its value, and its gradient by each log-probability."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_hetero.trainer.pairs.losses import LOSSES, Completion, Desirability, Preference

trl = pytest.importorskip("trl")

COMPLETIONS = ((4, 2, 7, 1, 3), (5, 6, 1, 2, 3))
"""Tokens of chosen and rejected completions, each after a prompt of two."""
DIVERGING = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


def theirs(by: Preference, per_token: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """TRL's loss of a batch, whose model gives these log-probabilities; the first pair is the first of each half."""
    numbers = torch.zeros(mask.shape[0], mask.shape[1] - 1, dtype=per_token.dtype)
    outputs = SimpleNamespace(log_probs=per_token, entropy=numbers, mean_logits=numbers, is_top1=numbers.bool())
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=by.f_divergence_type,
        f_alpha_divergence_coef=by.f_alpha_divergence_coef,
        loss_types=list(by.loss_type),
        loss_weights=list(by.loss_weights),
        beta=by.beta,
        label_smoothing=by.label_smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=by.discopop_tau),
        maybe_activation_offload_context=nullcontext(),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    of_chosen, of_rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": of_chosen,
        "ref_rejected_logps": of_rejected,
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


def compare(by: Preference, dtype: torch.dtype, spread: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss and gradients of both, of the same log-probabilities."""
    torch.manual_seed(3)
    counts = torch.tensor(COMPLETIONS).flatten()
    places = torch.arange(int(counts.max()) + 2)
    mask = ((places >= 2) & (places < 2 + counts[:, None])).long()
    drawn = -torch.rand(mask.shape[0], mask.shape[1] - 1, dtype=dtype) * mask[:, 1:]
    reference = (drawn.sum(1) + spread * torch.randn(len(drawn), dtype=dtype)).detach()
    found: list[list[torch.Tensor]] = []
    for is_theirs in (True, False):
        per_token = drawn.clone().requires_grad_()
        if is_theirs:
            loss = theirs(by, per_token, reference, mask)
        else:
            sides = zip(per_token.sum(1).chunk(2), reference.chunk(2), counts.chunk(2), strict=True)
            chosen, rejected = (Completion(*side) for side in sides)
            loss = by.losses(chosen, rejected, len(chosen.log_probs) / float(chosen.num_tokens.sum())).mean()
        loss.backward()
        assert per_token.grad is not None
        found.append([loss.detach(), per_token.grad * mask[:, 1:]])
    return found[0], found[1]


@pytest.mark.parametrize("name", [*LOSSES, "sft"])
def test_losses(name: str) -> None:
    """Alone, of any beta; with label smoothing where the loss knows it."""
    for beta in (0.1, 0.7):
        by = Preference((name,), (1.0,), beta, label_smoothing=0.2)
        # TRL has the logarithms of label smoothing in fp32
        near = {"rtol": 1e-6, "atol": 1e-8} if name == "exo_pair" else {"rtol": 1e-12, "atol": 1e-14}
        for mine, expected in zip(*compare(by, torch.float64), strict=True):
            torch.testing.assert_close(expected, mine, **near)
            assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", DIVERGING)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences(name: str, divergence: str) -> None:
    """With each divergence that TRL allows, in fp32, where TRL computes one of them."""
    for alpha in (0.5, 1.0, 2.0):
        by = Preference((name,), (1.0,), 0.3, 0.1, divergence, alpha)
        for mine, expected in zip(*compare(by, torch.float32), strict=True):
            torch.testing.assert_close(mine, expected, rtol=2e-5, atol=1e-6)


def test_combined() -> None:
    """Several losses are added with their weights, as MPO does."""
    by = Preference(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0))
    for mine, expected in zip(*compare(by, torch.float64), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


def test_another_loss_would_be_noticed() -> None:
    """Losses differ from each other by more than rounding: none passes for another."""
    values = {name: float(compare(Preference((name,), (1.0,), 0.3, 0.2), torch.float64)[1][0]) for name in LOSSES}
    ordered = sorted(values.values())
    assert min(b - a for a, b in pairwise(ordered)) > 1e-3


def test_unpaired_completions() -> None:
    """KTO as its paper has it (arXiv:2402.01306, eq. 7 and 8), term by term; of a mismatched one nothing is learned."""
    by = Desirability(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    ratios = torch.tensor([2.0, -1.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    signs, z = torch.tensor([1.0, -1.0, 1.0, 0.0], dtype=torch.float64), 0.4
    found = by.losses(ratios, signs, z)
    values = [
        1.3 * (1 - 1 / (1 + math.exp(-0.3 * (2.0 - z)))),
        0.7 * (1 - 1 / (1 + math.exp(-0.3 * (z + 1.0)))),
        1.3 * (1 - 1 / (1 + math.exp(-0.3 * (0.5 - z)))),
        0.0,
    ]
    assert found.tolist() == pytest.approx(values, rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), ratios)
    assert gradient[3] == 0
    assert torch.equal(gradient.sign(), torch.tensor([-1.0, 1.0, -1.0, 0.0], dtype=torch.float64))
