"""Stand-ins for flash-attn's functions, with the signatures of the real ones (of August 2026), by the definition.

They refuse what none of the real ones would take.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_hetero.attention.kernels.contract import Kernel, Scores, Segments
from hf_hetero.attention.kernels.plain import PLAIN

assert PLAIN.forward is not None
assert PLAIN.backward is not None


def call_of(cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, scale: Any, causal: bool, window: Any, softcap: float) -> Any:
    """What flash-attn's arguments mean, in ours; and what none of its versions would take."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    q_lengths, k_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max_q, max_k) == (max(q_lengths), max(k_lengths))
    left, right = window
    no_end = left in (None, -1)
    assert right in ((None, -1) if no_end else (0,))
    segments = Segments.of(q_lengths, k_lengths, cu_q.device, causal)
    return segments, Scores(scale, None if no_end else left + 1, softcap or None)


def check_heads(*tensors: torch.Tensor) -> None:
    assert all(x.shape[-1] % 8 == 0 and x.is_contiguous() for x in tensors)


def forward(q: Any, k: Any, v: Any, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_heads(q, k, v)
    out, lse = PLAIN.forward(q, k, v, *call_of(*call))  # type: ignore[misc]
    return out, lse.T.contiguous()


def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *call: Any) -> Any:
    check_heads(dout, q, k, v, out)
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    return PLAIN.backward(dout, q, k, v, out, lse.T, *call_of(*call))  # type: ignore[misc]


def fa2_forward(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
    block_table: Any = None,
    leftpad_k: Any = None,
    seqused_k: Any = None,
    zero_tensors: bool = False,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*forward(q, k, v, *call), None, None)


def fa2_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    deterministic: bool,
    rng_state: Any = None,
    zero_tensors: bool = False,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    for into, found in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *call), strict=True):
        into.copy_(found)


def fa3_forward(
    q: Any,
    k: Any,
    v: Any,
    k_new: Any = None,
    v_new: Any = None,
    qv: Any = None,
    out_: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    cu_seqlens_k_new: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*forward(q, k, v, *call), None, None)


def fa3_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    sequed_q: Any = None,
    sequed_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    softmax_scale: Any = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window, softcap)
    for into, found in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *call), strict=True):
        into.copy_(found)


def fa4_forward(
    q: Any,
    k: Any,
    v: Any,
    qv: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    min_seqlen_k: Any = None,
    page_table: Any = None,
    softmax_scale: Any = None,
    causal: bool = False,
    softcap: Any = None,
    window_size_left: Any = None,
    window_size_right: Any = None,
    learnable_sink: Any = None,
    return_lse: bool = False,
) -> Any:
    assert return_lse
    assert -1 not in (window_size_left, window_size_right)  # there, -1 is a window
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*forward(q, k, v, *call), None, None)


def fa4_backward(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    dout: Any,
    lse: Any,
    softmax_scale: Any = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: Any = None,
    window_size_right: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    deterministic: bool = False,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*backward(dout, q, k, v, out, lse, *call), None)


RUNS = {
    "whole samples": ((3, 1, 9), (3, 1, 9), True),
    "more keys than queries": ((3, 2), (5, 9), True),
    "every query sees every key": ((3, 2), (5, 9), False),
}


def results(kernel: Kernel, runs: str, scores: Scores, head_dim: int) -> list[torch.Tensor]:
    """Output and log-sum-exp, and gradients against an output and a log-sum-exp merged over more keys than these."""
    q_lengths, k_lengths, causal = RUNS[runs]
    segments = Segments.of(q_lengths, k_lengths, torch.device("cpu"), causal)
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(q_lengths), 4), (sum(k_lengths), 2), (sum(k_lengths), 2), (sum(q_lengths), 4))
    q, k, v, grad = (torch.randn(n, h, head_dim, generator=generator, dtype=torch.float64) for n, h in shapes)
    assert kernel.forward is not None
    assert kernel.backward is not None
    out, lse = kernel.forward(q, k, v, segments, scores)
    return [out, lse, *kernel.backward(grad, q, k, v, 0.7 * out, lse + 0.3, segments, scores)]
