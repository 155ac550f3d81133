"""Cross-entropy needs no whole logits: it goes chunk by chunk, gradients in forward, only where there is a target.

The logits of a micro-batch are often its largest tensor: 8192 tokens of a 128K vocabulary are 4 GiB in fp32, and a loss
over whole logits holds three of them. Here no more than a chunk of them is there at a time.

The idea of gradients in the forward pass is that of Cut Cross-Entropy (arXiv:2411.09009) and Liger (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

IGNORE_INDEX = -100
"""The label of a token without a target, as everywhere in torch and transformers."""
CHUNK_BYTES = 1 << 29
"""Logits of a chunk, in fp32. Adding to the head's gradient, once a chunk, should be little beside computing it."""

Change = Callable[[torch.Tensor], torch.Tensor]
"""Something a model does to its logits, element by element: scaling, a soft cap."""
Watch = Callable[[torch.Tensor, torch.Tensor], None]
"""Told which targets were computed, and their terms of the loss, each of shape (n,), without gradients."""


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    changes: tuple[Change, ...] = (),
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int = CHUNK_BYTES,
    weights: torch.Tensor | None = None,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Sum the cross-entropies of a linear head's logits, to a scalar in at least fp32. Differentiable once.

    Args:
        hidden: what the head is given; in any shape (..., hidden).
        weight: of the head; shape (vocab_size, hidden).
        bias: of the head; shape (vocab_size,).
        targets: as many as hidden states, in their order; `ignore_index` where there is none.
        changes: made to the logits in this order before the softmax; each element by itself.
        ignore_index: the label of a token without a target.
        chunk_bytes: most bytes of a chunk's logits in fp32.
        weights: factors of the terms, as many as targets; None: all are 1.
        watch: told the terms of each chunk.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    of_terms = None if weights is None else weights.reshape(-1).to(hidden.device)
    loss: Any = _ChunkedLoss.apply(
        rows, weight, bias, targets.reshape(-1), of_terms, changes, ignore_index, chunk_bytes, watch
    )
    return loss


def chunked_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    changes: tuple[Change, ...] = (),
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Return the log-probability of each target, and what is watched beside it; no chunk's logits outlive the chunk.

    A loss of log-probabilities that is no sum of them gives each target another gradient, which is not known before
    backward; so backward computes the logits of each chunk again.

    Args:
        hidden, weight, bias, targets, changes, ignore_index, chunk_bytes: as for `chunked_loss`.

    Returns:
        Shape (4, num_tokens), in at least fp32; zeros where there is no target. Row 0 has log-probabilities, and is
        differentiable once. The others are for logs: entropy, mean of the logits, and 1 where the target is the most
        probable token.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    found: Any = _ChunkedLogProbs.apply(rows, weight, bias, targets.reshape(-1), changes, ignore_index, chunk_bytes)
    return found


def watched_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return what `chunked_log_probs` does, of logits of shape (n, vocab_size) with n targets. Shape (4, n)."""
    log_softmax = F.log_softmax(logits, dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    log_probs = log_softmax.gather(1, targets.unsqueeze(1)).squeeze(1)
    is_top1 = (logits.argmax(-1) == targets).to(logits.dtype)
    return torch.stack([log_probs, entropy.detach(), logits.detach().mean(-1), is_top1])


class _ChunkedLogProbs(torch.autograd.Function):
    """`_ChunkedLogProbs` computes the logits of each chunk in forward, and in backward once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        changes: tuple[Change, ...],
        ignore_index: int,
        chunk_bytes: int,
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        positions = (targets != ignore_index).nonzero().squeeze(1)  # waits for the device, once a micro-batch
        chunks = positions.split(max(1, chunk_bytes // (4 * weight.shape[0])))
        found = torch.zeros(4, len(targets), dtype=exact, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for chunk in chunks:
                logits = F.linear(hidden[chunk].to(dtype), w, b)
                for change in changes:
                    logits = change(logits)
                found[:, chunk] = watched_log_probs(logits.to(exact), targets[chunk])
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.numerics = dtype, exact, changes, chunks
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets = ctx.saved_tensors
        dtype, exact, changes, chunks = ctx.numerics
        of_log_probs = grad_outputs[0][0]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=exact) if needs_bias and bias is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for chunk in chunks:
                h = hidden[chunk].to(dtype)
                # a log-probability is a cross-entropy of weight -1
                scale = -of_log_probs[chunk].to(exact)
                _, gradient = _chunk(F.linear(h, w, b), targets[chunk], scale, changes, exact)
                if of_hidden is not None:
                    of_hidden[chunk] = (gradient @ w).to(hidden.dtype)
                if of_weight is not None:
                    of_weight += gradient.T @ h
                if of_bias is not None:
                    of_bias += gradient.sum(0, dtype=exact)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        of_bias = None if of_bias is None or bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight, of_bias, None, None, None, None


class _ChunkedLoss(torch.autograd.Function):
    """`_ChunkedLoss` makes the loss and, beside it, its gradients for a gradient of 1, which backward scales.

    The loss enters a model's objective by one number only, so its gradients are known up to that factor before backward
    begins; made while a chunk's logits are there, they never need the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        changes: tuple[Change, ...],
        ignore_index: int,
        chunk_bytes: int,
        watch: Watch | None,
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        positions = (targets != ignore_index).nonzero().squeeze(1)  # waits for the device, once a micro-batch
        # the weight is cast once here, where autocast would cast it for every chunk
        with torch.autocast(kind, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            total = torch.zeros((), dtype=exact, device=hidden.device)
            of_hidden = torch.zeros_like(hidden) if needs_hidden else None
            # one chunk is added to another in fp32: in bf16 a long sum would lose what a single product keeps
            of_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
            of_bias = torch.zeros_like(bias, dtype=exact) if needs_bias and bias is not None else None
            for chunk in positions.split(max(1, chunk_bytes // (4 * weight.shape[0]))):
                h = hidden[chunk].to(dtype)
                of_chunk = None if weights is None else weights[chunk].to(exact)
                terms, gradient = _chunk(F.linear(h, w, b), targets[chunk], of_chunk, changes, exact)
                total += terms.sum()
                if watch is not None:
                    watch(chunk, terms)
                if of_hidden is not None:
                    of_hidden[chunk] = (gradient @ w).to(hidden.dtype)
                if of_weight is not None:
                    of_weight += gradient.T @ h
                if of_bias is not None:
                    of_bias += gradient.sum(0, dtype=exact)
        ctx.gradients = ((of_hidden, hidden.dtype), (of_weight, weight.dtype), (of_bias, weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        [scale] = grad_outputs
        # scaled in the loss's type, then rounded; let go of, because the graph may live longer than they are needed
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.to(scale.dtype).mul_(scale).to(dtype) for g, dtype in gradients)
        return (*scaled, None, None, None, None, None, None)


def _chunk(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    changes: tuple[Change, ...],
    exact: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the terms of a chunk's loss, shape (n,), and the gradient of their sum by the logits of the head."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_(bool(changes))
        changed = leaf
        for change in changes:
            changed = change(changed)
    log_softmax = F.log_softmax(changed.detach().to(exact), dim=-1)
    at_targets = targets.unsqueeze(1)
    terms = -log_softmax.gather(1, at_targets).squeeze(1)
    terms = terms if weights is None else terms * weights
    # of cross-entropy by its logits: softmax, less 1 at the target; in place, for a chunk is large
    gradient = log_softmax.exp_().scatter_add_(1, at_targets, -torch.ones_like(at_targets, dtype=exact))
    if weights is not None:
        gradient *= weights.unsqueeze(1)
    gradient = gradient.to(changed.dtype)
    if changes:
        [gradient] = torch.autograd.grad(changed, leaf, gradient)
    return terms, gradient
