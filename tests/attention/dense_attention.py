"""Attention by its definition on the whole pack at once: one dense matrix of scores, one process, fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """A layer and a pack.

    Args:
        lengths: tokens of each sample of the pack.
        heads: of queries, and of keys and values.
        value_dim: size of a value; queries and keys have `head_dim`.
        mutual: stretches whose tokens look at each other: sample, first token, end.
    """

    lengths: tuple[int, ...]
    heads: tuple[int, int]
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    head_dim: int = 8
    value_dim: int = 8
    scaling: float = 0.35
    dtype: torch.dtype = torch.float64
    causal: bool = True
    mutual: tuple[tuple[int, int, int], ...] = ()

    @property
    def stretches(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """The same by sample."""
        found: dict[int, tuple[tuple[int, int], ...]] = {}
        for sample, start, end in self.mutual:
            found[sample] = (*found.get(sample, ()), (start, end))
        return found

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v, the weights of the outputs in a loss, and sinks; the same in every process."""
        generator = torch.Generator().manual_seed(1000 * len(self.lengths) + self.heads[0])
        total, (heads, kv_heads) = sum(self.lengths), self.heads
        shapes = [
            (total, heads, self.head_dim),
            (total, kv_heads, self.head_dim),
            (total, kv_heads, self.value_dim),
            (total, heads, self.value_dim),
            (heads,),
        ]
        return [torch.randn(*shape, dtype=torch.float64, generator=generator).to(self.dtype) for shape in shapes]


def dense(case: Case) -> list[torch.Tensor]:
    """Output, and the gradients of q, k, v and the sinks, in fp64."""
    q, k, v, weights, sinks = (x.double().requires_grad_() for x in case.tensors())
    group = case.heads[0] // case.heads[1]
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, dim=1)) * case.scaling
    if case.softcap is not None:
        logits = case.softcap * (logits / case.softcap).tanh()
    logits = logits.masked_fill(~visible(case.lengths, case.window, case.causal, case.mutual), -torch.inf)
    if case.has_sinks:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1)], dim=2)
    shares = logits.softmax(dim=2)[..., : k.shape[0]]
    out = torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(group, dim=1))
    grads = torch.autograd.grad((out * weights).sum(), [q, k, v, sinks], allow_unused=True)
    return [out.detach(), *(torch.zeros_like(sinks) if g is None else g.detach() for g in grads)]


def visible(
    lengths: Sequence[int],
    window: int | None,
    causal: bool = True,
    mutual: Sequence[tuple[int, int, int]] = (),
) -> torch.Tensor:
    """Which key each query sees: of its sample, not after it if causal, within the window. Bool, (tokens, tokens).

    And those after it in its own stretch, as Gemma 3's masks have it: a window limits what is before a query.
    """
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    position = torch.arange(sum(lengths))
    distance = position[:, None] - position[None, :]
    seen = (sample[:, None] == sample[None, :]) & ((distance >= 0) | (not causal))
    for number, start, end in mutual:
        first = sum(lengths[:number])
        stretch = slice(first + start, first + end)
        seen[stretch, stretch] = True
    return seen if window is None else seen & (distance < window)
