"""Losses of classes and numbers are sums over the tokens that have a label, divided once by all labels of the step.

A sequence has its label at one token, whose logits are its own; so sequences and tokens have the same sum:

    loss = sum(term(logits[t], label[t]) for every labelled token t of every rank) / num_labels

The terms are those of transformers: cross-entropy of one class, the mean over classes of binary cross-entropies, the
mean over numbers of squared errors.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_hetero.model.chunked_loss import IGNORE_INDEX

REGRESSION, ONE_CLASS, MANY_CLASSES = "regression", "single_label_classification", "multi_label_classification"
"""What transformers calls the problems that a model with scores may have (`config.problem_type`)."""


def has_label(labels: torch.Tensor) -> torch.Tensor:
    """Tell which tokens have a label. Shape (1, num_tokens).

    Args:
        labels: shape (1, num_tokens), or (1, num_tokens, num_labels) where each has numbers, as they travel.
    """
    # bits of `IGNORE_INDEX` are no number in fp64, so that no label of numbers has them
    return (labels if labels.ndim == 2 else labels[..., 0]) != IGNORE_INDEX


def numbers_of(labels: torch.Tensor) -> torch.Tensor:
    """Return numbers in fp64, from their bits, as which they travel (`loss.carried_weights`)."""
    return labels.contiguous().view(torch.float64)


def problem_of(labels: torch.Tensor, num_labels: int) -> str:
    """Return which problem labels of this shape say that a model has, if its config does not say so."""
    if labels.ndim == 2:
        return ONE_CLASS
    return REGRESSION if num_labels == 1 else MANY_CLASSES


def class_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem: str, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Add up the losses of all labelled tokens, in at least fp32.

    Args:
        logits: shape (1, num_tokens, num_labels).
        labels: as for `has_label`.
        problem: of numbers: `REGRESSION` or `MANY_CLASSES`.
        weights: shape (1, num_tokens): a factor of each token's loss, as `carried_weights`; None: all are 1.

    Returns:
        A scalar, which all logits have an edge to, whether or not they have a label.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    if labels.ndim == 2:
        flat = logits.flatten(0, 1)
        terms = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view_as(labels)
    else:
        # what stands where there is no label is no number
        labelled = has_label(labels)
        numbers = torch.where(labelled[..., None], numbers_of(labels), 0).to(logits.dtype)
        of_each = (
            F.mse_loss(logits, numbers, reduction="none")
            if problem == REGRESSION
            else F.binary_cross_entropy_with_logits(logits, numbers, reduction="none")
        )
        terms = of_each.mean(-1) * labelled
    if weights is not None:
        terms = terms * numbers_of(weights).to(terms)
    return terms.sum()
