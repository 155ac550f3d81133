"""A text is to be nearer to its own than to those of all other rows: cross-entropy of similarities within a step.

Each row has an anchor, what is to be near it, and maybe texts that are not. All but the anchors are candidates: for an
anchor, those of other rows are negatives, too (arXiv:1705.00652, section 4.4; InfoNCE, arXiv:1807.03748). Its value
depends on which rows are compared, so these must not depend on the plan: they are all of the step.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def ranking_loss(embeddings: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the mean over anchors of the cross-entropy of their own text among all candidates.

    Args:
        embeddings: shape (num_rows, num_columns, width): anchor, positive, negatives.
        scale: factor of the cosine similarities; the inverse of a temperature.
    """
    anchors, *others = F.normalize(embeddings, dim=-1).unbind(1)
    scores = scale * anchors @ torch.cat(others).T
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
