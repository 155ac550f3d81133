"""This table has the methods by which attention crosses the ranks of a group, by the name that a plan gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from hf_hetero.attention.context import Place
from hf_hetero.attention.gather import gather
from hf_hetero.attention.kernels.contract import Scores
from hf_hetero.attention.ring import ring
from hf_hetero.attention.token_ring import token_ring
from hf_hetero.attention.ulysses import ulysses, ulysses_ring
from hf_hetero.errors import UnsupportedModel

Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores, Place], torch.Tensor]
"""(q, k, v, scores, place) -> out. q: (t, H, D); k: (t, Hk, D); v: (t, Hk, Dv); out: (t, H, Dv). Exact causal attention
in forward and backward, whatever the layout holds; by Ulysses also where tokens look at those after them."""

METHODS: Mapping[str, Method] = MappingProxyType(
    {"ulysses": ulysses, "gather": gather, "ring": ring, "ulysses_ring": ulysses_ring, "token_ring": token_ring}
)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, place: Place) -> torch.Tensor:
    """Compute attention by the method of the context. A group of one rank exchanges nothing, whatever its method.

    Args:
        q, k, v: shapes (t, H, D), (t, Hk, D) and (t, Hk, Dv).
        scores: scaling and features of this layer.
        place: the layer, and through its context the group, layout and kernel.

    Returns:
        Shape (t, H, Dv).

    Raises:
        CollectiveFailed: an exchange failed or waited longer than the group's timeout.
        UnsupportedModel: the kernel cannot do what the layer or the method needs.
    """
    context = place.context
    if not scores.causal and context.layout.degree > 1 and context.method != "ulysses":
        raise UnsupportedModel(
            f"Tokens look at those after them, for which only 'ulysses' is exact across ranks, not {context.method!r}. "
            "Have it among HeteroConfig.methods."
        )
    # without an exchange, `ulysses` is the kernel alone, which then need not tell its log-sum-exp
    method = ulysses if context.layout.degree == 1 else METHODS[context.method]
    return method(q, k, v, scores, place)
