"""The loss of routers is a product of means over all tokens, whose parts add up; transformers' function is matched."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_hetero import UnsupportedModel
from hf_hetero.model.experts.router_loss import RoutedStep, RouterLoss, balance_of, choices_of

NUM_TOKENS, NUM_EXPERTS, NUM_USED = 40, 6, 2


def logits(seed: int = 0) -> list[torch.Tensor]:
    """Of three layers, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator, dtype=torch.float64) for _ in range(3)]


def by_definition(layers: list[torch.Tensor]) -> torch.Tensor:
    """E sum_e f_e P_e, both means over all rows of all layers."""
    probabilities = torch.cat(layers).softmax(-1)
    chosen = F.one_hot(probabilities.topk(NUM_USED).indices, NUM_EXPERTS).sum(1).double()
    return NUM_EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum()


def test_it_is_that_of_transformers() -> None:
    """With and without tokens that do not count, which come last here and are masked there."""
    layers = [layer.float() for layer in logits()]
    for num_tokens in (NUM_TOKENS, 23):
        mask = (torch.arange(NUM_TOKENS) < num_tokens).long()[None]
        theirs = load_balancing_loss_func(tuple(layers), NUM_EXPERTS, NUM_USED, mask)
        ours = balance_of(choices_of(layers, num_tokens, NUM_USED), NUM_USED).loss
        assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    ours = balance_of(choices_of(logits(), NUM_TOKENS, NUM_USED), NUM_USED).loss
    assert float(ours) == pytest.approx(float(by_definition(logits())), rel=1e-13)


class Routed(torch.nn.Module):
    """What stands for a model: it gives the logits of routers that it is called with, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        inner = tiny_model("qwen3-moe")
        self.config, self.router_aux_loss_coef = inner.config, 0.5
        self.num_experts, self.num_experts_per_tok = NUM_EXPERTS, NUM_USED
        self.base_model = Below()

    def forward(self, layers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.base_model(layers)
        return {"loss": torch.full((), self.router_aux_loss_coef), "aux_loss": torch.ones(())}


class Output(dict[str, list[torch.Tensor]]):
    @property
    def router_logits(self) -> list[torch.Tensor]:
        return self["layers"]


class Below(torch.nn.Module):
    def forward(self, layers: list[torch.Tensor]) -> Output:
        return Output(layers=layers)


def parts_of(layers: list[torch.Tensor], cuts: list[tuple[int, int]], local: bool = False) -> dict[str, torch.Tensor]:
    """Losses, auxiliary losses and gradients of a step that is cut into micro-batches.

    With `local` the fractions are wrongly those of a micro-batch.
    """
    model = Routed()
    routers = RouterLoss(model, 0.5)
    leaves = [layer.clone().requires_grad_() for layer in layers]
    pieces = [[layer[start:end] for layer in leaves] for start, end in cuts]
    step = RoutedStep(NUM_TOKENS, len(pieces), 1, lambda sums: sums)
    looks = routers.begin(step)
    assert looks
    for piece in pieces[1:]:
        with torch.no_grad(), routers.looked_at(len(piece[0])):
            model(piece)
    losses, aux = torch.zeros(()), []
    for piece in pieces:
        if local:
            routers.begin(RoutedStep(NUM_TOKENS, len(pieces), 1, lambda sums: sums))
        with routers.adding(model, len(piece[0])):
            output = model(piece)
        losses = losses + output["loss"]
        aux.append(output["aux_loss"])
    gradients = torch.autograd.grad(losses, leaves, retain_graph=True)
    of_aux = torch.autograd.grad(torch.stack(aux).mean(), leaves)
    routers.end()
    assert model.router_aux_loss_coef == 0.5
    return {
        "loss": losses.detach(),
        "aux": torch.stack(aux).detach(),
        "value": torch.tensor(routers.value, dtype=torch.float64),
        "gradients": torch.stack(gradients),
        "of_aux": torch.stack(of_aux),
    }


CUTS = [[(0, NUM_TOKENS)], [(0, 7), (7, 7), (7, 31), (31, NUM_TOKENS)], [(0, 0), (0, 20), (20, NUM_TOKENS)]]


@pytest.mark.parametrize("cuts", CUTS, ids=["one", "four", "first empty"])
def test_parts_add_up(cuts: list[tuple[int, int]]) -> None:
    """However a step is cut, loss and gradients are those of all tokens at once, and each part says the whole's value.

    Of TRL's trainers, which take the mean of auxiliary losses over micro-batches, the gradient is the same, too.
    """
    leaves = [layer.requires_grad_() for layer in logits()]
    whole = by_definition(leaves)
    gradients, expected = torch.stack(torch.autograd.grad(whole, leaves)), float(whole.detach())
    found = parts_of(logits(), cuts)
    assert float(found["loss"]) == pytest.approx(0.5 * expected, rel=1e-6)  # the model's own is in fp32
    assert float(found["value"]) == pytest.approx(expected, rel=1e-13)
    assert found["aux"].tolist() == pytest.approx([expected] * len(cuts), rel=1e-13)
    assert (found["of_aux"] - gradients).abs().max() <= 1e-12 * gradients.abs().max()
    assert (found["gradients"] - 0.5 * gradients).abs().max() <= 1e-6 * gradients.abs().max()


def test_products_of_micro_batches_are_another_loss() -> None:
    """The comparison above can fail: with fractions of each micro-batch gradients are far away."""
    leaves = [layer.requires_grad_() for layer in logits()]
    gradients = torch.stack(torch.autograd.grad(by_definition(leaves), leaves))
    found = parts_of(logits(), CUTS[1], local=True)
    assert (found["gradients"] - 0.5 * gradients).abs().max() > 1e-2 * gradients.abs().max()


def test_fractions_of_the_step_before() -> None:
    """Under `last_step` the first step is exact, and the next takes its fractions without a look at the others."""
    model, first, second = Routed(), logits(0), logits(1)
    routers = RouterLoss(model, 1.0, last_step=True)
    assert routers.begin(RoutedStep(NUM_TOKENS, 1, 1, lambda sums: sums))
    with routers.adding(model, NUM_TOKENS):
        model(first)
    routers.end()
    assert not routers.begin(RoutedStep(NUM_TOKENS, 2, 1, lambda sums: sums))
    losses = 0.0
    for piece in (slice(0, 11), slice(11, NUM_TOKENS)):
        layers = [layer[piece] for layer in second]
        with routers.adding(model, len(layers[0])):
            losses += float(model(layers)["loss"].detach())
    routers.end()
    before = balance_of(choices_of(first, NUM_TOKENS, NUM_USED), NUM_USED).fractions
    mean = torch.cat(second).softmax(-1).mean(0)
    assert losses == pytest.approx(float(NUM_EXPERTS * (before * mean).sum()), rel=1e-6)
    assert routers.value == pytest.approx(float(by_definition(second)), rel=1e-13)


def test_a_model_without_logits_is_refused() -> None:
    """One that gives none, or those of another number of experts, and says so instead of learning without the loss."""
    model = Routed()
    routers = RouterLoss(model, 1.0)
    routers.begin(RoutedStep(NUM_TOKENS, 1, 1, lambda sums: sums))
    for layers in ([], [torch.zeros(NUM_TOKENS, NUM_EXPERTS + 1)]):
        with pytest.raises(UnsupportedModel, match="Set it to False"), routers.adding(model, NUM_TOKENS):
            model(layers)


def test_gradients_that_reentrant_checkpoints_cut_off_are_noticed() -> None:
    """Logits without a gradient beside a loss with one: routers would not learn, and nobody would notice."""

    class Cut(Routed):
        def forward(self, layers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            output = super().forward([layer.detach() for layer in layers])
            return {**output, "loss": layers[0].sum()}

    model = Cut()
    routers = RouterLoss(model, 1.0)
    routers.begin(RoutedStep(NUM_TOKENS, 1, 1, lambda sums: sums))
    leaves = [layer.requires_grad_() for layer in logits()]
    with pytest.raises(UnsupportedModel, match="use_reentrant"), routers.adding(model, NUM_TOKENS):
        model(leaves)


def test_nothing_is_there_without_a_coefficient() -> None:
    """A model that adds no loss of its routers has a false one."""
    assert not RouterLoss(tiny_model("qwen3-moe"))
