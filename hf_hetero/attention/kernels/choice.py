"""This is the one door to attention kernels: which there are, what each can do, and which is best for a model.

Each kernel is a record of what it can do (`contract.Kernel`) with functions of one signature; each library has a file
of its own.

=====================  ========  ====================  ======  =======  =====  ======================
kernel                 device    types                 window  softcap  sinks  log-sum-exp (for rings)
=====================  ========  ====================  ======  =======  =====  ======================
`cpu.CPU`              CPU       all, fp64 too         yes     yes      yes    yes
`plain.PLAIN`          any       all, fp64 too         yes     yes      yes    yes
`flash.fa3()`          CUDA 9    fp16, bf16            yes     yes      yes    yes
`flash.fa4()`          CUDA 9+   fp16, bf16            yes     yes      yes    yes
`flash.fa2()`          CUDA 8+   fp16, bf16            yes     yes      yes    yes
`cuda.TORCH_VARLEN`    CUDA      fp16, bf16            yes     no       yes    yes
through transformers   CUDA      fp16, bf16            as its function's keywords      no
=====================  ========  ====================  ======  =======  =====  ======================
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from hf_hetero.attention.kernels.contract import HALF, SINKS, SOFTCAP, WINDOW, Kernel
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.kernels.cuda import TORCH_VARLEN, through_transformers
from hf_hetero.attention.kernels.flash import flash_kernels, named_flash_kernel
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.errors import UnsupportedModel

logger = logging.getLogger(__name__)


def choose_kernel(
    device_type: str, dtype: torch.dtype, features: frozenset[str] = frozenset(), wanted: str | None = None
) -> Kernel:
    """Choose the best kernel that can do what a model needs.

    Args:
        device_type: "cpu" or "cuda".
        dtype: type that attention computes in.
        features: what the model's layers use.
        wanted: the model's own `attn_implementation`; a flash-attn name is honoured.

    Raises:
        UnsupportedModel: no kernel can, with what is missing.
    """
    if device_type == "cpu":
        return CPU
    if dtype not in HALF:
        logger.warning("No flash kernel computes in %s: using plain attention, slow and hungry. Train in bf16.", dtype)
        return PLAIN
    # nothing is tried: all ranks have the same packages and config, and must come to the same kernel
    candidates = [*_flash(wanted), TORCH_VARLEN]
    for kernel in candidates:
        if features <= kernel.features:
            return kernel
    raise UnsupportedModel(
        f"This model uses {', '.join(sorted(features))}; no kernel here ({[k.name for k in candidates]}) can. "
        "Install a flash-attn that can: 2.6 or later for softcap."
    )


def _flash(wanted: str | None) -> list[Kernel]:
    """Return the flash-attn that the user named, else those that are installed, fastest first."""
    if wanted and "flash" in wanted:
        return [named_flash_kernel(wanted) or through_transformers(wanted)]
    return flash_kernels() or [through_transformers(name) for name in _known_to_transformers()]


def _known_to_transformers() -> list[str]:
    """Return the name of a flash-attn that only transformers can call, such as an older one, if there is one."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return ["flash_attention_3"]
    return ["flash_attention_2"] if is_flash_attn_2_available() else []


def features_of(config: Any) -> frozenset[str]:
    """Return what the attention layers of a transformers config will ask of a kernel."""
    features: set[str] = set()
    layer_types = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layer_types or (not layer_types and getattr(config, "sliding_window", None)):
        features.add(WINDOW)
    if getattr(config, "attn_logit_softcapping", None):
        features.add(SOFTCAP)
    # no field says so: its layers always have them
    if getattr(config, "model_type", "") == "gpt_oss":
        features.add(SINKS)
    return frozenset(features)
