"""Attention on CUDA is torch's own varlen kernel, or any flash-attn that transformers finds by its name.

torch's kernel is called beneath `torch.nn.attention.varlen`, whose own operators are private and change with versions:
at the two operators of aten that all versions of it call. They take fewer heads of keys than of queries as they are,
in forward and backward. `tests/attention/kernels/test_cuda.py` has their schemas of torch 2.11 to 2.15.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from hf_hetero.attention.kernels.contract import HALF, SINKS, SOFTCAP, WINDOW, Kernel, Scores, Segments
from hf_hetero.attention.kernels.pair import Calls, Offer, Tensors, pair, window_of
from hf_hetero.attention.kernels.signatures import schema_of
from hf_hetero.errors import UnsupportedModel

TESTED = "2.11 to 2.15"
RESULTS = ("output", "softmax_logsumexp")
HUB_REMEDY = (
    "`pip install 'hf-hetero[kernels]'`, and once a machine with a network, whose cache of the hub later runs read"
)


def _forward_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
) -> dict[str, Any]:
    return {"query": q, "key": k, "value": v, "return_debug_mask": False, **_common(segments, scores)}


def _backward_call(
    grad_out: torch.Tensor, saved: Tensors, _: Tensors, segments: Segments, scores: Scores
) -> dict[str, Any]:
    names = ("query", "key", "value", "out", "logsumexp")
    device = grad_out.device
    return {
        "grad_out": grad_out,
        **dict(zip(names, saved, strict=True)),
        "rng_state": torch.zeros(2, dtype=torch.uint64, device=device),  # of dropout, which there is none of
        "unused": torch.empty(0, device=device),
        **_common(segments, scores),
    }


def _common(segments: Segments, scores: Scores) -> dict[str, Any]:
    window = window_of(segments, scores)
    left, right = window or ((-1, 0) if segments.causal else (-1, -1))
    return {
        "cum_seq_q": segments.cu_q,
        "cum_seq_k": segments.cu_k,
        "max_q": segments.max_q,
        "max_k": segments.max_k,
        "dropout_p": 0.0,
        "is_causal": segments.causal and window is None,  # as `varlen_attn` tells causal from windows
        "scale": scores.scaling,
        "window_size_left": left,
        "window_size_right": right,
    }


CALLS = Calls(_forward_call, _backward_call, returns_gradients=True)


def operators() -> tuple[Any, Any]:
    """Return torch's operators, forward and backward; None for one that this torch does not have."""
    names = ("_flash_attention_forward", "_flash_attention_backward")
    forward, backward = (getattr(getattr(torch.ops.aten, name, None), "default", None) for name in names)
    return forward, backward


TORCH_VARLEN = pair("torch_varlen", frozenset({WINDOW, SINKS}), CALLS, *operators())
"""In torch itself, so nothing to install. `torch_varlen` offers it only where its operators take the call."""


def torch_varlen() -> Offer:
    """Return torch's own kernel; or why this torch's operators cannot be called."""
    return refusal(*operators()) or TORCH_VARLEN


def refusal(forward: Any, backward: Any) -> str | None:
    """Return in words why torch's operators are not those that are known here; None if they are."""
    if forward is None or backward is None:
        reason = "it has no aten::_flash_attention_forward and _backward"
    else:
        reason = CALLS.misfit(forward, backward)
        results = tuple(result.name for result in schema_of(forward).returns[:2])
        if reason is None and results != RESULTS:
            reason = f"its forward's first results are {results} and not {RESULTS}"
    if reason is None:
        return None
    return f"torch {torch.__version__} is installed, and {reason}; torch {TESTED} is wanted, or a flash-attn"


def through_transformers(implementation: str) -> Kernel:
    """Make a kernel of flash-attn by transformers' name for it ("flash_attention_2", "kernels-community/...", ...).

    Only its differentiable function is within reach there, not the log-sum-exp that a ring needs.

    Raises:
        UnsupportedModel: transformers cannot load it, as one of the hub without a network.
    """
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    try:
        (_, varlen, *_), (to_kwargs, _) = lazy_import_flash_attention(implementation)
    except (ImportError, OSError, ValueError) as error:
        raise UnsupportedModel(
            f"attn_implementation={implementation!r} cannot be loaded: {error}. Install what it names; for one of the "
            f"hub: {HUB_REMEDY}. Or leave it out: torch has a kernel of its own."
        ) from error
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
