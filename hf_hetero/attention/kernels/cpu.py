"""Attention on CPU is torch's flash attention, run by run: exact in fp64, grouped heads without copies.

Features that torch's operator lacks go to the plain kernel. The operator aligns causal runs at their first keys, not at
their last; it gives wrong sums for queries without keys and ends the process for runs without queries. So a run with
more keys than queries is split into the keys before its first query, and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_hetero.attention.kernels import plain
from hf_hetero.attention.kernels.contract import FLOATS, SINKS, SOFTCAP, WINDOW, Kernel, Scores, Segments, merge

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute output and log-sum-exp (`contract.Forward`)."""
    if scores.features:
        return plain.forward(q, k, v, segments, scores)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, blocks in _runs(segments):
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for keys, causal in blocks:
            block_out, block_lse = _forward(
                _heads_first(q[queries]),
                _heads_first(k[keys]),
                _heads_first(v[keys]),
                0.0,
                causal,
                scale=scores.scaling,
            )
            part = block_out[0].transpose(0, 1), block_lse[0].T
            merged = part if merged is None else merge(*merged, *part)
        assert merged is not None
        out[queries], lse[queries] = merged
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
    """Compute the gradients of queries, keys and values (`contract.Backward`)."""
    if scores.features:
        return plain.backward(grad_out, q, k, v, out, lse, segments, scores)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for queries, blocks in _runs(segments):
        run_lse = lse[queries].T.contiguous()[None]
        for number, (keys, causal) in enumerate(blocks):
            tensors = (grad_out[queries], q[queries], k[keys], v[keys], out[queries])
            block_grads = _backward(*map(_heads_first, tensors), run_lse, 0.0, causal, scale=scores.scaling)
            for grad, part, rows in zip(grads, block_grads, (queries, keys, keys), strict=True):
                part = part[0].transpose(0, 1)
                # a key is in one block, a query in all blocks of its run
                if number and grad is grads[0]:
                    grad[rows] += part
                else:
                    grad[rows] = part
    return grads[0], grads[1], grads[2]


CPU = Kernel("cpu", "cpu", FLOATS, frozenset({WINDOW, SOFTCAP, SINKS}), forward, backward)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Turn (Tq, H, D) into (1, H, Tq, D), as the operator wants it; likewise keys and values."""
    return x.transpose(0, 1).unsqueeze(0)


def _runs(segments: Segments) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """Yield the queries of each run, and its blocks of keys with whether they are causal."""
    q_start = k_start = 0
    for num_q, num_k in zip(segments.q_lengths, segments.k_lengths, strict=True):
        queries, k_end = slice(q_start, q_start + num_q), k_start + num_k
        before = k_end - num_q if segments.causal else k_end
        blocks = [(slice(k_start, before), False)] if before > k_start else []
        blocks += [(slice(before, k_end), True)] if segments.causal else []
        yield queries, blocks
        q_start, k_start = queries.stop, k_end
