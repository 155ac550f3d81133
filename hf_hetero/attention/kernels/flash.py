"""This file makes pairs of flash-attn's own kernels, which give and take a log-sum-exp: of versions 2, 3 and 4.

Transformers reaches their differentiable functions only, and a ring needs the pair behind them. Signatures were read
in the sources of August 2026 (Dao-AILab/flash-attention, 0251105a); a version with others is left to transformers.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch.nn import functional as F

from hf_hetero.attention.kernels.contract import HALF, SINKS, SOFTCAP, WINDOW, Kernel, Scores, Segments

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]
MULTIPLE = 8  # elements of a head that the kernels want; shorter heads are filled up with zeros
OLDEST_FA2 = Version("2.7")  # from then on the log-sum-exp of packed samples is (H, Tq)
FEATURES = frozenset({WINDOW, SOFTCAP, SINKS})


def flash_kernels(capability: tuple[int, int] | None = None) -> list[Kernel]:
    """Return the pairs that are installed and run on this GPU, fastest first.

    Args:
        capability: of the GPU, as torch says it; None: ask. Without a GPU there are none.
    """
    if capability is None:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    major = capability[0]
    makers = {9: (fa3, fa4, fa2), 8: (fa2,)}.get(major, (fa4, fa2) if major > 9 else ())
    kernels = [make() for make in makers]
    # FA4 differentiates no softcap on consumer Blackwell
    return [_without_softcap(k) if k.name == "fa4" and major == 12 else k for k in kernels if k is not None]


def named_flash_kernel(implementation: str) -> Kernel | None:
    """Return the pair behind transformers' name for it; None if it is not installed, or no name of these three."""
    makers = {"flash_attention_2": fa2, "flash_attention_3": fa3, "flash_attention_4": fa4}
    return makers[implementation]() if implementation in makers else None


def fa2() -> Kernel | None:
    """Return the pair of flash-attn 2.7 or later, for Ampere and later; None where it is not installed."""
    library = _library("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    if library is None:  # also where only FA4 is installed, which shares the package's name
        return None
    version = getattr(importlib.import_module("flash_attn"), "__version__", "0")
    try:
        is_old = Version(version) < OLDEST_FA2
    except InvalidVersion:
        is_old = True
    if is_old:
        logger.warning("flash-attn %s is too old for rings; install %s or later.", version, OLDEST_FA2)
        return None

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores) -> Tensors:
        out, lse, *_ = library["_flash_attn_varlen_forward"](
            q, k, v, *_runs(segments), dropout_p=0.0, **_common(segments, scores, "causal", endless=-1)
        )
        return out, lse

    def backward(
        grad_out: torch.Tensor, saved: Tensors, grads: Tensors, segments: Segments, scores: Scores
    ) -> Tensors | None:
        library["_flash_attn_varlen_backward"](
            grad_out,
            *saved,
            *grads,
            *_runs(segments),
            dropout_p=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_common(segments, scores, "causal", endless=-1),
        )
        return None

    return _kernel("fa2", forward, backward)


def fa3() -> Kernel | None:
    """Return the pair of flash-attn 3, for Hopper; None where it is not installed."""
    library = _library("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward")
    if library is None:
        return None
    if not _accepts(library["_flash_attn_forward"], "window_size_left"):
        logger.warning("This flash-attn 3 is too old for rings; install one of 2026.")
        return None

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores) -> Tensors:
        out, lse, *_ = library["_flash_attn_forward"](
            q, k, v, **_named_runs(segments), **_common(segments, scores, "causal", endless=-1)
        )
        return out, lse

    def backward(
        grad_out: torch.Tensor, saved: Tensors, grads: Tensors, segments: Segments, scores: Scores
    ) -> Tensors | None:
        library["_flash_attn_backward"](
            grad_out,
            *saved,
            **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
            **_named_runs(segments),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_common(segments, scores, "is_causal", endless=-1),
        )
        return None

    return _kernel("fa3", forward, backward)


def fa4() -> Kernel | None:
    """Return the pair of flash-attn 4 (`flash_attn.cute`), for Hopper and Blackwell; None where it is not installed."""
    library = _library("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd")
    if library is None:
        return None
    if not _accepts(library["_flash_attn_bwd"], "softcap"):
        logger.warning("This flash-attn 4 is too old; install one of 2026.")
        return None

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores) -> Tensors:
        options = _common(segments, scores, "causal", endless=None)
        out, lse, *_ = library["_flash_attn_fwd"](q, k, v, **_named_runs(segments), **options, return_lse=True)
        return out, lse

    def backward(
        grad_out: torch.Tensor, saved: Tensors, grads: Tensors, segments: Segments, scores: Scores
    ) -> Tensors | None:
        q, k, v, out, lse = saved
        results = library["_flash_attn_bwd"](
            q,
            k,
            v,
            out,
            grad_out,
            lse,
            **_named_runs(segments),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_common(segments, scores, "causal", endless=None),
        )
        return tuple(results[:3])

    return _kernel("fa4", forward, backward)


def _kernel(name: str, forward: Callable[..., Tensors], backward: Callable[..., Tensors | None]) -> Kernel:
    """Make a record whose pair fills up short heads, and turns the log-sum-exp round.

    Args:
        name: for the log.
        forward: (q, k, v, segments, scores) -> out, lse of shape (H, Tq).
        backward: (grad_out, (q, k, v, out, lse), (dq, dk, dv) to write to, segments, scores) -> the gradients, or None
            if it wrote them.
    """

    def pair_forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward(*map(_filled, (q, k, v)), segments, scores)
        return out[..., : v.shape[-1]], lse.T

    def pair_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        saved = (*map(_filled, (q, k, v, out)), lse.T.contiguous())
        grads = tuple(torch.empty_like(x) for x in saved[:3])
        written = backward(_filled(grad_out), saved, grads, segments, scores) or grads
        dq, dk, dv = (x[..., : like.shape[-1]] for x, like in zip(written, (q, k, v), strict=True))
        return dq, dk, dv

    return Kernel(name, "cuda", HALF, FEATURES, pair_forward, pair_backward)


def _filled(x: torch.Tensor) -> torch.Tensor:
    """Fill up a tensor's heads with zeros, which add nothing to q @ k, and to the output only zeros to cut off."""
    missing = -x.shape[-1] % MULTIPLE
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _runs(segments: Segments) -> tuple[Any, ...]:
    return segments.cu_q, segments.cu_k, segments.max_q, segments.max_k


def _named_runs(segments: Segments) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, _runs(segments), strict=True))


def _common(segments: Segments, scores: Scores, causal: str, endless: int | None) -> dict[str, Any]:
    """Return the keywords of all versions; `endless` is how a version spells a window without an end."""
    has_window = segments.causal and scores.window is not None
    return {
        "softmax_scale": scores.scaling,
        "softcap": scores.softcap or 0.0,
        causal: segments.causal,
        "window_size_left": scores.window - 1 if has_window and scores.window is not None else endless,
        "window_size_right": 0 if has_window else endless,
    }


def _library(module: str, *names: str) -> dict[str, Any] | None:
    """Return functions of a module; None if it, or one of them, is not there."""
    try:
        library = importlib.import_module(module)
    except (ImportError, OSError):  # OSError: built for another CUDA
        return None
    functions = {name: getattr(library, name, None) for name in names}
    return None if None in functions.values() else functions


def _accepts(function: Any, keyword: str) -> bool:
    """Return whether a function, or an operator of torch.library, has a keyword."""
    overload = getattr(function, "_opoverload", None)
    if overload is not None:
        return any(argument.name == keyword for argument in overload._schema.arguments)
    return keyword in inspect.signature(function).parameters


def _without_softcap(kernel: Kernel) -> Kernel:
    return Kernel(kernel.name, "cuda", HALF, FEATURES - {SOFTCAP}, kernel.forward, kernel.backward)
