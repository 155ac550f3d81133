"""The plain kernel is attention by its definition, block by block: the reference, and the fallback, for everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hf_hetero.attention.kernels.contract import FLOATS, SINKS, SOFTCAP, WINDOW, Kernel, Scores, Segments

BLOCK_QUERIES = 256  # a block's scores are kept, never those of a whole sample


@dataclass(frozen=True, slots=True)
class _Block:
    """A block is queries `q` and the keys `k` that any of them sees; `hidden` where one does not, if there are such."""

    q: slice
    k: slice
    hidden: torch.Tensor | None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute output and log-sum-exp (`contract.Forward`), in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=wide)
    for block in _blocks(segments, scores.window, q.device):
        logits, _ = _logits(q, k, block, scores, wide)
        block_lse = logits.logsumexp(-1)
        weights = (logits - block_lse[..., None]).exp()
        out[block.q] = torch.einsum("hgqk,khd->qhgd", weights, v[block.k].to(wide)).flatten(1, 2).to(out.dtype)
        lse[block.q] = block_lse.flatten(0, 1).T
    return out, lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: Segments,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of queries, keys and values (`contract.Backward`), summed in fp32 or wider."""
    wide = lse.dtype
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    shift = (grad_out.to(wide) * out.to(wide)).sum(-1)  # grad_out . out, by which other keys enter (`contract`)
    for block in _blocks(segments, scores.window, q.device):
        logits, slope = _logits(q, k, block, scores, wide)
        block_lse, block_shift = (x[block.q].T.unflatten(0, groups)[..., None] for x in (lse, shift))
        weights = (logits - block_lse).exp()
        grad = grad_out[block.q].to(wide).unflatten(1, groups)
        grad_v[block.k] += torch.einsum("hgqk,qhgd->khd", weights, grad)
        grad_logits = weights * (torch.einsum("qhgd,khd->hgqk", grad, v[block.k].to(wide)) - block_shift)
        grad_logits = scores.scaling * (grad_logits if slope is None else grad_logits * slope)
        grad_q[block.q] += torch.einsum("hgqk,khd->qhgd", grad_logits, k[block.k].to(wide)).flatten(1, 2)
        grad_k[block.k] += torch.einsum("hgqk,qhgd->khd", grad_logits, q[block.q].to(wide).unflatten(1, groups))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


PLAIN = Kernel("plain", None, FLOATS, frozenset({WINDOW, SOFTCAP, SINKS}), forward, backward, unequal_values=True)


def _blocks(segments: Segments, window: int | None, device: torch.device) -> Iterator[_Block]:
    """Yield the blocks of all runs; keys after a block's queries, or before all of their windows, are left out."""
    first_q = first_k = 0
    for num_q, num_k in zip(segments.q_lengths, segments.k_lengths, strict=True):
        for start in range(0, num_q, BLOCK_QUERIES):
            end = min(start + BLOCK_QUERIES, num_q)
            low, high, hidden = 0, num_k, None
            if segments.causal:
                last_seen = torch.arange(start, end, device=device)[:, None] + (num_k - num_q)
                high = end + num_k - num_q
                low = 0 if window is None else max(0, start + num_k - num_q - window + 1)
                key = torch.arange(low, high, device=device)
                hidden = key > last_seen if window is None else (key > last_seen) | (key <= last_seen - window)
            yield _Block(slice(first_q + start, first_q + end), slice(first_k + low, first_k + high), hidden)
        first_q, first_k = first_q + num_q, first_k + num_k


def _logits(
    q: torch.Tensor, k: torch.Tensor, block: _Block, scores: Scores, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scores of a block, shape (Hk, H / Hk, Tq, Tk), and the softcap's slope there, None for 1."""
    queries = q[block.q].to(dtype).unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    logits = torch.einsum("qhgd,khd->hgqk", queries, k[block.k].to(dtype)) * scores.scaling
    slope = None
    if scores.softcap is not None:
        capped = torch.tanh(logits / scores.softcap)
        logits, slope = scores.softcap * capped, 1 - capped * capped
    if block.hidden is not None:
        logits = logits.masked_fill(block.hidden, float("-inf"))
    return logits, slope


def weigh(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Compute differentiable softmax attention with any mask, for passes without a plan.

    Args:
        q, k, v: shapes (..., Tq, H, D), (..., Tk, H, D) and (..., Tk, H, Dv).
        hidden: True where a query must not see a key; broadcasts to (..., H, Tq, Tk).
    """
    logits = torch.einsum("...qhd,...khd->...hqk", q, k) * scores.scaling
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    # not -inf: a query that sees no key, as in padding, would get nan instead of some mean, and so would its gradient
    logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    if scores.sinks is not None:
        sinks = scores.sinks.to(logits.dtype).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    # half types lose digits in a long softmax; wider ones stay as they are
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("...hqk,...khd->...qhd", weights[..., : k.shape[-3]], v)
