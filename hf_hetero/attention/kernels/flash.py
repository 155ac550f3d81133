"""This file makes pairs of flash-attn's own kernels, which give and take a log-sum-exp: of versions 2, 3 and 4.

Transformers reaches their differentiable functions only, and a ring needs the pair behind them. Signatures were read
in the sources of August 2026: Dao-AILab/flash-attention at 0251105a, and huggingface/kernels-community at 40d4194f,
whose wheels on the hub have the same functions. A version with others is passed over, in words.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from hf_hetero.attention.kernels.contract import SINKS, SOFTCAP, WINDOW, Kernel, Scores, Segments
from hf_hetero.attention.kernels.pair import Calls, Offer, Tensors, pair, window_of

FEATURES = frozenset({WINDOW, SOFTCAP, SINKS})


@dataclass(frozen=True, slots=True)
class Flash:
    """A `Flash` is a version of flash-attn: where its two functions are, and how they are called.

    Args:
        name: of the kernel.
        distribution: what is installed.
        module, inner: where the functions are; and inside of a module from the hub.
        forward, backward: their names.
        calls: how they are called.
        wanted: for the error; of what is wanted.
        oldest: the oldest version whose results are known; None where the call alone tells.
    """

    name: str
    distribution: str
    module: str
    inner: str
    forward: str
    backward: str
    calls: Calls
    wanted: str
    oldest: Version | None = None

    def installed(self) -> Offer | None:
        """Return the pair of what is installed, or why it is not one; None if nothing is."""
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # of whatever kind: built for another torch or CUDA, or a part is missing
            if isinstance(error, ModuleNotFoundError) and error.name and self.module.startswith(error.name):
                return None
            return self._refusal(f"{self.distribution} {self._version_found()}", f"it cannot be imported ({error})")
        found = self._version_found()
        if self.oldest is not None and _parsed(found) < self.oldest:
            return self._refusal(f"{self.distribution} {found}", "it is too old for rings")
        return self.of(module, f"{self.distribution} {found}")

    def of(self, module: Any, what: str) -> Offer | None:
        """Return the pair of a module's functions, or why they are not one; None if it has no such functions.

        Args:
            module: has the functions, or their module.
            what: the module is, in words.
        """
        inner = getattr(module, self.inner, module)
        forward, backward = (getattr(inner, name, None) for name in (self.forward, self.backward))
        if forward is None or backward is None:
            return None
        reason = self.calls.misfit(forward, backward)
        if reason is not None:
            return self._refusal(what, reason)
        return pair(self.name, FEATURES, self.calls, forward, backward)

    def _refusal(self, what: str, reason: str) -> str:
        return f"{what} is passed over: {reason}; {self.wanted} is wanted"

    def _version_found(self) -> str:
        # FA4 has a package of the same name, in which only FA2's own file says a version
        said = getattr(sys.modules.get("flash_attn"), "__version__", None) if self.name == "fa2" else None
        try:
            return str(said or version_of(self.distribution))
        except PackageNotFoundError:
            return "of no version"


def flash_kernels(capability: tuple[int, int] | None = None) -> list[Offer]:
    """Return the pairs that are installed and run on this GPU, fastest first, and why others are not among them.

    Args:
        capability: of the GPU, as torch says it; None: ask. Without a GPU there are none.
    """
    if capability is None:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    major = capability[0]
    versions = {9: (FA3, FA4, FA2), 8: (FA2,)}.get(major, (FA4, FA2) if major > 9 else ())
    offers = [offer for offer in (flash.installed() for flash in versions) if offer is not None]
    # FA4 differentiates no softcap on consumer Blackwell
    return [_without_softcap(x) if isinstance(x, Kernel) and x.name == "fa4" and major == 12 else x for x in offers]


def named_flash_kernel(implementation: str) -> Offer | None:
    """Return the pair behind transformers' name for it, or why it is none; None if not installed, or no such name."""
    flash = {"flash_attention_2": FA2, "flash_attention_3": FA3, "flash_attention_4": FA4}.get(implementation)
    return None if flash is None else flash.installed()


def _fa2_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
) -> dict[str, Any]:
    return {"q": q, "k": k, "v": v, "dropout_p": 0.0, **_common(segments, scores, "causal", endless=-1)}


def _fa2_backward(
    grad_out: torch.Tensor, saved: Tensors, grads: Tensors, segments: Segments, scores: Scores
) -> dict[str, Any]:
    return {
        **_saved("softmax_lse", grad_out, saved),
        **_written(grads),
        "dropout_p": 0.0,
        "alibi_slopes": None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **_common(segments, scores, "causal", endless=-1),
    }


def _fa3_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
) -> dict[str, Any]:
    return {"q": q, "k": k, "v": v, **_common(segments, scores, "causal", endless=-1)}


def _fa3_backward(
    grad_out: torch.Tensor, saved: Tensors, grads: Tensors, segments: Segments, scores: Scores
) -> dict[str, Any]:
    return {
        **_saved("softmax_lse", grad_out, saved),
        **_written(grads),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **_common(segments, scores, "is_causal", endless=-1),
    }


def _fa4_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
) -> dict[str, Any]:
    # there, -1 is a window, and None has no end
    return {"q": q, "k": k, "v": v, "return_lse": True, **_common(segments, scores, "causal", endless=None)}


def _fa4_backward(
    grad_out: torch.Tensor, saved: Tensors, grads: Tensors, segments: Segments, scores: Scores
) -> dict[str, Any]:
    return {
        **_saved("lse", grad_out, saved),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **_common(segments, scores, "causal", endless=None),
    }


def _saved(lse: str, grad_out: torch.Tensor, saved: Tensors) -> dict[str, Any]:
    """Return the keywords of what forward saved; `lse` is how a version spells the log-sum-exp."""
    return {"dout": grad_out, **dict(zip(("q", "k", "v", "out", lse), saved, strict=True))}


def _written(grads: Tensors) -> dict[str, Any]:
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _common(segments: Segments, scores: Scores, causal: str, endless: int | None) -> dict[str, Any]:
    """Return the keywords of all versions; `endless` is how a version spells a window without an end."""
    left, right = window_of(segments, scores) or (endless, endless)
    return {
        "cu_seqlens_q": segments.cu_q,
        "cu_seqlens_k": segments.cu_k,
        "max_seqlen_q": segments.max_q,
        "max_seqlen_k": segments.max_k,
        "softmax_scale": scores.scaling,
        "softcap": scores.softcap or 0.0,
        causal: segments.causal,
        "window_size_left": left,
        "window_size_right": right,
    }


FA2 = Flash(
    "fa2",
    "flash-attn",
    "flash_attn.flash_attn_interface",  # not there where only FA4 is installed, which shares the package's name
    "flash_attn_interface",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
    Calls(_fa2_forward, _fa2_backward),
    "2.7 or later",
    oldest=Version("2.7"),  # from then on the log-sum-exp of packed samples is (H, Tq)
)
FA3 = Flash(
    "fa3",
    "flash_attn_3",
    "flash_attn_interface",
    "flash_attn_interface",
    "_flash_attn_forward",
    "_flash_attn_backward",
    Calls(_fa3_forward, _fa3_backward),
    "one of 2026",
)
FA4 = Flash(
    "fa4",
    "flash-attn-4",
    "flash_attn.cute.interface",
    "interface",
    "_flash_attn_fwd",
    "_flash_attn_bwd",
    Calls(_fa4_forward, _fa4_backward, returns_gradients=True),
    "one of 2026",
)


def _parsed(version: str) -> Version:
    """Return a version to compare with; one that is none is as old as can be."""
    try:
        return Version(version)
    except InvalidVersion:
        return Version("0")


def _without_softcap(kernel: Kernel) -> Kernel:
    return replace(kernel, features=kernel.features - {SOFTCAP})
