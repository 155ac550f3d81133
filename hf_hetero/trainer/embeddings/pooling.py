"""An embedding is a sum over the tokens of a text, whichever ranks hold them, and all of a step's lie on all ranks.

Each rank adds up what its own tokens contribute, of all texts of the step; one all-reduce then gives every rank every
embedding. So a text that is spread over a group, and texts of other groups and micro-batches, are all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hf_hetero.layout import Span
from hf_hetero.ranks.groups import limit_of
from hf_hetero.ranks.naming import named

POOLINGS = ("last", "mean", "first")
"""Of which tokens an embedding is the mean."""
OPERATION = "Adding up embeddings"


def pooled(
    hidden: torch.Tensor,
    spans: Sequence[Span],
    texts: Sequence[int],
    lengths: Sequence[int],
    pooling: str,
) -> torch.Tensor:
    """Add up what a rank's tokens contribute to embeddings. Differentiable.

    Args:
        hidden: last hidden states of this rank's tokens, maybe with one more that stands in; shape (1, n, width).
        spans: that the rank holds, in memory order.
        texts: for each sample of the pack, which text of the step it is.
        lengths: tokens of each text of the step.
        pooling: one of `POOLINGS`.

    Returns:
        Shape (num_texts, width), in at least fp32.
    """
    hidden = hidden[0].to(torch.promote_types(hidden.dtype, torch.float32))
    places: list[torch.Tensor] = []
    owners: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    first = 0
    for span in spans:
        text = texts[span.sample]
        positions = torch.arange(span.start, span.end)
        only = {"last": lengths[text] - 1, "first": 0}.get(pooling)
        chosen = positions if only is None else positions[positions == only]
        places.append(chosen - span.start + first)
        owners.append(torch.full_like(chosen, text))
        weights.append(torch.full(chosen.shape, 1.0 / lengths[text] if only is None else 1.0, dtype=torch.float64))
        first += span.num_tokens
    # so that a rank without a chosen token has a gradient, of zeros, too
    sums = 0 * hidden.sum() + hidden.new_zeros(len(lengths), hidden.shape[1])
    if not places:
        return sums
    rows, of, by = (torch.cat(parts).to(hidden.device) for parts in (places, owners, weights))
    return sums.index_add(0, of, hidden[rows] * by.to(hidden)[:, None])


def over_ranks(parts: torch.Tensor, group: dist.ProcessGroup | None, where: str) -> torch.Tensor:
    """Add up the parts of all ranks; the result has each rank's own gradient (`trainer.pairs.sums`).

    Args:
        parts: of this rank; of one shape on all of them.
        group: of all ranks; None: the default one, if there is any.
        where: the step, for messages.

    Raises:
        CollectiveFailed: a rank is missing.
    """
    total = parts.detach().clone()
    if dist.is_initialized():
        with named(OPERATION, where, limit_of(group)):
            dist.all_reduce(total, group=group)
    return parts + (total - parts.detach())
