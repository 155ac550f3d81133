"""No plan can change this loss: it is a sum over tokens, divided once by the target tokens of the whole step.

    loss = sum(cross_entropy(logits[t], target[t]) for every target t of every rank) / num_targets

A plan only regroups the terms of that sum. Each rank adds its own terms, the data-parallel average divides by the
number of ranks, and `Trainer.compute_loss` multiplies by it: the gradients are those of the sum above.

Weights, where a dataset has some, are factors of the terms and leave `num_targets` alone: a weight of 0 takes a term
away, and weights of 1 change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hf_hetero.model.chunked_loss import IGNORE_INDEX, chunked_log_probs, chunked_loss, watched_log_probs
from hf_hetero.model.lm_head import LazyLogits, as_written

LENT = "_hf_hetero_loss"
"""Attribute of a model that computes `token_loss`: for how many, and what it had set before."""


def install(model: Any, plain: Callable[..., Any], ours: Callable[..., Any] | None = None) -> None:
    """Have a transformers model call `token_loss` where it would call its plain loss; any other loss is left alone.

    Args:
        model: any of transformers.
        plain: the loss to be replaced.
        ours: what replaces it; None: `token_loss`.

    Each call is undone by one of `uninstall`, so that several trainers may use one model, in any order.
    """
    state = vars(model)
    num_installed, before = state.get(LENT, (0, state.get("_loss_function")))
    # once it is installed, the model's loss is no longer the plain one, and only the count goes up
    if num_installed or model.loss_function is plain:
        state[LENT] = (num_installed + 1, before)
        model.loss_function = token_loss if ours is None else ours


def uninstall(model: Any) -> None:
    """Give the model its own loss back, once nobody needs the other one any more."""
    state = vars(model)
    num_installed, before = state.pop(LENT, (0, None))
    if num_installed > 1:
        state[LENT] = (num_installed - 1, before)
    # unless somebody has set another since
    elif num_installed and state.get("_loss_function") in (token_loss, token_scores):
        if before is None:
            del state["_loss_function"]
        else:
            state["_loss_function"] = before


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the targets of one sample: token t is to predict label t + 1, the last nothing. Shape (num_tokens,)."""
    return F.pad(labels[1:], (0, 1), value=IGNORE_INDEX)


def num_targets(targets: torch.Tensor) -> int:
    """Count the tokens that have something to predict."""
    return int((targets != IGNORE_INDEX).sum())


def carried_weights(weights: torch.Tensor) -> torch.Tensor:
    """Return weights as they travel through a model: the bits of fp64, in whole numbers.

    Mixed precision casts each input of a model that is a floating-point number to half of its digits.
    """
    return weights.to(torch.float64).view(torch.int64)


class SumsBySource:
    """`SumsBySource` adds up the loss of each source in a micro-batch, on the device, without waiting for it.

    Args:
        sources: number of the source of each token, shape (num_tokens,), on the device of the loss.
        num_sources: that are told apart.

    Attributes:
        sums: loss and targets of each source, shape (2, num_sources), in fp64.
    """

    def __init__(self, sources: torch.Tensor, num_sources: int) -> None:
        self._sources = sources
        self.sums = torch.zeros(2, num_sources, dtype=torch.float64, device=sources.device)

    def __call__(self, places: torch.Tensor, terms: torch.Tensor) -> None:
        """Add the terms of some targets: places among the tokens, and their losses, each of shape (n,)."""
        of, terms = self._sources[places], terms.detach().to(torch.float64)
        self.sums[0].index_add_(0, of, terms)
        self.sums[1].index_add_(0, of, torch.ones_like(terms))


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    token_log_probs: bool = False,
    hetero: Any = None,
    **_: Any,
) -> torch.Tensor:
    """Compute transformers' `ForCausalLMLoss`, in at least fp32 instead of always fp32, so that fp64 stays fp64.

    Args:
        logits: shape (batch, num_tokens, vocab_size); lazy ones are never computed whole.
        labels: shape (batch, num_tokens), not shifted; read only when `shift_labels` is None.
        vocab_size: classes.
        num_items_in_batch: divides the sum; None means the mean over this call's targets.
        ignore_index: the label of a token without a target.
        shift_labels: shape (batch, num_tokens): the target of each position.
        loss_weights: shape (batch, num_tokens): of each target, as `carried_weights` are, in the places of
            `shift_labels`, or else of `labels`.
        token_log_probs: give the log-probability of each target, and no sum of them.
        hetero: the context of the micro-batch, whose `by_source` is told the terms.

    Returns:
        A scalar: `cross_entropy(logits, targets, reduction="sum") / num_items_in_batch`, each term times its weight.
        With `token_log_probs` what `chunked_log_probs` gives of all tokens, row by row: shape (4, batch * num_tokens).
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss_weights = None if loss_weights is None else F.pad(loss_weights, (0, 1))[..., 1:]
    if token_log_probs:
        return _log_probs(logits, shift_labels, ignore_index)
    weights = None if loss_weights is None else loss_weights.view(torch.float64)
    watch: SumsBySource | None = getattr(hetero, "by_source", None)
    if isinstance(logits := as_written(logits), LazyLogits):
        targets = shift_labels.to(logits.device)
        hidden, weight, bias, changes = logits.parts()
        total = chunked_loss(hidden, weight, bias, targets, changes, ignore_index, weights=weights, watch=watch)
        return total / ((targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype).view(-1, vocab_size)
    targets = shift_labels.reshape(-1).to(logits.device)
    if watch is not None:
        places = (targets != ignore_index).nonzero().squeeze(1)
        with torch.no_grad():
            seen = F.cross_entropy(logits[places], targets[places], reduction="none")
        watch(places, seen if weights is None else seen * weights.reshape(-1)[places].to(seen))
    if weights is not None:
        terms = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
        total = (terms * weights.reshape(-1).to(terms)).sum()
        return total / ((targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def token_scores(logits: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return the scores of each token, where a model with scores for its loss picks those of one of them.

    Args:
        logits: shape (1, n, num_labels).

    Returns:
        Shape (1, n, num_labels), or (1, n) where there is one label.
    """
    return logits.squeeze(-1)


def _log_probs(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return what `chunked_log_probs` does, of logits of shape (batch, num_tokens, vocab_size), lazy or not."""
    targets = targets.reshape(-1).to(logits.device)
    if isinstance(logits := as_written(logits), LazyLogits):
        hidden, weight, bias, changes = logits.parts()
        return chunked_log_probs(hidden, weight, bias, targets, changes, ignore_index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    is_target = targets != ignore_index
    return watched_log_probs(logits, targets.where(is_target, 0)) * is_target
