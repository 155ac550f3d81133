"""Sums over the tokens of each sample of a pack, whichever ranks of its group hold them.

A loss of pairs needs the log-probability of a whole completion, and each rank has the terms of its own tokens. The
ranks of a group add up these few numbers, without a gradient. Then each takes its own sum in the place of its part of
the total, so that its gradient flows to its own tokens:

    total = sum of all ranks' parts                 a constant
    S     = part + (total - part)                   the value of the total, the gradient of the part

With a loss L(S), the same on all ranks of the group, the gradients of all ranks add up to L'(S) times those of all
parts, which is the gradient of L. No exchange is needed in backward.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist

from hf_hetero.attention.context import AttentionContext
from hf_hetero.ranks.naming import named
from hf_hetero.ranks.waits import noted

OPERATION = "Adding up log-probabilities"
EXACT = torch.float64
"""Log-probabilities of long completions are large, and what is learned is a small difference of them."""


def by_sample(context: AttentionContext, values: torch.Tensor) -> torch.Tensor:
    """Add up what this rank's tokens of each sample have. Differentiable.

    Args:
        context: of the micro-batch.
        values: one for each token of this rank, maybe with one more for a token that stands in; shape (..., n).

    Returns:
        Shape (..., num_samples), in fp64.
    """
    spans = context.layout.spans[context.group_rank]
    counts = torch.tensor([span.num_tokens for span in spans], dtype=torch.long)
    owners = torch.tensor([span.sample for span in spans], dtype=torch.long).repeat_interleave(counts)
    values = values[..., : context.num_tokens].to(EXACT)
    zeros = torch.zeros(*values.shape[:-1], len(context.layout.lengths), dtype=EXACT, device=values.device)
    return zeros.index_add(-1, owners.to(values.device), values)


def at_starts(context: AttentionContext, values: torch.Tensor) -> torch.Tensor:
    """Return what the first token of each sample has, where this rank holds it, else 0. Shape (num_samples,), in fp64.

    Args:
        context: of the micro-batch.
        values: one for each token of this rank, shape (n,).
    """
    spans = context.layout.spans[context.group_rank]
    places = accumulate((span.num_tokens for span in spans), initial=0)
    held = [(span.sample, place) for span, place in zip(spans, places, strict=False) if span.start == 0]
    samples, firsts = torch.tensor(held, dtype=torch.long, device=values.device).reshape(-1, 2).T
    found = torch.zeros(len(context.layout.lengths), dtype=EXACT, device=values.device)
    return found.index_copy(0, samples, values[firsts].to(EXACT))


def over_group(context: AttentionContext, parts: torch.Tensor) -> torch.Tensor:
    """Add up the parts of all ranks of the group; the result has each rank's own gradient.

    Args:
        context: of the micro-batch; all ranks of its group must call this.
        parts: of this rank; of one shape on all of them.

    Raises:
        CollectiveFailed: a rank of the group is missing.
    """
    total = parts.detach().clone()
    if context.peers.group is not None:
        where = context.where(0)
        with named(OPERATION, where), noted(context.waits, OPERATION, where):
            dist.all_reduce(total, group=context.peers.group)
    return parts + (total - parts.detach())


def counted_once(context: AttentionContext, loss: torch.Tensor) -> torch.Tensor:
    """Return a loss that all ranks of a group have alike, with its value spread over them, and its whole gradient."""
    return loss.detach() / context.layout.degree + (loss - loss.detach())
