"""Kernels for CUDA are called as their libraries want it; what they compute is tested on a GPU (tests/gpu)."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import modeling_flash_attention_utils as lookup

from hf_hetero.attention.kernels.contract import SOFTCAP, WINDOW, Scores, Segments
from hf_hetero.attention.kernels.cuda import through_transformers
from hf_hetero.attention.kernels.plain import PLAIN


def test_flash_attn_through_transformers_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed flash-attn is found by transformers' name and called with its keywords; a stand-in for FA3."""
    calls: list[dict[str, object]] = []

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, None]:
        calls.append({"scale": softmax_scale, "causal": causal, "window": window_size, "max": max_seqlen_q})
        lengths = cu_seqlens_q.diff().tolist()
        window = None if window_size == (-1, -1) else window_size[0] + 1
        return PLAIN(
            q, k, v, Segments.packed(lengths, q.device), Scores(softmax_scale or 1.0, window, softcap or None)
        ), None

    module = ModuleType("flash_attn_interface")
    module.__dict__.update(
        flash_attn_func=flash_attn_varlen_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_varlen_func,
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(lookup, "_loaded_implementation", None)
    kernel = through_transformers("flash_attention_3")
    assert (kernel.name, kernel.features) == ("flash_attention_3", {WINDOW, SOFTCAP})
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    scores = Scores(0.3, window=4, softcap=2.0)
    segments = Segments.packed([5, 7], q.device)
    found = kernel(q, k, v, segments, scores)
    assert torch.allclose(found, PLAIN(q, k, v, segments, scores))
    assert calls == [{"scale": 0.3, "causal": True, "window": (3, 3), "max": 7}]
    assert not kernel.has_lse  # nothing for a ring
    monkeypatch.setattr(lookup, "_loaded_implementation", None)
