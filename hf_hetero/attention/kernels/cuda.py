"""Attention on CUDA is torch's own varlen kernel, or any flash-attn that transformers finds by its name."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from hf_hetero.attention.kernels.contract import HALF, SINKS, SOFTCAP, WINDOW, Kernel, Scores, Segments


def _window(segments: Segments, scores: Scores) -> list[int]:
    """Spell a window as flash-attn does: keys to the left and right of a query, aligned at the last; -1 is all."""
    if not segments.causal:
        return [-1, -1]
    return [-1, 0] if scores.window is None else [scores.window - 1, 0]


def _varlen(direction: str = "") -> Any:
    """Return torch's operator: of forward, or "_backward"."""
    importlib.import_module("torch.nn.attention.varlen")  # registers the operators
    return getattr(torch.ops.torch_attn, f"_varlen_attn{direction}")


def _varlen_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    window = _window(segments, scores)
    # the operator behind `varlen_attn`, which tells causal from windows in this way: backward there differentiates what
    # forward gave, and a ring's must take the merged output and log-sum-exp
    out, lse, _ = _varlen().default(
        q,
        k,
        v,
        segments.cu_q,
        segments.cu_k,
        segments.max_q,
        segments.max_k,
        window == [-1, 0],
        scores.scaling,
        window,
        q.shape[1] != k.shape[1],
    )
    return out, lse.T


def _varlen_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: Segments,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    window = _window(segments, scores)
    return _varlen("_backward").default(
        grad_out,
        q,
        k,
        v,
        out,
        lse.T.contiguous(),
        segments.cu_q,
        segments.cu_k,
        segments.max_q,
        segments.max_k,
        window == [-1, 0],
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # of dropout, which there is none of
        scores.scaling,
        window,
    )


TORCH_VARLEN = Kernel("torch_varlen", "cuda", HALF, frozenset({WINDOW, SINKS}), _varlen_forward, _varlen_backward)
"""`torch.nn.attention.varlen`: in torch itself, so nothing to install."""


def through_transformers(implementation: str) -> Kernel:
    """Make a kernel of flash-attn by transformers' name for it ("flash_attention_2", "kernels-community/...", ...).

    Only its differentiable function is within reach there, not the log-sum-exp that a ring needs.
    """
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    (_, varlen, *_), (to_kwargs, _) = lazy_import_flash_attention(implementation)
    # versions differ in what they can do, and their keywords tell
    accepted = inspect.signature(varlen).parameters
    names = {WINDOW: {"window_size"}, SOFTCAP: {"softcap"}, SINKS: {"s_aux", "learnable_sink"}}
    features = frozenset(feature for feature, words in names.items() if words & accepted.keys())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores) -> torch.Tensor:
        options = to_kwargs(
            query_length=q.shape[0],
            key_length=k.shape[0],
            is_causal=segments.causal,
            softmax_scale=scores.scaling,
            sliding_window=scores.window,
            softcap=scores.softcap,
            s_aux=scores.sinks,
            max_seqlen_q=segments.max_q,
            max_seqlen_k=segments.max_k,
        )
        out = varlen(q, k, v, cu_seqlens_q=segments.cu_q, cu_seqlens_k=segments.cu_k, **options)
        return out[0] if isinstance(out, tuple) else out

    return Kernel(implementation, "cuda", HALF, features, attend=attend)
